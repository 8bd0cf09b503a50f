"""Kills a digits run with SIGKILL at random moments, resumes it, and compares its end with that of
an undisturbed run.

python -m experiments.kill_resume.run --out=experiments/kill_resume/result.json

Each run is killed once, by turns at a moment drawn evenly over the time an undisturbed run takes,
and within a few milliseconds after a checkpoint, drawn at random too, has begun to be written. Then
the same command is started again and runs to its end. Parameters, their moving average, the
optimizer's state and `metrics.jsonl` have to be equal byte by byte.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags

from avit_jax.training import checkpoint
from avit_jax.utils import errors
from experiments import results

_KILLS = flags.DEFINE_integer("kills", 20, "runs that are killed")
_SEED = flags.DEFINE_integer("seed", 0, "of the moments")
_OVERRIDES = flags.DEFINE_multi_string(
    "override", [], "further options of each run, such as --config.train.steps=20"
)
_OUT = flags.DEFINE_string("out", None, "writes the result there, as JSON")

# A checkpoint holds rows that are not written yet, of another number each time: the log,
# evaluations and checkpoints have intervals without a common divisor.
_COMMAND = [
    *(
        sys.executable,
        "-m",
        "avit_jax.main",
        "--config=configs/digits.py",
        "--config.train.steps=120",
    ),
    *("--config.train.log_every=7", "--config.train.eval_every=50", "--config.train.save_every=3"),
]


def _start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    # Compiled programs are kept, or compiling would take most of the time; they are the same
    # programs.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*_COMMAND, *_OVERRIDES.value, f"--workdir={workdir}"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(run: subprocess.Popen) -> None:
    _, told = run.communicate()
    if run.returncode:
        sys.exit(f"a run has failed:\n{told}")


def _result(workdir: pathlib.Path) -> tuple[dict[str, bytes], bytes]:
    """Every array of the last checkpoint, and the metrics file."""
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.step()
    state = ocp.StandardCheckpointer().restore(workdir / f"checkpoints/{step}/state")
    arrays, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in arrays}, (
        workdir / "metrics.jsonl"
    ).read_bytes()


def _wait_for_writing(run: subprocess.Popen, workdir: pathlib.Path, nth: int) -> None:
    """Returns when the n-th checkpoint has begun to be written, or the run has ended."""
    seen: set[str] = set()
    while run.poll() is None and len(seen) < nth:
        seen |= {path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")}
        time.sleep(0.0005)


def _killed(
    workdir: pathlib.Path, cache: pathlib.Path, seconds: float, writing: bool, rng: random.Random
) -> dict[str, object]:
    """Kills a run; what it had done by then."""
    run = _start(workdir, cache)
    started = time.monotonic()
    if writing:
        _wait_for_writing(run, workdir, rng.randint(1, 40))
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, seconds))
    run.send_signal(signal.SIGKILL)
    moment = time.monotonic() - started
    run.communicate()
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return {
        "seconds": round(moment, 2),
        "last_checkpoint": max((int(name) for name in names if name.isdigit()), default=0),
        "while_writing": any(not name.isdigit() for name in names),
        "killed": run.returncode == -signal.SIGKILL,
    }


def main(_: list[str]) -> None:
    """Runs all and prints a line for each."""
    rng = random.Random(_SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        _finish(_start(root / "warm", root / "cache"))
        started = time.monotonic()
        _finish(_start(root / "undisturbed", root / "cache"))
        seconds = time.monotonic() - started
        arrays, rows = _result(root / "undisturbed")
        print(
            f"undisturbed: {seconds:.0f} s, {len(arrays)} arrays, {len(rows.splitlines())} rows",
            flush=True,
        )
        runs: list[dict[str, object]] = []
        while len(runs) < _KILLS.value:
            workdir = root / f"{len(runs)}-{rng.random()}"
            killed = _killed(workdir, root / "cache", seconds, len(runs) % 2 == 1, rng)
            if not killed.pop("killed"):
                continue  # it had ended before
            _finish(_start(workdir, root / "cache"))
            end_arrays, end_rows = _result(workdir)
            runs.append(
                killed | {"arrays_equal": end_arrays == arrays, "metrics_equal": end_rows == rows}
            )
            print(len(runs), runs[-1], flush=True)
    equal = sum(bool(run["arrays_equal"] and run["metrics_equal"]) for run in runs)
    print(f"{equal} of {len(runs)} equal the undisturbed run")
    if _OUT.value:
        results.save(_OUT.value, {"equal": equal, "runs": runs})
    if equal < len(runs):
        sys.exit(1)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
