"""The type of an array, for the annotations of `core`, `kernels`, `models` and `inference`."""

from typing import TYPE_CHECKING

import jax
import numpy as np

# Functions return JAX arrays. As in JAX, they also accept NumPy arrays. Type checks in tests skip
# an `UncheckedArray`: the function that takes it refuses other types with a message.
if TYPE_CHECKING:
    Array = jax.Array
    UncheckedArray = jax.Array
else:
    Array = jax.Array | np.ndarray
    UncheckedArray = object
