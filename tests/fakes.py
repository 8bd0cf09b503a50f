"""A network of three parameters and what trains it, for tests of the loop and of all that surrounds
a network.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.data import loader, sources
from avit_jax.training import build, checkpoint, devices, distributed, evaluate, loop, state
from avit_jax.training import parts as parts_lib
from avit_jax.utils import files

SOURCES = [
    sources.Source(f"the {split} split", range(count), list("ab"), channels=1)
    for split, count in (("a", 32), ("b", 8))
]
_ROW = {
    "loss": np.float32(0.5),
    "macs": np.float32(50.0),
    "depth_patch": np.float32(1.5),
    "depth_class": np.float32(2.0),
    "images": np.float32(8),
}


def config(**overrides: object) -> ConfigDict:
    """Windows of the log, evaluations and checkpoints end at different steps."""
    steps = {"train.steps": 9, "train.log_every": 4, "train.eval_every": 6, "train.save_every": 3}
    return fixtures.small_config(**steps | overrides)


def create() -> state.TrainState:
    """The state before the first step."""
    params = {"a": jnp.zeros(2), "b": jnp.ones(())}
    return state.TrainState(
        step=jnp.zeros((), jnp.int32), params=params, ema_params={"a": jnp.zeros(2)}, opt_state=()
    )


def batches(
    start: int, at: Mapping[int, Callable[[], None]] | None = None
) -> Iterator[loader.Batch]:
    """Batches that depend on the step alone. If `at` has an action for a step, it runs before the
    batch of the step.
    """
    for step in itertools.count(start + 1):
        (at or {}).get(step, lambda: None)()
        image = np.random.default_rng(step).random((jax.local_device_count(), 2), np.float32)
        yield {"image": image, "skipped": np.zeros(image.shape, np.int32)}


@functools.cache
def _step(poisoned: frozenset[int], value: str, skip: bool, taught: bool) -> parts_lib.Step:
    def step(
        before: state.TrainState, batch: loader.Batch
    ) -> tuple[state.TrainState, dict[str, jax.Array]]:
        target = devices.mean(batch["image"].astype(jnp.float32).mean())
        number = before.step + 1
        bad = jnp.isin(number, jnp.array([*poisoned, -1]))
        update = lambda tree: jax.tree.map(lambda x: 0.9 * x + 0.1 * target, tree)  # noqa: E731
        values = dict.fromkeys(("loss", "task_loss", "grad_norm", "param_norm", "top1"), target)
        values |= {"distill_loss": target} if taught else {}
        values[value] = jnp.where(bad, jnp.sqrt(-target), values[value])
        counts = {
            "skipped": devices.total(batch["skipped"].sum()),
            "nonfinite": bad & skip,
        }
        new = {"params": update(before.params), "ema_params": update(before.ema_params)}
        return before.replace(step=number, **new), values | counts

    return devices.parallel(step, donate=True)


class Evaluator(evaluate.Evaluator):
    """Reads its results off the parameters."""

    def __init__(self, source: sources.Source = SOURCES[1]) -> None:
        self.source = source

    def __call__(
        self, params: object, stop: Callable[[], bool] = lambda: False
    ) -> evaluate.Results | None:
        first = jax.tree.leaves(devices.first(params))[0]
        return (
            None
            if stop()
            else _ROW | {"top1": np.float32(1.0) / (1.0 + np.asarray(first, np.float32).mean())}
        )

    def scalars(self, results: evaluate.Results) -> dict[str, float]:
        return {name: float(value) for name, value in results.items()} | {"macs_ratio": 0.5}

    def report(
        self,
        summary: pathlib.Path,
        figure: object,
        params: object,
        results: evaluate.Results,
        **more: float,
    ) -> None:
        if distributed.is_first():
            files.write(summary, json.dumps(self.scalars(results) | more))


def parts(
    config: ConfigDict,
    *,
    at: Mapping[int, Callable[[], None]] | None = None,
    poisoned: tuple[int, ...] = (),
    value: str = "loss",
) -> parts_lib.Parts:
    """What the loop needs; its other attributes can be changed with `dataclasses.replace`.

    Args:
      config: of the run.
      at: what is done while the batch of a step is fetched.
      poisoned: the steps of which a value is not finite.
      value: its name.
    """
    return parts_lib.Parts(
        options=build.run_options(config),
        config=config_lib.to_json(config),
        model=build.model(config),
        create=create,
        make_step=lambda teacher: _step(
            frozenset(poisoned), value, config.train.nonfinite == "skip", teacher is not None
        ),
        batches=functools.partial(batches, at=at),
        evaluator=Evaluator(),
        source=SOURCES[0],
        learning_rate=build.optimizer(config)[1],
    )


def run(
    config: ConfigDict, workdir: pathlib.Path, *, allow_changed_config: bool = False, **how: object
) -> None:
    """A run of the fake network; `how` is of `parts`."""
    loop.run(parts(config, **how), workdir, allow_changed_config=allow_changed_config)


def real_run(
    config: ConfigDict, workdir: pathlib.Path, *, allow_changed_config: bool = False
) -> None:
    """A run of the configuration's own network and data, of which no loss is computed."""
    real, fake = parts_lib.of_config(config), parts(config)
    real = dataclasses.replace(
        real, make_step=fake.make_step, batches=fake.batches, evaluator=Evaluator(real.source)
    )
    loop.run(real, workdir, allow_changed_config=allow_changed_config)


def restored(workdir: pathlib.Path) -> state.TrainState:
    """The last checkpoint of a run of the fake network."""
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(jax.device_get(create()))[0]
