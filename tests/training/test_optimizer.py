"""The learning rate by step, what decays, and the clip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.training import optimizer


def test_schedule() -> None:
    rate = optimizer.schedule(
        steps=100, learning_rate=1.0, warmup=0.1, warmup_learning_rate=0.2, min_learning_rate=0.01
    )
    np.testing.assert_allclose(
        [rate(step) for step in (0, 5, 10, 55, 100, 150)],
        [0.2, 0.6, 1.0, 0.505, 0.01, 0.01],
        rtol=1e-5,
    )


def test_schedule_without_warmup_starts_at_its_peak() -> None:
    rate = optimizer.schedule(
        steps=10, learning_rate=0.5, warmup=0.0, warmup_learning_rate=0.0, min_learning_rate=0.0
    )
    np.testing.assert_allclose([rate(0), rate(10)], [0.5, 0.0], atol=1e-7)


@pytest.fixture(scope="module")
def params() -> dict:
    model = vit.AViT(
        image_size=8, patch_size=4, width=8, num_heads=2, depth=2, num_classes=3, distilled=True,
        halting=halting.HaltingConfig(learnable=True),
    )  # fmt: skip
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)


def _paths(tree: dict) -> set[str]:
    return {
        "/".join(key.key for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf
    }


def test_kernels_alone_decay(params: dict) -> None:
    layers = {f"layers/{name}/kernel" for name in ("qkv", "proj", "fc1", "fc2")}
    assert _paths(optimizer.decays(params)) == layers | {
        "patch_embed/kernel",
        "head/kernel",
        "head_dist/kernel",
    }


def test_an_update_decays_kernels_and_leaves_the_rest() -> None:
    params = {
        "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "pos_embed": jnp.ones((1, 2, 2)),
    }
    tx = optimizer.create(optax.constant_schedule(0.1), weight_decay=0.05, clip_norm=0.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], np.full((2, 3), -0.1 * 0.05), rtol=1e-6)
    assert not updates["head"]["bias"].any()
    assert not updates["pos_embed"].any()


@pytest.mark.parametrize(("clip_norm", "scale"), [(0.0, 1.0), (1.0, 0.1), (20.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm: float, scale: float) -> None:
    params = {"a": {"kernel": jnp.zeros((2,))}, "b": {"bias": jnp.zeros((1,))}}
    gradient = {"a": {"kernel": jnp.array([6.0, 0.0])}, "b": {"bias": jnp.array([-8.0])}}  # norm 10
    tx = optimizer.create(optax.constant_schedule(0.1), weight_decay=0.0, clip_norm=clip_norm)
    _, state = tx.update(gradient, tx.init(params), params)
    # Adam's steps forget the scale of a gradient; its first moment, 0.1 of it after one step, does
    # not.
    moment = optax.tree_utils.tree_get(state, "mu")
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(m, 0.1 * scale * g, rtol=1e-5), moment, gradient
    )


def test_learning_rates_fall_from_the_head_to_the_embedding(params: dict) -> None:
    scales = optimizer.layer_scales(params, 0.5)
    expected = {"head": 1, "head_dist": 1, "norm": 1, "gate": 1, "patch_embed": 1 / 8}
    expected |= {"cls_token": 1 / 8, "dist_token": 1 / 8, "pos_embed": 1 / 8}
    for name, value in expected.items():
        assert {float(x) for x in jax.tree.leaves(scales[name])} == {value}
    for leaf, param in zip(
        jax.tree.leaves(scales["layers"]), jax.tree.leaves(params["layers"]), strict=True
    ):
        assert leaf.shape == (2,) + (1,) * (param.ndim - 1)
        assert leaf.ravel().tolist() == [0.25, 0.5]


def test_layer_decay_scales_the_whole_update(params: dict) -> None:
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    updates = {}
    for decay in (1.0, 0.5):
        tx = optimizer.create(
            optax.constant_schedule(0.1), weight_decay=0.05, clip_norm=1.0, layer_decay=decay
        )
        updates[decay], _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    expected = jax.tree.map(jnp.multiply, updates[1.0], optimizer.layer_scales(params, 0.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates[0.5], expected)


@pytest.mark.parametrize("changes", [{"clip_norm": 1.0}, {"layer_decay": 0.75}])
def test_a_run_may_go_on_with_a_clip_or_layer_decay(
    params: dict, changes: dict[str, float]
) -> None:
    plain, other = (
        optimizer.create(lambda _: 1e-3, **{"weight_decay": 0.05, "clip_norm": 0.0} | more).init(
            params
        )
        for more in ({}, changes)
    )
    assert jax.tree.structure(plain) == jax.tree.structure(other)
