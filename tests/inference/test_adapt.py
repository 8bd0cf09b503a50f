"""Static networks of any kind that get a gate: budget, export, LayerScale."""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest
import variants

from avit_jax.core import halting
from avit_jax.data import augment
from avit_jax.inference import adapt, adaptive, export, serving
from avit_jax.models import flops

_KINDS = ["dinov2_registers", "siglip_average", "dinov3"]


@pytest.mark.parametrize("kind", _KINDS)
def test_a_static_network_gets_a_gate_that_meets_a_budget(kind: str) -> None:
    static = variants.network(kind, halting=None)
    params, images = variants.params(static), variants.images(static, 16)
    gate = halting.HaltingConfig(gamma=0.0, beta=-4.0, merge=True, redundancy=5.0)
    found = adapt.add_gate(static, params, images, budget=0.8, gate=gate)
    assert found.params is params
    assert found.model.clone(halting=None) == static
    # The cost of 16 small images jumps, which leaves it above the budget.
    assert 0.798 < found.macs_ratio < 0.85
    logits, aux = jax.jit(found.model.apply)({"params": params}, images)
    ratio = float(aux.macs.mean()) / flops.static_macs(static)
    assert found.macs_ratio == pytest.approx(ratio, rel=1e-5)
    expected, _ = jax.jit(static.apply)({"params": params}, images)
    assert found.agreement == np.mean(logits.argmax(-1) == expected.argmax(-1))
    cosines = [
        np.dot(x, y) / math.sqrt(np.dot(x, x) * np.dot(y, y))
        for x, y in zip(np.asarray(logits), np.asarray(expected), strict=True)
    ]
    assert found.similarity == pytest.approx(np.mean(cosines), rel=1e-4)
    assert found.similarity < 0.9999


def test_without_classes_there_is_no_agreement() -> None:
    static = variants.network("dinov2", halting=None, num_classes=0)
    found = adapt.add_gate(static, variants.params(static), variants.images(static, 4), budget=0.9)
    assert found.agreement is None and 0 < found.similarity <= 1


def test_a_gate_that_could_be_learned_is_fixed() -> None:
    static = variants.network("dinov2", halting=None)
    gate = halting.HaltingConfig(merge=True, gamma=1.0, redundancy=50.0, learnable=True)
    images = variants.images(static, 4)
    found = adapt.add_gate(static, variants.params(static), images, budget=0.9, gate=gate)
    logits, _ = found.model.apply({"params": found.params}, images)
    assert np.isfinite(logits).all()


def test_mistakes_are_value_errors() -> None:
    model = variants.network("dinov2")
    images = variants.images(model, 2)
    add_gate = functools.partial(adapt.add_gate, params=variants.params(model), images=images)
    with pytest.raises(ValueError, match=r"halts already: change its gate"):
        add_gate(model, budget=0.5)
    for budget in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="budget must be above 0 and at most 1"):
            add_gate(model.clone(halting=None), budget=budget)
    with pytest.raises(adapt.BudgetOutOfReach, match="set another budget"):
        add_gate(model.clone(halting=None), budget=1e-3)


def test_layer_scale_folds_into_the_layer_before_it() -> None:
    model = variants.network("dinov2_giant")
    params, images = variants.params(model), variants.images(model, 3)
    expected, _ = jax.jit(model.apply)({"params": params}, images)
    folded, folded_params = adapt.fold_layer_scale(model, params)
    assert not folded.layer_scale and "ls1" in params["layers"]
    shapes = jax.eval_shape(folded.init, jax.random.key(0), images)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(dict(folded_params))
    logits, _ = jax.jit(folded.apply)({"params": folded_params}, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert adapt.fold_layer_scale(folded, folded_params) == (folded, folded_params)


@pytest.mark.parametrize("kind", _KINDS)
def test_export(kind: str, tmp_path: pathlib.Path) -> None:
    model = variants.network(kind)
    params, path = variants.params(model), tmp_path / "network.avit"
    colors = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    export.write(path, params, model, platforms=("cpu",), **colors)
    images = np.random.default_rng(0).integers(0, 256, (5, *model.pixels, 3), np.uint8)
    logits, depth = serving.load(path)(images)
    normalized = augment.normalize(images, **colors)
    expected, aux = jax.jit(functools.partial(adaptive.apply, model))(
        {"params": params}, normalized
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(depth, flops.patch_depth(model, aux.active))
