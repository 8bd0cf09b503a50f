"""The script for an accelerator, rehearsed on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.accelerators import bench, report

ROOT = pathlib.Path(__file__).parents[2]
SECTIONS = ("machine", "static", "removal", "removal_old_flags", "equality", "switch", "kernels")


def run(out: pathlib.Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    quickly = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable} | quickly | environment
    command = [ROOT / "experiments/accelerators/run.sh", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def rows(out: pathlib.Path, section: str) -> dict[str, dict]:
    return {
        row.get("name", ""): row
        for row in map(json.loads, (out / f"{section}.jsonl").read_text().splitlines())
    }


@pytest.mark.slow
def test_a_rehearsal(tmp_path: pathlib.Path) -> None:
    done = run(
        tmp_path, "--tiny", AVIT_DATA_DIR="", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled")
    )
    assert done.returncode == 0, done.stderr
    found = {section: rows(tmp_path, section) for section in SECTIONS}
    assert {"versions", "copy", "product"} <= set(found["machine"])
    assert {"default flags", "old flags"} <= set(found["static"])
    for section in ("removal", "removal_old_flags"):
        for ratio in (1.0, 0.8, 0.62, 0.4):
            for kind in ("removed", "packed"):
                row = found[section][f"{kind} {ratio}"]
                assert row["macs_ratio"] == pytest.approx(ratio, abs=0.1) and row["efficiency"] > 0
        assert found[section]["masked"]["speed_up"] > 0
    assert found["equality"]["removed against masked"]["logit_difference"] < 1e-5
    assert found["equality"]["removed against masked"]["other_decisions"] == 0
    assert found["equality"]["packed against masked"]["logit_difference"] < 0.1
    kernels = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert len(kernels) == 3 * (3 + 3 + 4) and all("microseconds" in row for row in kernels)
    assert "microseconds_added" in found["switch"]["with a switch"]
    assert all(f"== {section}" in done.stdout for section in SECTIONS)
    assert (tmp_path / "table.txt").read_text() in done.stdout


@pytest.mark.slow
def test_a_section_that_fails_is_reported_and_the_rest_runs(tmp_path: pathlib.Path) -> None:
    python = tmp_path / "python"  # the sections end with status 7, but for one
    works = "*section=machine*|*report*|-c*"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in {works}) exec {sys.executable} "$@";; *) exit 7;; esac\n'
    )
    python.chmod(0o755)
    done = run(tmp_path / "out", "--tiny", PYTHON=str(python))
    assert done.returncode == 1
    assert "product" in rows(tmp_path / "out", "machine")
    assert "failed: : status 7" in done.stdout
    assert all((tmp_path / "out" / f"{section}.jsonl").exists() for section in SECTIONS)


def test_no_packages_and_no_pip_are_one_line(tmp_path: pathlib.Path) -> None:
    done = run(tmp_path, PYTHON="/bin/false")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: packages are missing") and done.stderr.count("\n") == 1


def test_a_program_that_fails_is_a_row(tmp_path: pathlib.Path) -> None:
    write = bench.Rows(tmp_path / "static.jsonl")

    def fail() -> None:
        raise RuntimeError("no such kernel\nand more")

    made = write.build({"broken": fail, "good": lambda: lambda: None}, batch=2)
    assert list(made) == ["good"]
    assert rows(tmp_path, "static") == {
        "broken": {
            "section": "static",
            "batch": 2,
            "name": "broken",
            "error": "RuntimeError: no such kernel",
        }
    }


def test_every_configuration_has_its_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVIT_DATA_DIR", raising=False)
    stored = json.loads(bench.SHIFTS.read_text())
    for sizes in (bench.FULL, bench.TINY):
        for name in {name for name, _ in (*sizes.removal, *sizes.equality)}:
            assert list(bench.shifts(name)) == [1.0, 0.8, 0.62, 0.4]
            assert all(
                set(stored[where][name]) == {"0.8", "0.62", "0.4"}
                for where in ("digits", "ImageNet sample")
            )


def test_the_report_aligns_rows_and_names_what_failed(tmp_path: pathlib.Path) -> None:
    write = bench.Rows(tmp_path / "static.jsonl")
    write(name="default flags", batch=256, images_per_second=12345.6)
    write(name="torch", batch=256, error="not installed")
    assert report.report(tmp_path).splitlines() == [
        "== static",
        "         name  batch  images_per_second",
        "default flags    256              12346",
        "failed: torch 256: not installed",
    ]
    assert report.report(tmp_path / "empty") == ""
