"""Seconds that a run spends on compilation, at its first start and at its second.

python -m experiments.second_start.run --out=experiments/second_start/result.json

Starts configs/digits.py for a few steps in a fresh process, empties its folder but for the compiled
programs, and starts it again; adds up what JAX reports of each compilation.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl import app, flags

from avit_jax.utils import errors
from experiments import results, timing

_OUT = flags.DEFINE_string("out", None, "result.json", required=True)
_START = """
import json, runpy, sys
import jax
seconds, hits = [], []
def spent(name, duration, **_):
  if name.endswith("backend_compile_duration"):
    seconds.append(duration)
jax.monitoring.register_event_duration_secs_listener(spent)
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
)
sys.argv[1:] = ["--config=configs/digits.py", f"--workdir={sys.argv[1]}", "--config.train.steps=20"]
try:
  runpy.run_module("avit_jax.main", run_name="__main__")
finally:
  print(json.dumps({"programs": len(seconds), "from_cache": len(hits), "seconds": sum(seconds)}))
"""


def start(workdir: pathlib.Path) -> dict[str, float]:
    """What one start in a process of its own has compiled."""
    done = subprocess.run(
        [sys.executable, "-c", _START, str(workdir)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
    """Starts twice, compares and writes."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        first = start(workdir)
        metrics = (workdir / "metrics.jsonl").read_bytes()
        for path in set(workdir.iterdir()) - {workdir / "compiled"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        second = start(workdir)
        same = (workdir / "metrics.jsonl").read_bytes() == metrics
    result = timing.environment() | {
        "first": first,
        "second": second,
        "share": second["seconds"] / first["seconds"],
    }
    result["equal_metrics"] = same
    results.save(_OUT.value, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
