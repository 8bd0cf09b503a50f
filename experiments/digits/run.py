"""Trains configs/digits.py with and without halting, for three seeds, and gathers the summaries.

python -m experiments.digits.run --out=experiments/digits

Runs that have a summary already are not run again; delete --runs to start over. train_seconds is of
runs side by side.
"""

import json
import pathlib
import subprocess
import sys
from concurrent import futures

import numpy as np
from absl import app, flags

from avit_jax.utils import errors
from experiments import results, timing

_RUNS = flags.DEFINE_string("runs", "runs/digits_study", "folder of the runs")
_OUT = flags.DEFINE_string("out", None, "folder for result.json", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds")
_PARALLEL = flags.DEFINE_integer("parallel", 2, "runs at a time")
_KEYS = ("top1", "macs_ratio", "mean_depth", "train_seconds")


def train(name: str, seed: int) -> dict[str, float]:
    """Trains one network unless that is done, and returns its summary."""
    workdir = pathlib.Path(_RUNS.value) / f"{name}_{seed}"
    if not (workdir / "summary.json").exists():
        command = [
            sys.executable,
            "-m",
            "avit_jax.main",
            "--config=configs/digits.py",
            f"--workdir={workdir}",
        ]
        command += [f"--config.seed={seed}", f"--config.halting.enabled={name == 'halting'}"]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads((workdir / "summary.json").read_text())


def main(_: list[str]) -> None:
    """Trains, gathers and writes."""
    jobs = [(name, seed) for seed in range(_SEEDS.value) for name in ("halting", "static")]
    with futures.ThreadPoolExecutor(_PARALLEL.value) as pool:
        summaries = list(pool.map(lambda job: train(*job), jobs))
    result: dict[str, object] = timing.environment()
    for name in ("halting", "static"):
        rows = [summary for job, summary in zip(jobs, summaries, strict=True) if job[0] == name]
        result[name] = {
            key: {
                "mean": float(np.mean([row[key] for row in rows])),
                "std": float(np.std([row[key] for row in rows], ddof=1)),
                "runs": [row[key] for row in rows],
            }
            for key in _KEYS
        }
        results.save(pathlib.Path(_OUT.value) / "result.json", result)

    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
