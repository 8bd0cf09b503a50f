"""Attention maps against a softmax in plain NumPy."""

import operator

import jax
import numpy as np
import plain_numpy
import pytest
import variants

import avit_jax
from avit_jax.models import block, executors, forward, vit

_COUNT = 4


def _expected(model: vit.AViT, layer: int) -> np.ndarray:
    """Maps of each image, from the weights of its active tokens."""
    params, maps = variants.float64(variants.params(model)), []
    for image in variants.float64(variants.images(model, _COUNT)):
        found: list[tuple[np.ndarray, np.ndarray]] = []
        plain_numpy.run(model, params, image, attention=found)
        weights = np.zeros((model.num_heads, model.num_tokens))
        if model.pool == "map":
            _, weights[:, model.num_prefix_tokens :] = found[-1]
        else:
            active, of_active = found[layer]
            asking = active < 1 if model.pool == "token" else active >= model.num_prefix_tokens
            if asking.any():
                weights[:, active] = of_active[:, asking].mean(axis=1)
        maps.append(weights[:, model.num_prefix_tokens :].reshape(-1, *model.grid))
    return np.stack(maps)


@pytest.mark.parametrize("kind", [*variants.KINDS])
@pytest.mark.parametrize("halts", [False, True])
def test_maps_are_those_of_plain_numpy(kind: str, halts: bool) -> None:
    model = variants.network(kind) if halts else variants.network(kind, halting=None)
    params, images = variants.params(model), variants.images(model, _COUNT)
    if model.pool == "map":
        found = avit_jax.attention_maps(model, params, images)
        np.testing.assert_allclose(found, _expected(model, -1), rtol=0, atol=1e-5)
        assert np.asarray(found).min() > 0
        with pytest.raises(ValueError, match="layer=-1"):
            avit_jax.attention_maps(model, params, images, layer=0)
        return
    _, aux = jax.jit(model.apply)({"params": params}, images)
    active = np.asarray(aux.active)[:, :, model.num_prefix_tokens :]
    for layer in (0, 1, -1):
        found = np.asarray(avit_jax.attention_maps(model, params, images, layer=layer))
        assert found.shape == (_COUNT, model.num_heads, *model.grid)
        np.testing.assert_allclose(found, _expected(model, layer), rtol=0, atol=1e-5)
        by_patch = found.reshape(_COUNT, model.num_heads, -1).max(axis=1)
        assert not by_patch[~active[layer]].any()
        if not halts:
            assert (by_patch > 0).all()


def test_a_merged_token_has_the_weight_of_its_patches() -> None:
    model = variants.network("registers_with_positions", halting=variants.MERGING)
    params, images = variants.params(model), variants.images(model, _COUNT)
    found = np.asarray(avit_jax.attention_maps(model, params, images, layer=2))

    cell = block.Block(**model.block_kwargs, parent=None)
    x = model.apply({"params": params}, images, method="embed")
    carry = forward.start(cell, x, model.num_prefix_tokens)
    *before, last = (
        jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(model.depth)
    )
    gate = (model.halting.gamma, model.halting.beta)
    for layer in before:
        carry, _ = forward.step(cell, executors.masked, gate, carry, layer, is_last=False)
    assert (np.asarray(carry.size)[carry.state.active] > 1).any()
    last = jax.device_get(last)
    for image in range(_COUNT):
        active = np.flatnonzero(carry.state.active[image])
        tokens = plain_numpy._norm(np.asarray(carry.x[image, active]), last["norm1"], 1e-6)
        heads = plain_numpy._dense(tokens, last["qkv"]).reshape(-1, 3, model.num_heads, 8)
        weights = np.exp(np.einsum("hk,nhk->hn", heads[0, 0], heads[:, 1]) / np.sqrt(8))
        weights *= np.asarray(carry.size)[image, active]
        expected = np.zeros((model.num_heads, model.num_tokens))
        expected[:, active] = weights / weights.sum(axis=1, keepdims=True) * (active[0] == 0)
        expected = expected[:, model.num_prefix_tokens :].reshape(-1, *model.grid)
        np.testing.assert_allclose(found[image], expected, rtol=0, atol=1e-5)
    assert found.any()


@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_are_not_there(layer: int) -> None:
    model = variants.network("dinov2")
    with pytest.raises(ValueError, match="layer must be at least -3 and below 3"):
        avit_jax.attention_maps(model, variants.params(model), variants.images(model, 1), layer)
