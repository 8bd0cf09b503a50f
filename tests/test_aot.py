"""Programs for Cloud TPUs, compiled on a machine that has none."""

import importlib.util
import os
import pathlib
import sys

import fixtures
import pytest

from avit_jax import build, errors, flops

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from experiments.aot import compile as aot
from experiments.aot import rows

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1"])
def test_the_training_step_compiles(topology: str) -> None:
    config = fixtures.small_config(**{"model.dtype": "bfloat16"})
    row = aot.compile_training(config, topology)
    assert row["fits"] and row["temporary_mib"] > 0 and row["argument_mib"] > 0.01
    assert row["shared_mib"] > 0.9 * (row["output_mib"] - 0.1)  # the state is donated
    images, peak = {"v5e:2x2": (4, 197e12), "v4:2x2x1": (2, 275e12 / 2)}[topology]  # of each device; a core of v4 is one here
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


@pytest.mark.parametrize("mib_at_64", [40.0, 100.0, 300.0])  # its prediction is too low, right, too high
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
    monkeypatch.setattr(aot, "compile_training", lambda config, topology: {"fits": False, "memory_gib": 16.0})
    assert rows.largest("deit_base", "v5e:2x2", remat=False) == {"largest_batch": 0}


def test_the_table() -> None:
    row = {"jax": "0.10.2", "batch": 8, "fits": True, "compile_seconds": 12.345, "memory_gib": 16, "roofline_ms": 0.1234567}
    text = rows.table({"inference, a": row, "b": {"largest_batch": 128}, "inference, c": {"batch": 8, "fits": False}})
    assert "| inference, a | 8 | yes | 12.35 |" in text and "| 0.1235 |" in text
    assert "Compiled with JAX 0.10.2." in text
    assert "| inference, c | 8 | no |" in text and "| b | 128 |" in text
