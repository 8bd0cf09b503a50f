"""Programs for Cloud TPUs and an NVIDIA GPU, compiled on a machine that has none."""

import importlib.util
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import fixtures
import jax
import numpy as np
import pytest

from avit_jax.models import flops, vit
from avit_jax.training import build
from avit_jax.utils import errors

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.aot import compile as aot
from experiments.aot import dump, gpu, hlo, rows

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the compiler for NVIDIA GPUs is not installed: pip install '.[gpu_compiler]'",
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1"])
def test_the_training_step_compiles(topology: str) -> None:
    config = fixtures.small_config(**{"model.dtype": "bfloat16"})
    row = aot.compile_training(config, topology)
    assert row["fits"] and row["temporary_mib"] > 0 and row["argument_mib"] > 0.01
    assert row["shared_mib"] > 0.9 * (row["output_mib"] - 0.1)  # the state is donated
    images, peak = {"v5e:2x2": (4, 197e12), "v4:2x2x1": (2, 275e12 / 2)}[
        topology
    ]  # of each device; a core of v4 is one here
    macs = 3 * flops.static_macs(build.model(config)) * images
    assert row["roofline_ms"] == pytest.approx(2e3 * macs / peak)


@needs_libtpu
@pytest.mark.slow
def test_adaptive_inference_compiles() -> None:
    config = fixtures.small_config(**{"model.dtype": "bfloat16", "eval.batch_size": 8})
    row = aot.compile_inference(config, "v5e:2x2")
    assert row["fits"] and row["shared_mib"] == 0
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"


@needs_libtpu
def test_an_unknown_topology_is_a_sentence() -> None:
    with pytest.raises(errors.UserError, match="there is no topology v9:2x2"):
        aot.devices("v9:2x2")


@pytest.mark.parametrize(
    "mib_at_64", [40.0, 100.0, 300.0]
)  # its prediction is too low, right, too high
def test_the_largest_batch_is_searched(monkeypatch: pytest.MonkeyPatch, mib_at_64: float) -> None:
    monkeypatch.setattr(aot, "devices", lambda topology: [None] * 4)
    asked = []

    def compile_training(config, topology) -> dict[str, object]:
        asked.append((config.train.batch_size // 4, config.model.dtype))
        fits = config.train.batch_size <= 4 * (1024 if config.model.remat else 512)
        return {"fits": fits, "memory_gib": 1.0, "argument_mib": 24.0, "temporary_mib": mib_at_64}

    monkeypatch.setattr(aot, "compile_training", compile_training)
    assert rows.largest("deit_tiny", "v5e:2x2", remat=False) == {"largest_batch": 512}
    assert asked[0] == (64, "bfloat16") and len(asked) <= 5
    assert rows.largest("deit_tiny", "v5e:2x2", remat=True) == {"largest_batch": 1024}


def test_where_nothing_fits_the_largest_batch_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "devices", lambda topology: [None] * 4)
    monkeypatch.setattr(
        aot, "compile_training", lambda config, topology: {"fits": False, "memory_gib": 16.0}
    )
    assert rows.largest("deit_base", "v5e:2x2", remat=False) == {"largest_batch": 0}


def test_the_table() -> None:
    row = {
        "jax": "0.10.2",
        "batch": 8,
        "fits": True,
        "compile_seconds": 12.345,
        "memory_gib": 16,
        "roofline_ms": 0.1234567,
    }
    text = rows.table(
        {
            "inference, a": row,
            "b": {"largest_batch": 128},
            "inference, c": {"batch": 8, "fits": False},
        }
    )
    assert "| inference, a | 8 | yes | 12.35 |" in text and "| 0.1235 |" in text
    assert "Compiled with JAX 0.10.2." in text
    assert "| inference, c | 8 | no |" in text and "| b | 128 |" in text
    assert "layer MB" not in text and "estimated" not in text
    counted = rows.table(
        {"static, a": row | {"layer_mb": 700.01, "spill_bytes": 0}, "static, b": row}
    )
    assert (
        "| layer MB |" in counted
        and "| static, a | 8 | 700 |" in counted
        and "| static, b | 8 | yes |" in counted
    )
    assert "static, b" not in counted[counted.index("layer MB") :]


@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "model", "most"),
    [
        ("static", "deit_tiny", 710),
        ("static", "deit_small", 1420),
        ("static tanh", "deit_tiny", 650),
        ("static tanh", "deit_small", 1320),
        ("masked", "deit_tiny", 800),
    ],
)
def test_what_a_layer_moves_on_a_gpu(program: str, model: str, most: float) -> None:
    row = rows.compile_one(program, model, "bfloat16", gpu.NAME)
    assert row["fits"] and row["batch"] == 256
    assert row["layer_mb"] < most and row["layer_mb"] * 12 < row["program_mb"]
    assert row["layer_casts"] == row["layer_branches"] == 0 and row["layer_kernels"] < 36
    assert row["host_conditionals"] == row["host_loops"] == 0
    if dump.ptxas():
        assert 200 < row["most_registers"] <= 255 and row["spill_bytes"] == 0  # of the norms


@needs_gpu_compiler
@pytest.mark.slow
def test_the_conditional_of_removal_stays_on_the_gpu() -> None:
    row = rows.compile_one("inference", "deit_tiny", "bfloat16", gpu.NAME)
    assert row["layer_branches"] == 1 and row["host_conditionals"] == row["host_loops"] == 0


@needs_gpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("program", "before"), [("static training", 92_306), ("training", 93_135)])
def test_what_a_training_step_moves_on_a_gpu(program: str, before: float) -> None:
    # Megabytes before attention was fused, at commit cade6683.
    row = rows.compile_one(program, "deit_tiny", "bfloat16", gpu.NAME)
    assert row["fits"] and row["batch"] == 256
    assert row["program_mb"] < 0.65 * before and row["layer_mb"] * 12 < row["program_mb"]
    assert row["layer_casts"] == row["layer_branches"] == row["host_conditionals"] == 0


@needs_gpu_compiler
def test_where_a_conditional_goes_through_the_host() -> None:
    here = jax.sharding.SingleDeviceSharding(gpu.devices()[0])
    x = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=here)

    def double_or_not(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 1, lambda x: x @ x, lambda x: x, x)

    def count(function: Callable[[jax.Array], jax.Array]) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            compiled = (
                jax.jit(function)
                .lower(x)
                .compile(compiler_options=gpu.OPTIONS | dump.options(folder))
            )
            return gpu.count(compiled, vit.AViT(depth=12), folder)

    # XLA makes no command buffer of less than five thunks.
    assert count(double_or_not)["host_conditionals"] == 1
    assert count(lambda x: double_or_not(x @ x @ x @ x @ x))["host_conditionals"] == 0
    unknown = count(lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x))
    assert (unknown["host_loops"], unknown["host_conditionals"]) == (1, 0)
    assert count(lambda x: jax.lax.fori_loop(0, 12, lambda i, x: x @ x, x))["host_loops"] == 0


def test_the_compiler_for_gpus_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match="gpu_compiler"):
        aot.devices(gpu.NAME)


_PROGRAM = """HloModule program

%fused_cast (param_0: f32[3,8,8], param_1: s32[]) -> bf16[8,8] {
  %param_0 = f32[3,8,8]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%param_0, %param_1, %param_1, %param_1), dynamic_slice_sizes={1,8,8}
  %bitcast = f32[8,8]{1,0} bitcast(%slice)
  ROOT %convert = bf16[8,8]{1,0} convert(%bitcast)
}

%fused_put (param_0.1: bf16[3,8], param_1.1: bf16[1,8], param_2: s32[]) -> bf16[3,8] {
  %param_0.1 = bf16[3,8]{1,0} parameter(0)
  %param_1.1 = bf16[1,8]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %put = bf16[3,8]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %param_2)
}

%branch_a (a: bf16[1,8]) -> bf16[1,8] {
  ROOT %a = bf16[1,8]{1,0} parameter(0)
}

%branch_b (b: bf16[1,8]) -> bf16[1,8] {
  %b = bf16[1,8]{1,0} parameter(0)
  ROOT %negate = bf16[1,8]{1,0} negate(%b)
}

%body (carry: (s32[], bf16[3,8], f32[3,8,8])) -> (s32[], bf16[3,8], f32[3,8,8]) {
  %carry = (s32[], bf16[3,8]{1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %y = bf16[3,8]{1,0} get-tuple-element(%carry), index=1
  %w = f32[3,8,8]{2,1,0} get-tuple-element(%carry), index=2
  %cast = bf16[8,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_cast
  %product = (bf16[1,8]{1,0}, s8[1024]{0}) custom-call(%cast, %cast), custom_call_target="__cublas$gemm"
  %x = bf16[1,8]{1,0} get-tuple-element(%product), index=0
  %chosen = bf16[1,8]{1,0} conditional(%i, %x, %x), branch_computations={%branch_a, %branch_b}
  %new = bf16[3,8]{1,0} fusion(%y, %chosen, %i), kind=kLoop, calls=%fused_put
  ROOT %out = (s32[], bf16[3,8]{1,0}, f32[3,8,8]{2,1,0}) tuple(%i, %new, %w)
}

ENTRY %main (w.1: f32[3,8,8]) -> bf16[3,8] {
  %w.1 = f32[3,8,8]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = bf16[3,8]{1,0} broadcast(%zero), dimensions={}
  %all = (s32[], bf16[3,8]{1,0}, f32[3,8,8]{2,1,0}) tuple(%zero, %start, %w.1)
  %while = (s32[], bf16[3,8]{1,0}, f32[3,8,8]{2,1,0}) while(%all), condition=%none, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %result = bf16[3,8]{1,0} get-tuple-element(%while), index=1
}
"""


_THUNKS = """000: kCommandBuffer [source       | next=001 (1)]
    001: kCublasLtMatmul [source | sink] kCublasLtMatmul
    002: kConditional [source | sink]
      true_branch:
        003: kWhile [source | sink]
condition:
            004: kCustomKernel [source | sink] compare
          body:
            005: kCustomKernel [source | sink] add
006: kWhile [prev=000 (1) | sink]
condition:
    007: kCustomKernel [source | sink] compare
  body:
    008: kConditional [source | sink]
      true_branch:
        009: kCopy [source | sink] kCopy
"""
_NAMES = """thunk_metadata {
  thunk_info {
    profile_annotation: "while.5"
    thunk_id: 6
  }
  thunk_kind: "kWhile"
}
"""


def test_what_the_host_launches_is_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has no list of thunks"):
        dump.thunks(str(tmp_path))
    (tmp_path / "a.thunk_sequence.txt").write_text("000: kCopy [source | sink] kCopy\n")
    (tmp_path / "a.thunk_metadata.txt").write_text(_NAMES)
    assert [thunk.kind for thunk in dump.thunks(str(tmp_path))] == ["kCopy"]
    (tmp_path / "a.thunk_sequence_after_thunk_passes.txt").write_text(_THUNKS)
    thunks = dump.thunks(str(tmp_path))
    assert [thunk.kind for thunk in thunks if not thunk.is_buffered] == [
        "kCommandBuffer",
        "kWhile",
        "kCustomKernel",
        "kConditional",
        "kCopy",
    ]
    assert [thunk.name for thunk in thunks if thunk.kind == "kWhile"] == ["", "while.5"]


def test_what_ptxas_says_is_read() -> None:
    log = "ptxas info    : 0 bytes gmem\n"
    for name, spilled, registers in (("norm", 0, 32), ("large", 44, 255)):
        log += f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        log += (
            f"    0 bytes stack frame, {spilled} bytes spill stores, {2 * spilled} bytes spill "
            "loads\n"
        )
        log += f"ptxas info    : Used {registers} registers, used 1 barriers\n"
    assert dump.parse(log) == {"norm": dump.Kernel(32, 0), "large": dump.Kernel(255, 132)}


_TPU_PROGRAM = """HloModule program

%body (carry: (s32[])) -> (s32[]) {
  %carry = (s32[]) parameter(0)
  %a = f32[8] fusion(%carry), calls=%x, backend_config={"estimated_cycles":"100"}
}

%branch_a (a: f32[8]) -> f32[8] {
  %b = f32[8] copy(%a), backend_config={"estimated_cycles":"7"}
}

%branch_b (a: f32[8]) -> f32[8] {
  %c = f32[8] copy(%a), backend_config={"estimated_cycles":"5"}
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %d = f32[8] fusion(%w), calls=%y, backend_config={"estimated_cycles":"1"}
  %e = (s32[]) while(%d), condition=%none, body=%body
  %f = f32[8] conditional(%d), branch_computations={%branch_a, %branch_b}
}
"""


def test_the_cycles_that_a_compiler_estimates_are_added_up() -> None:
    assert hlo.Program(_TPU_PROGRAM).estimated_cycles(3) == 1 + 3 * 100 + 7


def test_what_is_counted_of_a_program() -> None:
    program = hlo.Program(_PROGRAM)
    cast = 256 + 4 + 128  # a slice of the parameter, the place, the result
    product, negate, put = (
        128 + 128 + 16,
        16 + 16,
        16 + 4 + 16,
    )  # without the workspace; without the rows that stay
    layer = hlo.Count(bytes=cast + product + negate + put, kernels=4, casts=1, branches=1)
    assert program.loops(3) == [layer] and program.loops(12) == []
    assert program.total() == hlo.Count(3 * layer.bytes + 48 + 4, 3 * 4 + 1, 3, 3)
