"""Time of the pmap training step with halting against the same step without it: DeiT-T shapes,
batch 16.

python -m experiments.training_step.run --out=experiments/training_step/result.json
"""

import json
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from avit_jax import config as config_lib
from avit_jax.training import build, devices, train_step
from avit_jax.utils import errors
from experiments import results, timing

_BATCH = flags.DEFINE_integer("batch", 16, "images a step")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "interleaved repeats")
_OUT = flags.DEFINE_string("out", None, "JSON file to write")


def build_step(*, halting: bool, batch_size: int) -> Callable[[], None]:
    """A function that does one training step on random images, on one device, and waits for it."""
    config = config_lib.default()
    config.halting.enabled = halting
    model = build.model(config)
    tx, _ = build.optimizer(config)
    device = jax.local_devices()[:1]
    state = devices.replicate(build.new_state(model, tx, seed=0, ema=True), device)
    step = train_step.make_train_step(model, tx, build.step_options(config))
    step = devices.parallel(step, donate=True, devices=device)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (1, batch_size, *model.pixels, model.channels), np.uint8),
        "label": rng.integers(0, model.num_classes, (1, batch_size)).astype(np.int32),
        "index": np.arange(batch_size, dtype=np.int32)[None],
        "skipped": np.zeros((1, batch_size), np.int32),
    }

    def run() -> None:
        nonlocal state
        state, values = step(state, batch)
        jax.block_until_ready((state, values))

    return run


def main(_: list[str]) -> None:
    """Measures, prints and writes."""
    functions = {
        name: build_step(halting=name == "halting", batch_size=_BATCH.value)
        for name in ("static", "halting")
    }
    seconds = timing.interleave(functions, _ROUNDS.value)
    result = {
        **timing.environment(),
        "batch": _BATCH.value,
        "rounds": _ROUNDS.value,
        "median_seconds": {name: float(np.median(times)) for name, times in seconds.items()},
        "ratio": timing.median_ratio(seconds["halting"], seconds["static"]),
    }
    print(json.dumps(result, indent=2))
    if _OUT.value:
        results.save(_OUT.value, result)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
