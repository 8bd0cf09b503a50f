"""The parts that the training loop runs, and how a configuration gives them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.data import loader, sources, transforms
from avit_jax.models import vit
from avit_jax.training import announce, build, devices, evaluate, restore, teacher, train_step
from avit_jax.training.state import TrainState

Step = Callable[[TrainState, loader.Batch], tuple[TrainState, dict[str, jax.Array]]]


def _no_teacher(expected: str | None) -> None:
    """Returns None, the teacher of a run without one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What the training loop runs.

    States, parameters and metrics are replicated, and batches are distributed, by `devices`.
    Exceptions are marked "one copy".

    Attributes:
      options: options of the loop.
      config: the configuration in types that JSON can hold; each checkpoint holds it.
      model: the network.
      create: returns the random state before the first step, one copy.
      initial_params: returns parameters to start from, one copy; None: those of `create`.
      parent: weight file whose static network is evaluated before training; empty: none.
      load_teacher: takes the fingerprint to expect, or None, and returns the teacher, or None.
      make_step: takes the teacher, or None, and returns the training step. The step takes the
        state, which it donates, and a batch; it returns the new state and metrics by name.
      batches: takes the number of steps done and returns the batches that follow.
      evaluator: evaluates parameters and reports, as `evaluate.Evaluator` does.
      top1: measures another network, from one copy of its parameters; see `teacher.Top1`.
      source: the training split.
      learning_rate: as a function of the step.
    """

    options: build.RunOptions
    config: dict[str, Any]
    model: vit.AViT
    create: Callable[[], TrainState]
    initial_params: Callable[[], dict[str, Any]] | None = None
    parent: str = ""
    load_teacher: Callable[[str | None], teacher.Teacher | None] = _no_teacher
    make_step: Callable[[teacher.Teacher | None], Step]
    batches: Callable[[int], Iterator[loader.Batch]]
    evaluator: evaluate.Evaluator
    top1: teacher.Top1 | None = None
    source: sources.Source
    learning_rate: optax.Schedule


def of_config(config: ConfigDict, model: vit.AViT | None = None) -> Parts:
    """Returns the parts of a configuration; `model` replaces its network.

    Raises:
      errors.UserError: a data set is missing or does not fit the network.
    """
    model = build.model(config) if model is None else model
    tx, learning_rate = build.optimizer(config)
    source = build.source(config, model, config.data.train_split)

    def make_step(found: teacher.Teacher | None) -> Step:
        taught = () if found is None else (devices.replicate(found.params),)
        step = train_step.make_train_step(
            model, tx, build.step_options(config), found and found.model
        )
        run = announce.first_call(devices.parallel(step, donate=True), "the training step")
        return lambda state, batch: run(state, batch, *taught)

    has_parent = config.init and not config.init_new_head and model.halting is not None
    has_parent = has_parent and not source.multi_label  # which has no top-1 accuracy
    return Parts(
        options=build.run_options(config),
        config=config_lib.to_json(config),
        model=model,
        create=build.creation(config, model),
        initial_params=functools.partial(restore.initial_params, config, model)
        if config.init
        else None,
        parent=config.init if has_parent else "",
        load_teacher=functools.partial(teacher.load, config.distill.teacher, model),
        make_step=make_step,
        batches=functools.partial(train_batches, config, model, source),
        evaluator=evaluate.Evaluator(config, model, source),
        top1=functools.partial(evaluate.top1, config),
        source=source,
        learning_rate=learning_rate,
    )


def train_batches(
    config: ConfigDict, model: vit.AViT, source: sources.Source, start_step: int = 0
) -> Iterator[loader.Batch]:
    """Returns the training batches on the devices that follow the first `start_step` batches."""
    c, data = config.augment, config.data
    transform = transforms.Train(
        image_size=model.pixels,
        crop_scale=c.crop_scale,
        flip=c.flip,
        magnitude=c.magnitude,
        deviation=c.deviation,
        channels=model.channels,
    )
    reader = loader.Reader(
        source=source,
        transform=transform,
        value_range=tuple(data.range),
        skip_bad=data.bad_records == "skip",
    )
    batches = loader.train_batches(
        reader,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        num_threads=data.num_threads,
        num_workers=data.num_workers,
        repeats=c.repeats,
    )
    return devices.prefetch(batches)
