"""`adaptive.apply` with the TPU kernel: who uses it, and what becomes of chunks and padding."""

import functools
import types
from collections.abc import Callable
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from avit_jax.core import halting
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive, autotune, export
from avit_jax.models import flops, vit

_PLAN = Plan(bucket=2, token_multiple=16, chunk=4, one_kernel=True)
_KERNEL = "tpu_custom_call"


def _model(**changes: Any) -> vit.AViT:
    gate = halting.HaltingConfig(gamma=2.0, beta=-1.0)
    sizes: Any = dict(image_size=48, patch_size=8, width=48, depth=3, num_heads=3, num_classes=7)
    return vit.AViT(**(sizes | {"halting": gate} | changes))


def _inputs(model: vit.AViT, count: int) -> tuple[Any, jax.Array]:
    images = jax.random.normal(jax.random.key(0), (count, *model.pixels, model.channels))
    return jax.jit(model.init)(jax.random.key(1), images[:1]), images


def _export(model: vit.AViT, plan: Plan, batch: Any, platform: str) -> Any:
    variables, _ = jax.eval_shape(functools.partial(_inputs, model, 1))
    images = jax.ShapeDtypeStruct((batch, *model.pixels, model.channels), jnp.float32)
    run = jax.jit(lambda variables, images: adaptive.apply(model, variables, images, plan=plan))
    return jax.export.export(run, platforms=[platform])(variables, images)


def test_the_kernel_runs_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_tpu(*args: Any, tpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
        return tpu(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    model = _model()
    variables, images = _inputs(model, 7)  # chunks of four; the second overlaps the first
    expected, aux = golden.forward(model)(variables, images)
    with pltpu.force_tpu_interpret_mode():
        run = jax.jit(functools.partial(adaptive.apply, model, plan=_PLAN))
        logits, got = run(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    computed = np.asarray(flops.is_computed(jnp.asarray(aux.active), 1))
    np.testing.assert_array_equal(got.active, computed)
    padded = np.where(computed.any(axis=-1), 0, -100) + 1 + computed[..., 1:].sum(axis=-1)
    padded = np.maximum(-(-padded // 16) * 16, 0)  # to a multiple of 16; nothing of finished images
    macs = flops.fixed_macs(model) + flops.layer_macs(padded.astype(float), model).sum(axis=0)
    np.testing.assert_allclose(got.macs_padded, macs, rtol=1e-6)
    assert len(np.unique(padded)) > 2


def test_only_a_tpu_leaves_the_buckets() -> None:
    """With the same plan, for any batch in an exported program."""
    model = _model()
    exported = _export(model, _PLAN, jax.export.symbolic_shape("b")[0], "tpu")
    assert _KERNEL in exported.mlir_module()
    variables, images = _inputs(model, 5)
    buckets = Plan(bucket=2, token_multiple=16, chunk=4)
    (expected, aux), (logits, got) = (
        jax.jit(functools.partial(adaptive.apply, model, plan=plan))(variables, images)
        for plan in (buckets, _PLAN)
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.macs_padded, aux.macs_padded, rtol=1e-6)


@pytest.mark.parametrize("platforms", [("cpu", "tpu"), ("tpu",)])
def test_a_file_holds_the_kernel_only_if_it_is_for_tpus_alone(
    monkeypatch: pytest.MonkeyPatch, platforms: tuple[str, ...]
) -> None:
    monkeypatch.setattr(adaptive, "default_plan", lambda batch: _PLAN)
    model = _model()
    leaves, tree = jax.tree.flatten(_inputs(model, 1)[0]["params"])
    colors = [[0.5] * 3] * 2
    exported = export._program(leaves, tree, model, *colors, 0, platforms)
    assert (_KERNEL in exported.mlir_module()) == (len(platforms) == 1)


@pytest.mark.parametrize(
    "unsupported",
    [
        dict(plan=Plan(bucket=2, token_multiple=16)),
        dict(plan=Plan(bucket=2, token_multiple=8, one_kernel=True)),
        dict(halting=halting.HaltingConfig(merge=True)),
        dict(width=40, num_heads=2),
        dict(dtype=jnp.float16),
    ],
    ids=["off", "token multiple", "merging", "head width", "dtype"],
)
def test_a_tpu_keeps_the_buckets_without_the_kernel(unsupported: dict[str, Any]) -> None:
    plan = unsupported.get("plan", _PLAN)
    changes = {name: value for name, value in unsupported.items() if name != "plan"}
    assert _KERNEL not in _export(_model(**changes), plan, 4, "tpu").mlir_module()


@pytest.mark.parametrize(
    ("kind", "uses"), [("TPU v5 lite", True), ("TPU v6 lite", True), ("TPU v4", False)]
)
def test_the_default_on_tpus(monkeypatch: pytest.MonkeyPatch, kind: str, uses: bool) -> None:
    """Only chips for which the kernel was compiled."""
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    plan = adaptive.default_plan(64, "tpu")
    assert plan.one_kernel is uses and plan.token_multiple % 16 == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    default, plans = autotune._candidates(64, can_pack=False)
    assert default in plans and len(plans) == 6 + uses
    assert sum(plan.one_kernel for plan in plans) == uses
    assert not adaptive.default_plan(64, "gpu").one_kernel
