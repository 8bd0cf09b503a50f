"""Packed execution, compiled for an NVIDIA H100 on a machine that has none."""

import importlib.util
import pathlib
import sys

import jax
import pytest

from avit_jax.models import flops, vit
from avit_jax.utils import errors

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.aot import compile as aot
from experiments.aot import dump, gpu, hlo, rows

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the compiler for NVIDIA GPUs is not installed: pip install '.[gpu_compiler]'",
)


@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("model", "static"), [("deit_tiny", 700), ("deit_small", 1405)])
def test_what_packed_execution_moves_on_a_gpu(model: str, static: float) -> None:
    # Megabytes that a layer of the static network moves: experiments/aot/result.json.
    jax.config.update("jax_disable_most_optimizations", False)  # else the PTX is another one
    row = rows.compile_one("packed", model, "bfloat16", gpu.NAME)
    assert row["fits"] and row["batch"] == 256
    assert row["layer_mb"] < 0.4 * static
    assert row["layer_mb_at_0.62"] < 0.67 * row["layer_mb"]
    assert row["program_mb_at_0.62"] < 0.70 * row["program_mb"]
    assert row["layer_mb_at_0.4"] < row["layer_mb_at_0.62"]
    assert row["layer_kernels"] < 24 and row["layer_casts"] == row["layer_branches"] == 0
    assert row["host_conditionals"] == row["host_loops"] == 0
    assert row["compile_seconds"] < 30
    if dump.ptxas():
        assert 100 < row["most_registers"] <= 255 and row["spill_bytes"] == 0


def test_packed_execution_has_no_kernels_for_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "devices", lambda topology: [None])
    monkeypatch.setattr(aot.jax.sharding, "SingleDeviceSharding", lambda device: None)
    with pytest.raises(errors.UserError, match="has kernels for h100 only"):
        rows.compile_one("packed", "deit_tiny", "bfloat16", "v5e:2x2")


@pytest.mark.parametrize("ratio", [1.0, 0.62, 0.4])
def test_the_rows_at_a_macs_ratio(ratio: float) -> None:
    model = vit.deit_tiny()
    found = gpu.rows_at(model, 256, ratio)
    assert found.buffer == 256 * 197 and found.layers == 12
    tokens = found.computed / 256
    macs = flops.fixed_macs(model) + 12 * float(flops.layer_macs(tokens, model, True))
    # At most a block of 64 rows more.
    assert ratio * 0.999 < macs / flops.static_macs(model) < ratio * 1.01
    assert found.computed % 64 == 0


_PROGRAM = """HloModule program

ENTRY %main (x: bf16[128,8]) -> bf16[128,8] {
  %first = s32[5]{0} parameter(0)
  %x = bf16[128,8]{1,0} parameter(1)
  %w = bf16[3,8,16]{2,1,0} parameter(2)
  %b = f32[3]{0} parameter(3)
  %a = (bf16[128,16]{1,0}, bf16[128,8]{1,0}) custom-call(%first, %x, %w, /*index=3*/%b), TARGET
  %y = bf16[128,8]{1,0} get-tuple-element(%a), index=1
  ROOT %z = bf16[128,8]{1,0} negate(%y)
}
"""


def test_kernels_count_by_the_rows_that_they_compute() -> None:
    text = _PROGRAM.replace("TARGET", 'custom_call_target="__gpu$xla.gpu.triton"')
    rest, negate = 5 * 4 + 8 * 16 * 2 + 3 * 4, 2 * 128 * 8 * 2
    for computed in (128, 64, 0):
        program = hlo.Program(text, hlo.Rows(buffer=128, computed=computed, layers=3))
        kernel = rest + computed * (8 + 16 + 8) * 2
        assert program.total() == hlo.Count(kernel + negate, 2)
    full = 128 * (8 + 16 + 8) * 2 + 5 * 4 + 3 * 8 * 16 * 2 + 3 * 4
    assert hlo.Program(text).total() == hlo.Count(full + negate, 2)
    other = _PROGRAM.replace("TARGET", 'custom_call_target="other"')
    assert hlo.Program(other, hlo.Rows(128, 64, 3)).total() == hlo.Count(full + negate, 2)
