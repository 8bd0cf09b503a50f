"""A function without a gradient: an error of ours, in place of one about its insides or of a number
that means nothing.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def without_gradient(function: Callable[..., Any], message: str) -> Callable[..., Any]:
    """The same function of array trees; TypeError with the message once one of its derivatives is
    needed.

    It is not needed if no input depends on what is differentiated, or if what is differentiated
    does not depend on the output: `jax.grad(..., has_aux=True)` may return the output as auxiliary
      data.
    """
    run = jax.custom_jvp(function)

    @run.defjvp
    def jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        out = run(*primals)
        tangents = [x for x in jax.tree.leaves(tangents) if x.dtype != jax.dtypes.float0]

        def tangent(x: jax.Array) -> Any:
            if not np.issubdtype(x.dtype, np.inexact) and x.dtype != jax.numpy.bfloat16:
                return np.zeros(x.shape, jax.dtypes.float0)
            return _needed.bind(
                *tangents, aval=jax.core.ShapedArray(x.shape, x.dtype), message=message
            )

        return out, jax.tree.map(tangent, out)

    return run


def _refuse(*_: Any, message: str, **__: Any) -> NoReturn:
    raise TypeError(message)


# Stands for a derivative: JAX traces it, drops it if nothing uses it, and otherwise meets one of
# these rules.
_needed = core.Primitive("derivative_of_a_function_without_gradient")
_needed.def_abstract_eval(lambda *_, aval, message: aval)
_needed.def_impl(_refuse)
mlir.register_lowering(_needed, _refuse)
for _rules in (ad.primitive_jvps, ad.primitive_transposes, batching.primitive_batchers):
    _rules[_needed] = _refuse
