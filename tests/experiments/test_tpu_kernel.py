"""The TPU kernel compiled for chips that are not here, and what its bundles say."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest

import avit_jax
from avit_jax.models import flops, one_kernel

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.tpu_kernel import bundles
from experiments.tpu_kernel import estimate as estimate_lib

ROOT = pathlib.Path(__file__).parents[2]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "name", "least"),
    [
        ("v5e", "deit_tiny", 0.85),
        ("v5e", "deit_small", 0.85),
        ("v6e", "deit_tiny", 0.8),
        ("v6e", "deit_small", 0.8),
    ],
)
def test_halting_pays_by_bundles(
    tmp_path: pathlib.Path, chip: str, name: str, least: float
) -> None:
    command = [sys.executable, "-m", "experiments.tpu_kernel.run", f"--out={tmp_path}/result.json"]
    subprocess.run(
        [*command, f"--chips={chip}", f"--models={name}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        check=True,
    )
    row = json.loads((tmp_path / "result.json").read_text())[f"{name}, {chip}"]
    by_ratio = row["by_macs_ratio"]
    assert by_ratio["0.62"]["share_of_ideal"] >= least
    assert 0.58 < by_ratio["0.62"]["macs_ratio"] < 0.67
    assert by_ratio["1.0"]["speed_up"] >= 0.95 and by_ratio["1.0"]["macs_ratio"] == 1.0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "name", "changes"),
    [
        ("v5e", "deit_small", dict(dtype=None)),  # float32 weights, the largest
        ("v6e", "deit_small", dict(image_size=384, distilled=True)),
        ("v5e", "deit_tiny", dict(image_size=384, dtype=None)),
        ("v5e", "deit_tiny", dict(width=48, num_heads=3, distilled=True, mlp_ratio=1.5)),
        ("v6e", "deit_tiny", dict(width=128, num_heads=1, depth=30)),
    ],
)
def test_what_is_supported_compiles(chip: str, name: str, changes: dict[str, Any]) -> None:
    model = getattr(avit_jax, name)(**({"dtype": jnp.dtype("bfloat16")} | changes))
    # Few compiled numbers of tokens compile faster, and need as much memory.
    multiple = 112
    assert one_kernel.supports(model, model.dtype or jnp.float32, multiple)
    sizes = one_kernel.sizes(model, multiple)
    assert estimate_lib.compile_kernel(chip, model, sizes) > 0


_DUMP = """// control target key start
LB: loop body
     0   :  { %1 = smov 0 }
  0x1 LB: > { %2 = sst [smem:[#allocation1]] %1 }
  0x2   : > { %3 = sbr.rel (%p1) target = $region7 }
  0x3   :  {}
  0x4 LB: >> { %4 = vld [vmem:[#allocation2]] }
  0x5   : >> { %5 = vadd.f32 %4, %4 }
  0x6   : >> { %6 = sbr.rel (%p2) target = $region8 }
  0x7   :  {} /* End region 81 */
  0x8   : >> { %7 = vld [vmem:[#allocation3]] }
  0x9   : >> { %8 = vadd.f32 %7, %7 }
  0xa   : >> { %9 = vadd.f32 %8, %7 }
  0xb PF: >> { %10 = sbr.rel (!%p3) target = $region9 }
  0xc   : > { %11 = smov 0 }
  0xd LB: >> { %12 = vld [vmem:[#allocation2]] }
  0xe   : >> { %13 = sbr.rel (!%p3) target = $region9 }
  0xf   : > { %14 = smov 0 }
  0x10   :  { %15 = sbr.rel (%p37) target = $region3 }
"""


def test_bundles_are_counted() -> None:
    loops, outside = bundles.read(_DUMP)
    # The empty bundle after a branch belongs to what it skips.
    assert loops == [bundles.Loop(layer=4, move=4), bundles.Loop(layer=2, move=0)]
    assert outside == 5


def test_the_estimate() -> None:
    model = avit_jax.deit_tiny(depth=3)
    kernel = bundles.Kernel(
        loops={
            32: bundles.Loop(layer=10, move=0),
            64: bundles.Loop(layer=25, move=3),
            208: bundles.Loop(layer=70, move=7),
        },
        outside=5,
    )
    images = {(197, 197, 20): 5 + 70 + 70 + 7 + 10, (197, 33, 32): 5 + 70 + 7 + 25 + 3 + 10}
    images |= {(197, 0, 0): 5 + 70}
    for counts, expected in images.items():
        assert kernel.image(counts) == expected
    found = estimate_lib.estimate(kernel, 200, [list(counts) for counts in images], model)
    macs = [sum(flops.layer_macs(n, model) for n in counts) for counts in images]
    ratio = sum(macs) / (9 * flops.layer_macs(197, model))
    assert found["macs_ratio"] == pytest.approx(ratio)
    assert found["speed_up"] == pytest.approx(600 / sum(images.values()))
    assert found["share_of_ideal"] == pytest.approx(ratio * 600 / sum(images.values()))


def test_a_dump_that_does_not_fit_is_refused() -> None:
    sizes = one_kernel.sizes(avit_jax.deit_tiny(), 112)
    assert sizes.token_counts() == (112, 208)
    assert bundles.kernel(_DUMP, sizes).loops[112] == bundles.Loop(layer=2, move=0)
    with pytest.raises(ValueError, match="expected 3 loops"):
        bundles.kernel(_DUMP, dataclasses.replace(sizes, token_multiple=80))
