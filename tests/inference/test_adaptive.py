"""Removal against masking: the same logits and decisions for less work, whatever the batch, the
plan and the device.
"""

import dataclasses
import functools
import json
import logging
import os
import re
from typing import Any

import chex
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax import export

from avit_jax.core import halting
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive, autotune
from avit_jax.models import flops, vit

_PLAN = Plan(bucket=3, token_multiple=8, chunk=8)
_PLANS = [_PLAN, dataclasses.replace(_PLAN, use_switch=True)]


def _model(**changes: Any) -> vit.AViT:
    """Small, oblong, with a gate that is an argument."""
    sizes = dict(
        image_size=(40, 32), patch_size=8, channels=2, width=24, depth=5, num_heads=3, num_classes=7
    )
    return vit.AViT(**(sizes | dict(halting=halting.HaltingConfig(learnable=True)) | changes))


def _gate(redundancy: float) -> halting.HaltingConfig:
    return halting.HaltingConfig(learnable=True, merge=redundancy > 0, redundancy=redundancy)


def _images(model: vit.AViT, count: int, seed: int = 0) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .standard_normal((count, *model.pixels, model.channels))
        .astype(np.float32)
    )


def _variables(model: vit.AViT, gamma: float = 3.0, beta: float = -1.0) -> dict[str, Any]:
    params = jax.jit(model.init)(jax.random.key(1), _images(model, 1))["params"]
    return {"params": params | {"gate": {"gamma": jnp.float32(gamma), "beta": jnp.float32(beta)}}}


@functools.lru_cache
def _masked(model: vit.AViT):
    return jax.jit(model.apply)


@functools.lru_cache
def _removed(model: vit.AViT, plan: Plan | None):
    return jax.jit(functools.partial(adaptive.apply, model, plan=plan))


def _check_same(model: vit.AViT, masked: Any, removed: Any, tolerance: float = 1e-5) -> None:
    """Logits to `tolerance` of their scale; decisions exactly."""
    (expected, aux), (logits, got) = masked, removed
    assert logits.dtype == expected.dtype
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(
        got.class_output, aux.class_output, rtol=0, atol=tolerance * np.abs(aux.class_output).max()
    )
    computing = flops.is_computed(aux.active, model.num_prefix_tokens)
    np.testing.assert_array_equal(got.active, computing)
    np.testing.assert_array_equal(got.depth, computing.sum(axis=0))
    # What halts last decides when an image is finished: it ran as deep as the method says.
    readout = aux.depth[:, : model.num_prefix_tokens].max(axis=1)
    np.testing.assert_array_equal(got.depth[:, : model.num_prefix_tokens].max(axis=1), readout)
    np.testing.assert_allclose(got.macs, flops.image_macs(model, aux.active), rtol=1e-6)
    score = [np.where(computing, x.score, 0) for x in (aux, got)]
    np.testing.assert_allclose(score[1], score[0], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("name", "ADF")
def test_golden_cases(name: str) -> None:
    case = golden.load(name)
    model, params = case.model(), case.params()
    removed = _removed(model, Plan(bucket=2, token_multiple=32, chunk=8))(
        {"params": params}, case.images
    )
    _check_same(model, _masked(model)({"params": params}, case.images), removed)
    np.testing.assert_allclose(
        removed[0], case.data["logits"], rtol=0, atol=3e-5 if name == "F" else 1e-5
    )


def test_float64_to_the_last_digits() -> None:
    with jax.enable_x64(True):
        case = golden.load("A")
        model, params = case.model(), case.params(np.float64)
        images = case.images.astype(np.float64)
        removed = _removed(model, _PLAN)({"params": params}, images)
        assert removed[0].dtype == removed[1].class_output.dtype == np.float64
        _check_same(model, _masked(model)({"params": params}, images), removed, tolerance=1e-13)


_CASES = [  # distilled, redundancy, batch, plan
    (False, 0.0, 1, None),
    (True, 0.0, 5, None),
    (False, 5.0, 5, Plan(bucket=8, token_multiple=8)),
    (False, 0.0, 19, _PLAN),
    (True, 5.0, 19, Plan(bucket=1, token_multiple=11, chunk=4, full_bucket=3)),
    (False, 0.0, 7, Plan(bucket=8, token_multiple=64, chunk=6)),
    (False, 0.0, 19, Plan(bucket=3, token_multiple=8, chunk=8, use_switch=True)),
    (True, 5.0, 7, Plan(bucket=4, token_multiple=8, use_switch=True)),
]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.sampled_from(_CASES),
    gamma=st.floats(0.0, 20.0),
    beta=st.floats(-30.0, 10.0),
    seed=st.integers(0, 1000),
)
def test_any_gate_batch_and_plan(case, gamma, beta, seed) -> None:
    distilled, redundancy, batch, plan = case
    model = _model(distilled=distilled, depth=4, halting=_gate(redundancy))
    variables, images = _variables(model, gamma, beta), _images(model, batch, seed)
    masked = _masked(model)(variables, images)
    reached = np.cumsum(np.where(masked[1].active, masked[1].score, 0), axis=0)
    assume(np.abs(reached - 0.99).min() > 1e-4)  # at the very threshold the last digit decides
    _check_same(model, masked, _removed(model, plan)(variables, images))


@pytest.mark.parametrize("redundancy", [0.0, 2.0])
def test_bfloat16(redundancy: float) -> None:
    model = _model(dtype=jnp.bfloat16, halting=_gate(redundancy))
    variables, images = _variables(model), _images(model, 16)
    (expected, aux), (logits, got) = (
        _masked(model)(variables, images),
        _removed(model, _PLAN)(variables, images),
    )
    assert logits.dtype == jnp.bfloat16
    assert got.score.dtype == got.class_output.dtype == jnp.float32
    same = (got.active == flops.is_computed(aux.active, 1)).mean()
    assert same > 0.97
    difference = np.abs(np.asarray(logits, np.float32) - np.asarray(expected, np.float32))
    assert np.median(difference) < 0.02 * np.abs(expected).max()


def test_permuted_images_give_permuted_results() -> None:
    model = _model()
    variables, images = _variables(model), _images(model, 19)
    order = np.random.default_rng(1).permutation(19)
    run = _removed(
        model, Plan(bucket=4, token_multiple=4, chunk=96)
    )  # one wave: the same groups either way
    (logits, aux), (permuted, permuted_aux) = run(variables, images), run(variables, images[order])
    np.testing.assert_allclose(permuted, logits[order], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(permuted_aux.depth, aux.depth[order])
    np.testing.assert_array_equal(permuted_aux.active, aux.active[:, order])
    np.testing.assert_array_equal(permuted_aux.macs, aux.macs[order])


def test_a_broken_image_spoils_no_other() -> None:
    model = _model()
    variables, images = _variables(model), _images(model, 6)
    broken = images.copy()
    broken[2] = np.nan
    (logits, _), (spoilt, _) = (_removed(model, _PLAN)(variables, x) for x in (images, broken))
    others = [0, 1, 3, 4, 5]
    assert np.isnan(spoilt[2]).all()
    np.testing.assert_allclose(
        spoilt[jnp.array(others)], logits[jnp.array(others)], rtol=0, atol=1e-5
    )


def test_halted_tokens_are_not_computed() -> None:
    """All tokens halt in the first layer: later layers may hold anything."""
    model = _model()
    variables, images = _variables(model, beta=100.0), _images(model, 5)
    layers = jax.tree.map(lambda x: x.at[1:].set(jnp.nan), variables["params"]["layers"])
    spoilt = {"params": variables["params"] | {"layers": layers}}
    assert np.isnan(_masked(model)(spoilt, images)[0]).all()
    logits, aux = _removed(model, None)(spoilt, images)
    np.testing.assert_allclose(logits, _masked(model)(variables, images)[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(aux.depth, 1)


def _padded_by_hand(model: vit.AViT, active: np.ndarray, plan: Plan) -> float:
    """MACs of a chunk of images, layer by layer and bucket by bucket."""
    total = active.shape[1] * flops.fixed_macs(model)
    counts = plan.token_counts(model.num_tokens)
    for i, layer in enumerate(active.sum(axis=-1)):
        left = sorted(layer, reverse=True)
        while left and left[0]:
            tokens = min(n for n in counts if n >= left[0])
            total += plan.bucket * flops.layer_macs(tokens, model, i == model.depth - 1)
            left = left[plan.bucket :]
    return total


@pytest.mark.parametrize(
    ("plan", "redundancy"), [(_PLAN, 0.0), (Plan(bucket=8, token_multiple=2, chunk=8), 2.0)]
)
def test_padded_macs_count_every_padded_row(plan: Plan, redundancy: float) -> None:
    model = _model(halting=_gate(redundancy))
    _, aux = _removed(model, plan)(_variables(model), _images(model, 8))
    assert (aux.macs_padded >= aux.macs).all()
    np.testing.assert_allclose(
        aux.macs_padded.sum(), _padded_by_hand(model, np.asarray(aux.active), plan), rtol=1e-5
    )


def _depths(rng: np.random.Generator, images: int, model: vit.AViT, mean: float) -> np.ndarray:
    """Depths `(B, N)` of images that differ in difficulty, in layers: spread 2 between images, 2.5
    between their tokens.
    """
    hard = rng.normal(mean, 2.0, (images, 1))
    depth = hard + rng.normal(0.0, 2.5, (images, model.num_tokens))
    depth[:, 0] = depth.max(axis=1)  # the class token stays to the end
    return np.clip(np.round(depth), 2, model.depth)


@pytest.mark.parametrize(
    ("budget", "batch", "cores", "bound"),
    [
        (0.8, 64, 2, 0.95),
        (0.62, 64, 2, 0.92),
        (0.4, 64, 2, 0.88),
        (0.62, 256, 2, 0.94),
        (0.62, 16, 2, 0.89),
        (0.8, 64, 1, 0.98),
        (0.62, 64, 1, 0.96),
        (0.4, 64, 1, 0.94),
        (0.62, 256, 1, 0.96),
        (0.62, 16, 1, 0.96),
    ],
)
def test_padding_of_the_default_plan_is_small(
    budget: float, batch: int, cores: int, bound: float
) -> None:
    model = vit.deit_tiny()
    plan = adaptive.default_plan(batch, "cpu", cores)
    layers = np.arange(model.depth)[:, None, None]
    low, high = 0.0, 14.0
    for _ in range(12):  # a mean depth that meets the budget
        mean = (low + high) / 2
        active = layers < _depths(np.random.default_rng(0), batch, model, mean)
        macs = float(np.mean(jax.device_get(flops.image_macs(model, active))))
        ratio = macs / flops.static_macs(model)
        low, high = (low, mean) if ratio > budget else (mean, high)
    assert ratio == pytest.approx(budget, abs=0.01)
    size = plan.chunk_size(batch)
    plan = plan.with_even_buckets(size)
    chunks = [active[:, start : start + size] for start in range(0, batch, size)]
    assert macs * batch / sum(_padded_by_hand(model, chunk, plan) for chunk in chunks) >= bound


def test_one_program_a_batch_size() -> None:
    model = _model()
    variables = _variables(model)

    @functools.partial(chex.assert_max_traces, n=2)
    def run(variables: Any, images: jax.Array) -> jax.Array:
        return adaptive.apply(model, variables, images, plan=_PLAN)[0]

    outer = jax.jit(jax.jit(run))
    for seed, beta in enumerate((-1.0, -30.0, 10.0)):
        for batch in (3, 9):
            outer(
                variables | {"params": _variables(model, beta=beta)["params"]},
                _images(model, batch, seed),
            ).block_until_ready()


@pytest.mark.parametrize("plan", _PLANS)
def test_each_device_its_own_images(plan: Plan) -> None:
    model = _model(distilled=True)
    devices = jax.local_device_count()
    variables, images = _variables(model), _images(model, 3 * devices)
    run = jax.pmap(functools.partial(adaptive.apply, model, plan=plan), in_axes=(None, 0))
    logits, aux = jax.device_get(run(variables, images.reshape(devices, 3, *images.shape[1:])))
    expected, masked = _masked(model)(variables, images)
    np.testing.assert_allclose(logits.reshape(len(images), -1), expected, rtol=0, atol=1e-5)
    computing = flops.is_computed(masked.active, 2)
    np.testing.assert_array_equal(aux.depth.reshape(len(images), -1), computing.sum(axis=0))


def test_shards_of_one_program() -> None:
    model = _model()
    variables, images = _variables(model), _images(model, 6)
    mesh = jax.make_mesh(
        (2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    shards = jax.sharding.PartitionSpec("batch")
    removed = functools.partial(adaptive.apply, model, plan=_PLAN)
    run = jax.shard_map(
        lambda *x: removed(*x)[0],
        mesh=mesh,
        in_specs=(None, shards),
        out_specs=shards,
        check_vma=False,
    )
    np.testing.assert_allclose(
        jax.jit(run)(variables, images), _masked(model)(variables, images)[0], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("plan", _PLANS)
@pytest.mark.parametrize("batch", [5, "b"])
def test_export(batch: int | str, plan: Plan) -> None:
    model = _model()
    variables = _variables(model)
    size = export.symbolic_shape(batch)[0] if isinstance(batch, str) else batch
    spec = jax.ShapeDtypeStruct((size, *model.pixels, model.channels), jnp.float32)
    run = jax.jit(functools.partial(adaptive.apply, model, variables, plan=plan))
    program = export.export(
        jax.jit(lambda images: run(images)[0]), platforms=("cpu", "cuda", "tpu")
    )(spec)
    for count in (5,) if batch == 5 else (1, 8, 21):
        images = _images(model, count)
        expected = _masked(model)(variables, images)[0]
        np.testing.assert_allclose(program.call(images), expected, rtol=0, atol=1e-5)


def test_masked_export_with_a_symbolic_batch() -> None:
    model = _model(halting=_gate(2.0))
    variables = _variables(model)
    spec = jax.ShapeDtypeStruct(
        (*export.symbolic_shape("b"), *model.pixels, model.channels), jnp.float32
    )
    program = export.export(jax.jit(lambda images: model.apply(variables, images)[0]))(spec)
    images = _images(model, 3)
    np.testing.assert_allclose(
        program.call(images), _masked(model)(variables, images)[0], rtol=0, atol=1e-5
    )


def test_mistakes_are_value_errors() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"no halting.*model\.apply"):
        adaptive.apply(_model(halting=None), _variables(model), _images(model, 2))
    for shape in ((32, 40, 3), (3, 40, 32, 3)):
        with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
            adaptive.apply(model, _variables(model), np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="images must be"):
        adaptive.apply(model, _variables(model), np.zeros((2, 32, 40, 2), np.float32))
    with pytest.raises(ValueError, match="at least one"):
        adaptive.apply(model, _variables(model), _images(model, 0))


def test_autotune_measures_once_and_remembers(tmp_path, monkeypatch, caplog) -> None:
    model = _model(image_size=16, depth=2)
    variables, images = _variables(model), jnp.asarray(_images(model, 4))
    cache = tmp_path / "new" / "plans.json"
    with caplog.at_level(logging.INFO, "avit_jax"):
        plan = autotune.autotune(model, variables, images, cache=cache)
    assert "fastest" in caplog.text
    assert list(json.loads(cache.read_text()).values()) == [dataclasses.asdict(plan)]
    with monkeypatch.context() as patch:
        patch.setattr(adaptive, "apply", None)  # not measured again
        assert autotune.autotune(model, variables, images, cache=cache) == plan
        with pytest.raises(TypeError):
            autotune.autotune(model, variables, images[:3], cache=cache)  # another question
        patch.setattr(jax, "local_device_count", lambda: 2)
        with pytest.raises(TypeError):
            autotune.autotune(
                model, variables, images, cache=cache
            )  # the cores are shared out otherwise
    with monkeypatch.context() as patch:
        patch.setattr(adaptive, "apply", None)
        patch.setattr(os, "sched_getaffinity", lambda _: range(64 * jax.local_device_count()))
        assert adaptive.cores_per_device() == 64 and adaptive.default_plan(4).bucket == 2
        with pytest.raises(TypeError):
            autotune.autotune(
                model, variables, images, cache=cache
            )  # another machine, or more of it
        patch.setattr(os, "sched_getaffinity", lambda _: {3})
        assert adaptive.cores_per_device() == 1 and adaptive.default_plan(4).bucket == 1
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "avit_jax"):
        autotune.autotune(model, variables, images, cache=tmp_path / "file" / "plans.json")
    assert "is not stored" in caplog.text
    for spoilt in (
        "{",
        "[1]",
        json.dumps({key: {"bucket": "x"} for key in json.loads(cache.read_text())}),
    ):
        cache.write_text(spoilt)
        assert isinstance(autotune.autotune(model, variables, images, cache=cache), Plan)
        assert len(json.loads(cache.read_text())) == 1
