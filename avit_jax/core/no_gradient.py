"""Functions without a gradient: a clear error if JAX needs one of their derivatives.

Without this module, JAX raises an error about the inside of the function, or returns a meaningless
number.
"""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from avit_jax.core.arrays import Array

_Result = TypeVar("_Result", bound=PyTree[Array])


def without_gradient(function: Callable[..., _Result], message: str) -> Callable[..., _Result]:
    """Wraps a function so that it raises TypeError if JAX needs one of its derivatives.

    JAX needs no derivative if the inputs do not depend on the variable of `jax.grad`, or if its
    value does not depend on the output. For example, `jax.grad(..., has_aux=True)`
    may return the output as auxiliary data.

    Args:
      function: maps trees of arrays to a tree of arrays.
      message: of the error.
    """
    run = jax.custom_jvp(function)

    @run.defjvp
    def jvp(primals: tuple, tangents: tuple) -> tuple[PyTree[Array], PyTree]:
        out = run(*primals)
        given = [x for x in jax.tree.leaves(tangents) if x.dtype != jax.dtypes.float0]

        def tangent(x: Array) -> Array | np.ndarray:
            if not np.issubdtype(x.dtype, np.inexact) and x.dtype != jax.numpy.bfloat16:
                return np.zeros(x.shape, jax.dtypes.float0)
            return _needed.bind(
                *given, aval=jax.core.ShapedArray(x.shape, x.dtype), message=message
            )

        return out, jax.tree.map(tangent, out)

    return run


def _refuse(*_: object, message: str, **__: object) -> NoReturn:
    raise TypeError(message)


# Placeholder for a derivative. JAX removes it if it is unused. Otherwise, one of these rules
# raises.
_needed = core.Primitive("derivative_of_a_function_without_gradient")
_needed.def_abstract_eval(lambda *_, aval, message: aval)
_needed.def_impl(_refuse)
mlir.register_lowering(_needed, _refuse)
for _rules in (ad.primitive_jvps, ad.primitive_transposes, batching.primitive_batchers):
    _rules[_needed] = _refuse
