"""The type of an array, for the annotations of `core`, `kernels` and `models`."""

from typing import TYPE_CHECKING

import jax
import numpy as np

# Functions return JAX arrays. Like those of JAX, they also take NumPy arrays. Tests do not check an
# `UncheckedArray`: the function itself refuses other types, and its message says what to do.
if TYPE_CHECKING:
    Array = jax.Array
    UncheckedArray = jax.Array
else:
    Array = jax.Array | np.ndarray
    UncheckedArray = object
