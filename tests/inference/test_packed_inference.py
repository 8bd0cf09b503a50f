"""Packed execution against masking: the same logits and decisions, and when it applies."""

import dataclasses
import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from avit_jax.core import halting
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive, autotune, padding
from avit_jax.kernels import packed as kernels
from avit_jax.models import executors, flops, vit

_PLAN = Plan(bucket=3, token_multiple=8, chunk=4, packed=True)
_LEARNABLE = halting.HaltingConfig(learnable=True)


def _model(**changes: Any) -> vit.AViT:
    sizes = dict(
        image_size=(40, 32), patch_size=8, channels=2, width=64, depth=4, num_heads=4, num_classes=7
    )
    return vit.AViT(**(sizes | dict(halting=_LEARNABLE) | changes))


def _images(model: vit.AViT, count: int) -> np.ndarray:
    shape = (count, *model.pixels, model.channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _variables(model: vit.AViT, gamma: float = 3.0, beta: float = -1.0) -> dict[str, Any]:
    params = jax.jit(model.init)(jax.random.key(1), _images(model, 1))["params"]
    gate = {"gamma": jnp.float32(gamma), "beta": jnp.float32(beta)}
    return {"params": params | ({"gate": gate} if model.halting == _LEARNABLE else {})}


def _run(model: vit.AViT, variables: Any, images: Any, plan: Plan = _PLAN) -> Any:
    return jax.jit(functools.partial(adaptive.apply, model, plan=plan))(variables, images)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of tokens that were packed."""
    calls, run = [], executors.Packed.__call__

    def call(self: Any, layer: Any, params: Any, x: Any, *args: Any) -> Any:
        calls.append(x.rows.shape)
        return run(self, layer, params, x, *args)

    monkeypatch.setattr(executors.Packed, "__call__", call)
    return calls


@pytest.fixture
def in_float32(packs: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Packs float32 too: the twins, which run here, are exact in it."""
    supports = kernels.supports

    def without_dtype(params: Any, dtype: Any, num_heads: int, rows: int) -> bool:
        return dtype == jnp.float32 or supports(params, dtype, num_heads, rows)

    monkeypatch.setattr(kernels, "supports", without_dtype)
    return packs


def _check_same(model: vit.AViT, masked: Any, packed: Any) -> None:
    (expected, aux), (logits, got) = masked, packed
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    computing = flops.is_computed(aux.active, model.num_prefix_tokens)
    np.testing.assert_array_equal(got.active, computing)
    np.testing.assert_array_equal(got.depth, computing.sum(axis=0))
    np.testing.assert_allclose(got.macs, flops.image_macs(model, aux.active), rtol=1e-6)
    score = [np.where(computing, x.score, 0) for x in (aux, got)]
    np.testing.assert_allclose(score[1], score[0], rtol=0, atol=1e-4)
    assert (got.macs_padded >= got.macs).all()


@pytest.mark.parametrize("name", "ADF")
def test_golden_cases(in_float32: list[Any], name: str) -> None:
    case = golden.load(name)
    model, variables = case.model(), {"params": case.params()}
    logits, aux = _run(model, variables, case.images)
    _check_same(model, jax.jit(model.apply)(variables, case.images), (logits, aux))
    tolerance = 3e-5 if name == "F" else 1e-5
    np.testing.assert_allclose(logits, case.data["logits"], rtol=0, atol=tolerance)
    assert in_float32


@pytest.mark.parametrize("gate", [(3.0, -1.0), (1.0, -1e3), (1.0, 1e3), (20.0, -2.0)])
@pytest.mark.parametrize(("batch", "distilled"), [(1, False), (9, True)])
def test_any_gate_and_batch(
    in_float32: list[Any], gate: tuple[float, float], batch: int, distilled: bool
) -> None:
    """Nothing halts, all halts after a layer, or something between; the last chunk overlaps."""
    model = _model(distilled=distilled, num_classes=3)
    variables, images = _variables(model, *gate), _images(model, batch)
    _check_same(model, jax.jit(model.apply)(variables, images), _run(model, variables, images))
    assert set(in_float32) == {(kernels.num_rows(min(batch, 3) * model.num_tokens), 64)}


def test_the_kernels_run_a_network(in_float32: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In interpret mode, in which rows without a token are NaN."""
    model = _model(image_size=(24, 16), depth=3)
    variables, images = _variables(model), _images(model, 3)
    expected = jax.jit(model.apply)(variables, images)
    tiles = kernels.Tiles(rows=8, columns=64, queries=8, keys=8)
    monkeypatch.setattr(kernels, "TILES", tiles)
    monkeypatch.setattr(
        kernels, "layer", functools.partial(kernels.kernels, tiles=tiles, interpret=True)
    )
    _check_same(model, expected, _run(model, variables, images))
    assert in_float32


def test_half_precision_is_as_exact_as_masking(packs: list[Any]) -> None:
    exact = _model()
    model, images = exact.clone(dtype=jnp.bfloat16), _images(exact, 5)
    variables = _variables(exact, 1.0, -1e3)  # nothing halts, so decisions cannot differ
    expected = jax.jit(exact.apply)(variables, images)[0]
    masked = jax.jit(model.apply)(variables, images)[0].astype(jnp.float32)
    logits = _run(model, variables, images)[0]
    assert packs and logits.dtype == jnp.bfloat16
    error = np.abs(logits.astype(jnp.float32) - expected).max()
    assert error < 1.5 * np.abs(masked - expected).max()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": None},
        {"halting": halting.HaltingConfig(merge=True)},
        {"num_heads": 1, "width": 80},
    ],
)
def test_other_networks_use_buckets(packs: list[Any], changes: dict[str, Any]) -> None:
    model = _model(**({"dtype": jnp.bfloat16} | changes))
    variables, images = _variables(model), _images(model, 3)
    buckets = dataclasses.replace(_PLAN, packed=False)
    np.testing.assert_array_equal(
        _run(model, variables, images)[0], _run(model, variables, images, buckets)[0]
    )
    assert not packs


def test_other_gpus_use_buckets(packs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(dtype=jnp.bfloat16)
    variables, images = _variables(model), _images(model, 3)
    monkeypatch.setattr(kernels, "has_kernels", lambda: False)
    jax.eval_shape(functools.partial(adaptive.apply, model, plan=_PLAN), variables, images)
    assert not packs
    monkeypatch.setattr(kernels, "has_kernels", lambda: True)
    jax.eval_shape(functools.partial(adaptive.apply, model, plan=_PLAN), variables, images)
    assert packs


def test_the_default_is_buckets() -> None:
    for batch in (None, 1, 64, 1024):
        assert not any(adaptive.default_plan(batch, name).packed for name in ("cpu", "gpu", "tpu"))


def test_padded_macs_count_whole_blocks(in_float32: list[Any]) -> None:
    model = _model(depth=2)
    num = np.array([21, 3, 0])
    macs = padding.packed_macs(model, jnp.arange(21)[None, None] < num[None, :, None])
    linear, pairs = 12 * 64**2, 2 * 64
    blocks = np.array([64 * 64, 64 * 64, 0])
    expected = num / num.sum() * 64 * linear + blocks * pairs
    np.testing.assert_allclose(macs, expected, rtol=1e-6)
    variables, images = _variables(model), _images(model, 4)
    aux = _run(model, variables, images)[1]
    layers = padding.packed_macs(model, aux.active)
    np.testing.assert_allclose(aux.macs_padded, flops.fixed_macs(model) + layers, rtol=1e-5)


def test_a_symbolic_batch(packs: list[Any]) -> None:
    model = _model(dtype=jnp.bfloat16)
    variables = _variables(model)
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.pixels, 2), jnp.float32)
    run = jax.jit(functools.partial(adaptive.apply, model, variables, plan=_PLAN))
    exported = export.export(run)(images)
    for count in (1, 5):
        given = _images(model, count)
        np.testing.assert_allclose(
            exported.call(given)[0].astype(jnp.float32),
            _run(model, variables, given)[0].astype(jnp.float32),
            atol=0.1,  # a few roundings to bfloat16
        )
    assert packs


def test_autotune_tries_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = _model(dtype=jnp.bfloat16)
    variables, images = _variables(model), jnp.asarray(_images(model, 4))
    tried: list[Plan] = []

    def measure(model: vit.AViT, variables: Any, images: Any, plans: list[Plan]) -> list[float]:
        tried[:] = plans
        return [2.0 - plan.packed for plan in plans]

    monkeypatch.setattr(autotune, "_measure", measure)
    assert not autotune.autotune(model, variables, images, cache=tmp_path / "cpu").packed
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels, "has_kernels", lambda: True)
    assert autotune.autotune(model, variables, images, cache=tmp_path / "a").packed
    assert [plan.packed for plan in tried].count(True) == 1
    float32 = model.clone(dtype=None)
    assert not autotune.autotune(float32, variables, images, cache=tmp_path / "b").packed
