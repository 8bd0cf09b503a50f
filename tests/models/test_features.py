"""Features of all places of the grid, though tokens halt and merge."""

import functools
from typing import Any

import jax
import numpy as np
import plain_numpy
import pytest
import variants

from avit_jax.core import features as features_lib
from avit_jax.core import halting
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive
from avit_jax.models import block, executors, flops, forward, vit

_PLAN = Plan(bucket=2, token_multiple=3, chunk=4)
_NEVER = halting.HaltingConfig(gamma=1.0, beta=-50.0, merge=True)


def _masked(model: vit.AViT) -> Any:
    run = jax.jit(functools.partial(model.apply, features=True))
    return run({"params": variants.params(model)}, variants.images(model, 5))


def _removed(model: vit.AViT) -> Any:
    run = jax.jit(functools.partial(adaptive.apply, model, plan=_PLAN, features=True))
    return run({"params": variants.params(model)}, variants.images(model, 5))


def test_of_a_network_in_which_nothing_halts_are_those_of_the_static_network() -> None:
    model = variants.network("dinov2_registers", halting=_NEVER)
    _, static = _masked(model.clone(halting=None))
    assert static.features.shape == (5, *model.grid, model.width)
    for run in (_masked, _removed):
        np.testing.assert_allclose(run(model)[1].features, static.features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2_registers", "maximum", "dinov3"])
def test_are_the_outputs_in_the_layers_in_which_the_tokens_halt(kind: str) -> None:
    model = variants.network(kind)
    params = variants.float64(variants.params(model))
    _, masked = _masked(model)
    logits, removed = _removed(model)
    for i, image in enumerate(variants.float64(variants.images(model, 5))):
        expected, _, _, features = plain_numpy.run(model, params, image)
        np.testing.assert_allclose(logits[i], expected, rtol=0, atol=1e-4)
        for aux in (masked, removed):
            np.testing.assert_allclose(aux.features[i], features, rtol=0, atol=1e-4)
    if model.pool == "token":  # an image runs on after its class token has halted
        last = removed.depth[:, model.num_prefix_tokens :].max(axis=1)
        assert (last > removed.depth[:, 0]).any()
        everything = flops.image_macs(model, removed.active, slice(None))
        np.testing.assert_array_equal(removed.macs, everything)
        assert (removed.macs > flops.image_macs(model, removed.active)).any()


def test_of_merged_tokens_are_those_of_the_tokens_that_they_are_part_of() -> None:
    model = variants.network("dinov2_registers", halting=variants.MERGING)
    cell = block.Block(**model.block_kwargs, parent=None)
    params = variants.params(model)

    def run(executor: executors.Executor) -> forward.Carry:
        x = model.apply({"params": params}, variants.images(model, 5), method="embed")
        carry = forward.start(cell, x, model.num_prefix_tokens, features=True)
        gate = (model.halting.gamma, model.halting.beta)
        return forward.run(cell, executor, gate, carry, params["layers"])[0]

    masked, removed = (
        jax.device_get(jax.jit(functools.partial(run, executor))())
        for executor in (executors.masked, executors.Bucketed(_PLAN))
    )
    place = masked.features.place
    np.testing.assert_array_equal(removed.features.place, place)
    features = features_lib.of_all(masked.features)
    np.testing.assert_allclose(features_lib.of_all(removed.features), features, rtol=0, atol=1e-5)
    for image in range(5):
        parts = np.bincount(place[image], minlength=model.num_tokens)
        whole = parts > 0
        np.testing.assert_array_equal(parts[whole], removed.size[image][whole])
        np.testing.assert_array_equal(place[image][whole], np.flatnonzero(whole))
        for token in range(model.num_tokens):
            expected = masked.features.output[image, place[image, token]]
            np.testing.assert_array_equal(features[image, token], expected)
    assert (place != np.arange(model.num_tokens)).any()
