"""Inference with removal has no gradient, and says so; what does not need one runs as before."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.core import halting
from avit_jax.inference import adaptive
from avit_jax.models import vit

_MODEL = vit.AViT(
    image_size=8, patch_size=4, channels=1, width=8, depth=2, num_heads=2, num_classes=3,
    halting=halting.HaltingConfig(gamma=3.0, beta=-1.0),
)  # fmt: skip
_IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
_PLANS = [
    adaptive.Plan(bucket=2, token_multiple=2),
    adaptive.Plan(bucket=6, token_multiple=5),
    adaptive.Plan(bucket=2, token_multiple=2, use_switch=True),
]
_ALL = (0, 1)  # variables and images


@functools.cache
def _variables() -> Any:
    return jax.jit(_MODEL.init)(jax.random.key(1), _IMAGES)


def _sum(variables: Any, images: jax.Array, plan: adaptive.Plan) -> jax.Array:
    logits, aux = adaptive.apply(_MODEL, variables, images, plan=plan)
    return logits.sum() + aux.macs.sum()


def _jvp(function: Callable[..., Any], *primals: Any) -> Any:
    return jax.jvp(function, primals, primals)


def _linearized(function: Callable[..., Any], *primals: Any) -> Any:
    return jax.linearize(function, *primals)[1](*primals)


def _vjp(function: Callable[..., Any], *primals: Any) -> Any:
    return jax.vjp(function, *primals)[1](jnp.ones(()))


_DERIVATIVES: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *x: jax.grad(f, argnums=_ALL)(*x),
    "grad of the images": lambda f, *x: jax.grad(f, argnums=1)(*x),
    "value_and_grad": lambda f, *x: jax.value_and_grad(f)(*x),
    "jacobian": lambda f, *x: jax.jacobian(f, argnums=_ALL)(*x),
    "jacfwd": lambda f, *x: jax.jacfwd(f, argnums=1)(*x),
    "hessian": lambda f, *x: jax.hessian(f, argnums=1)(*x),
    "vjp": _vjp,
    "jvp": _jvp,
    "linearize": _linearized,
    "jit of grad": lambda f, *x: jax.jit(jax.grad(f))(*x),
    "grad of jit": lambda f, *x: jax.grad(jax.jit(f))(*x),
    "jit of jvp": lambda f, *x: jax.jit(functools.partial(_jvp, f))(*x),
    "grad of checkpoint": lambda f, *x: jax.grad(jax.checkpoint(f))(*x),
    "pmap of grad": lambda f, variables, images: jax.pmap(jax.grad(f), in_axes=(None, 0))(
        variables, images[None]
    ),
}


@pytest.mark.parametrize("name", _DERIVATIVES)
def test_every_derivative_is_refused_in_one_sentence(name: str) -> None:
    for plan in _PLANS[: 3 if name == "grad" else 1]:
        with pytest.raises(
            TypeError, match=r"adaptive\.apply has no gradient: train with model\.apply"
        ):
            _DERIVATIVES[name](functools.partial(_sum, plan=plan), _variables(), _IMAGES)


def test_a_loss_beside_it_has_its_gradient() -> None:
    def loss(variables: Any, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        masked = scale * _MODEL.apply(variables, _IMAGES)[0].sum()
        removed, aux = adaptive.apply(_MODEL, variables, _IMAGES)
        stopped = adaptive.apply(_MODEL, jax.lax.stop_gradient(variables), _IMAGES)[0]
        return masked + jax.lax.stop_gradient(removed).sum() + stopped.sum(), aux.macs

    def alone(variables: Any, scale: jax.Array) -> jax.Array:
        return scale * _MODEL.apply(variables, _IMAGES)[0].sum()

    scale = jnp.float32(2.0)
    expected = jax.jit(jax.grad(alone, argnums=_ALL))(_variables(), scale)
    got, macs = jax.jit(jax.grad(loss, argnums=_ALL, has_aux=True))(_variables(), scale)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)
    assert macs.shape == (6,)


def test_the_program_is_the_same_without_the_rule() -> None:
    plan = _PLANS[0]
    with_rule, plain = (
        jax.jit(functools.partial(f, plan=plan)).lower(_variables(), _IMAGES).as_text()
        for f in (
            lambda variables, images, plan: adaptive.apply(_MODEL, variables, images, plan=plan),
            lambda variables, images, plan: adaptive._apply(_MODEL, plan, False, variables, images),
        )
    )
    assert with_rule == plain and "custom_call" not in with_rule
