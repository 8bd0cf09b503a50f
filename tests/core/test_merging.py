"""Merging of halted tokens: its functions by hand, and the network against a loop that is written
out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.core import halting, merging
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive
from avit_jax.models import block, executors, flops, forward, halting_linen, halting_nnx, vit


def test_similarity_is_the_cosine_of_the_first_channels_and_has_no_gradient() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    unit = x[..., :4] / np.linalg.norm(x[..., :4], axis=-1, keepdims=True)
    np.testing.assert_allclose(merging.similarity(x, 4), unit @ unit.swapaxes(1, 2), atol=1e-6)
    assert merging.similarity(jnp.asarray(x, jnp.bfloat16), 4).dtype == jnp.float32
    grad = jax.grad(lambda x: merging.similarity(x, 4).sum())(x)
    np.testing.assert_array_equal(grad, 0.0)
    assert np.isfinite(merging.similarity(np.zeros((1, 2, 3), np.float32), 3)).all()


_SIMILAR = jnp.array(
    [[[1.0, 0.9, 0.2, 0.3], [0.9, 1.0, 0.5, 0.8], [0.2, 0.5, 1.0, 0.7], [0.3, 0.8, 0.7, 1.0]]]
)


def test_redundancy_looks_at_active_tokens_before() -> None:
    active = jnp.array([[True, True, True, True]])
    np.testing.assert_allclose(merging.redundancy(_SIMILAR, active)[0], [-1.0, 0.9, 0.5, 0.8])
    np.testing.assert_allclose(
        merging.redundancy(_SIMILAR, active.at[0, 1].set(False))[0], [-1.0, 0.0, 0.2, 0.7]
    )


def test_tokens_merge_into_the_most_similar_that_stays() -> None:
    tokens = jnp.arange(8, dtype=jnp.float32).reshape(1, 4, 2) ** 2
    size = jnp.array([[1.0, 2.0, 1.0, 3.0]])
    leaves, stays = jnp.array([[False, True, False, True]]), jnp.array([[True, False, True, False]])
    merged, sizes = merging.merge(tokens, size, _SIMILAR, merged=leaves, kept=stays)
    np.testing.assert_allclose(sizes[0], [3.0, 2.0, 4.0, 3.0])
    np.testing.assert_allclose(merged[0, 0], (tokens[0, 0] + 2 * tokens[0, 1]) / 3, rtol=1e-6)
    np.testing.assert_allclose(merged[0, 2], (tokens[0, 2] + 3 * tokens[0, 3]) / 4, rtol=1e-6)
    np.testing.assert_array_equal(merged[0, [1, 3]], tokens[0, [1, 3]])


def test_the_most_similar_is_not_taken_where_it_leaves_and_of_equals_the_first_is() -> None:
    leaves = jnp.array([[True, True, False, False]])
    _, sizes = merging.merge(
        jnp.ones((1, 4, 2)), jnp.ones((1, 4)), _SIMILAR, merged=leaves, kept=~leaves
    )
    np.testing.assert_allclose(sizes[0], [1.0, 1.0, 1.0, 3.0])
    _, sizes = merging.merge(
        jnp.ones((1, 4, 2)), jnp.ones((1, 4)), jnp.ones((1, 4, 4)), merged=leaves, kept=~leaves
    )
    np.testing.assert_allclose(sizes[0], [1.0, 1.0, 3.0, 1.0])


def test_nothing_changes_where_none_stays_or_none_leaves() -> None:
    tokens, size, no = jnp.arange(8.0).reshape(1, 4, 2), jnp.ones((1, 4)), jnp.zeros((1, 4), bool)
    for leaves, stays in ((~no, no), (no, ~no)):
        merged, sizes = merging.merge(tokens, size, _SIMILAR, merged=leaves, kept=stays)
        np.testing.assert_array_equal(merged, tokens)
        np.testing.assert_array_equal(sizes, size)


def _model(**changes: Any) -> vit.AViT:
    sizes = dict(
        image_size=(40, 32), patch_size=8, channels=2, width=24, depth=4, num_heads=3, num_classes=7
    )
    gate = halting.HaltingConfig(gamma=0.5, beta=-5.0, merge=True, redundancy=10.0)
    return vit.AViT(**(sizes | dict(halting=gate) | changes))


@functools.cache
def _params(model: vit.AViT) -> Any:
    return jax.jit(model.init)(jax.random.key(1), _IMAGES)["params"]


_IMAGES = np.random.default_rng(0).standard_normal((6, 40, 32, 2)).astype(np.float32)


def _written_out(model: vit.AViT, params: Any) -> tuple[jax.Array, jax.Array]:
    """Logits and active tokens by the definition, token by token."""
    first = model.num_prefix_tokens  # patch
    layer = block.Block(**model.block_kwargs)
    x = np.asarray(model.apply({"params": params}, _IMAGES, method="embed"))
    size, cumulative = np.ones(x.shape[:2], np.float32), np.zeros(x.shape[:2], np.float32)
    active, actives, readout = np.ones(x.shape[:2], bool), [], 0.0
    remainder = np.ones(x.shape[:2], np.float32)
    for i in range(model.depth):
        actives.append(active.copy())
        variables = {"params": jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])}
        x = layer.apply(variables, x * active[..., None], active, size=size, method="attention")
        x = np.array(layer.apply(variables, x, active, method="mlp"))
        unit = x[..., :8] / np.linalg.norm(x[..., :8], axis=-1, keepdims=True)
        score = model.halting.gamma * x[..., 0] + model.halting.beta
        for image in range(len(x)):
            patches = [n for n in range(first, x.shape[1]) if active[image, n]]
            for n in patches:
                cosines = [float(unit[image, n] @ unit[image, m]) for m in patches if m < n]
                score[image, n] += model.halting.redundancy * max(cosines, default=-1.0)
        score = np.asarray(jax.nn.sigmoid(score))
        if i == model.depth - 1:
            score = np.ones_like(score)
        cumulative += np.where(active, score, 0.0)
        stays = active & (cumulative < 0.99)
        weight = np.where(stays, score, np.where(active, remainder, 0.0))
        remainder = remainder - np.where(stays, score, 0.0)
        readout = readout + weight[:, :first, None] * x[:, :first]
        before = x.copy(), size.copy()
        for image, n in zip(*np.nonzero(active & ~stays), strict=True):
            left = [m for m in range(first, x.shape[1]) if stays[image, m]]
            if n >= first and left:
                m = max(left, key=lambda m: float(unit[image, n] @ unit[image, m]))
                x[image, m] = (
                    size[image, m] * x[image, m] + before[1][image, n] * before[0][image, n]
                )
                size[image, m] += before[1][image, n]
                x[image, m] /= size[image, m]
        active = stays
    return model.apply({"params": params}, readout, method="classify"), np.stack(actives)


_BY_SCORE = halting.HaltingConfig(gamma=4.0, beta=-3.0, merge=True)


@pytest.mark.parametrize("changes", [{}, {"distilled": True}, {"halting": _BY_SCORE}])
def test_the_network_does_what_the_definition_says(changes: dict[str, Any]) -> None:
    model = _model(**changes)
    params = _params(model)
    logits, aux = jax.jit(model.apply)({"params": params}, _IMAGES)
    expected, active = _written_out(model, params)
    np.testing.assert_array_equal(aux.active, active)
    assert 0.2 < active[1:, :, 1:].mean() < 0.8
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_where_nothing_halts_it_is_the_plain_network() -> None:
    never = _model(halting=halting.HaltingConfig(beta=-1e4, merge=True, redundancy=10.0))
    params = _params(_model())
    plain = never.clone(halting=dataclasses.replace(never.halting, merge=False, redundancy=0.0))
    logits, expected = (
        jax.jit(model.apply)({"params": params}, _IMAGES)[0] for model in (never, plain)
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_comparing_tokens_is_counted_in_all_layers_but_the_last() -> None:
    model = _model()
    plain = model.clone(halting=dataclasses.replace(model.halting, merge=False, redundancy=0.0))
    active = np.ones((4, 1, model.num_tokens), bool)
    more = flops.image_macs(model, active) - flops.image_macs(plain, active)
    np.testing.assert_allclose(more, 3 * model.num_tokens**2 * 8)
    assert flops.static_macs(model) == flops.static_macs(plain)
    aux = jax.jit(functools.partial(adaptive.apply, model))({"params": _params(model)}, _IMAGES)[1]
    count = np.asarray(aux.active.sum(axis=-1), np.float64)
    linear = 4 * 24**2 + 2 * 24 * 96
    by_hand = (
        (count * linear + count**2 * 2 * 24).sum(axis=0)
        + (count[:-1] ** 2 * 8).sum(axis=0)
        + flops.fixed_macs(model)
    )
    np.testing.assert_allclose(aux.macs, by_hand, rtol=1e-6)


def test_a_key_of_size_two_is_two_keys() -> None:
    model = _model()
    layer = block.Block(**model.block_kwargs)
    variables = {"params": jax.tree.map(lambda stacked: stacked[0], _params(model)["layers"])}
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 3, 24)), jnp.float32)
    sizes = jnp.array([[1.0, 2.0, 1.0]])
    once = layer.apply(variables, x, size=sizes, method="attention")
    twice = layer.apply(variables, x[:, jnp.array([0, 1, 1, 2])], method="attention")
    np.testing.assert_allclose(once, twice[:, jnp.array([0, 1, 3])], atol=1e-5)


def _step(model: vit.AViT, executor: Any, carry: Any, i: int, **gate_and_last: Any) -> Any:
    params = jax.tree.map(lambda stacked: stacked[i], _params(model)["layers"])
    layer = block.Block(**model.block_kwargs)
    return forward.step(layer, executor, carry=carry, params=params, **gate_and_last)


def _carry(model: vit.AViT) -> forward.Carry:
    x = model.apply({"params": _params(model)}, _IMAGES, method="embed")
    return forward.start(block.Block(**model.block_kwargs), x, model.num_prefix_tokens)


def test_no_patch_is_lost() -> None:
    """The sizes of the tokens that keep running sum to the number of patches, after every layer."""
    model = _model()
    carry = _carry(model)
    for i in range(model.depth):
        carry, _ = _step(model, executors.masked, carry, i, gate=(0.5, -5.0), is_last=False)
        running = carry.state.active[:, 1:]
        assert running.any(axis=1).all()
        np.testing.assert_array_equal(
            jnp.where(running, carry.size[:, 1:], 0).sum(axis=1), model.num_tokens - 1
        )
    assert carry.size.max() > 2


@pytest.mark.parametrize(
    "executor", [executors.masked, executors.Bucketed(Plan(bucket=2, token_multiple=4))]
)
def test_in_the_last_layer_none_merges(executor: executors.Executor) -> None:
    model = _model()
    for is_last in (True, False):
        carry, (score, _) = _step(
            model, executor, _carry(model), 0, gate=(0.5, 0.0), is_last=is_last
        )
        assert (carry.size == 1.0).all() == is_last and (score == 1.0).all() == is_last


@pytest.mark.parametrize("module", [halting_linen.Halting, halting_nnx.Halting])
def test_the_halting_layer_alone_does_not_merge(module: Any) -> None:
    layer = module(halting.HaltingConfig(merge=True))
    with pytest.raises(ValueError, match="does not merge tokens"):
        layer.apply({}, jnp.ones((1, 2, 3))) if module is halting_linen.Halting else layer(
            jnp.ones((1, 2, 3))
        )
    for mistake, message in (
        ({"merge": True, "redundancy": -1.0}, "at least 0"),
        ({"redundancy": 1.0}, "set merge=True too"),
    ):
        with pytest.raises(ValueError, match=message):
            halting.HaltingConfig(**mistake)
