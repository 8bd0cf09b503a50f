"""The training loop, under `pmap`. What shares work out over devices is here, in `train_step` and
in `evaluate`.
"""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from flax import jax_utils
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.data import loader, sources, transforms
from avit_jax.models import vit
from avit_jax.training import (
    build,
    checkpoint,
    distributed,
    evaluate,
    progress,
    restore,
    train_step,
)
from avit_jax.utils import errors

_logger = logging.getLogger(__name__)


def load_source(config: ConfigDict, model: vit.AViT) -> sources.Source:
    """Loads the training split; raises errors.UserError if it is missing or does not fit."""
    source = sources.load(
        config.data.name,
        split=config.data.train_split,
        data_dir=config.data.dir,
        image_size=model.pixels,
    )
    sources.check_fit(source, num_classes=model.num_classes, channels=model.channels)
    distributed.check_same(source.fingerprint(), source.name)
    return source


def input_batches(
    config: ConfigDict, model: vit.AViT, source: sources.Source, start_step: int = 0
) -> Iterator[loader.Batch]:
    """Training batches on the devices, from the given step on."""
    c = config.augment
    transform = transforms.Train(
        image_size=model.pixels,
        crop_scale=c.crop_scale,
        flip=c.flip,
        magnitude=c.magnitude,
        deviation=c.deviation,
    )
    return loader.train_batches(
        loader.Reader(
            source=source, transform=transform, skip_bad=config.data.bad_records == "skip"
        ),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        repeats=c.repeats,
    )


Step = Callable[[build.TrainState, loader.Batch], tuple[build.TrainState, dict[str, jax.Array]]]


class Parts(NamedTuple):
    """What the training loop runs: `parts` makes those of a configuration.

    Attributes:
      model: what is trained.
      create: returns the state before the first step, of random parameters.
      make_step: takes the teacher, or None, and returns the training step over all devices. The
        step takes the state, which it donates, and a batch; it returns the new state and its
        values, each along a first axis of devices.
      batches: takes the number of steps done and returns the batches that follow, on the devices.
      evaluator: takes parameters and `stop`, as `evaluate.Evaluator`, whose `source`, `scalars` and
        `report` it has too.
      source: the training split.
      learning_rate: by step.
    """

    model: vit.AViT
    create: Callable[[], build.TrainState]
    make_step: Callable[[restore.Teacher | None], Step]
    batches: Callable[[int], Iterator[loader.Batch]]
    evaluator: evaluate.Evaluator
    source: sources.Source
    learning_rate: optax.Schedule


def parts(config: ConfigDict, model: vit.AViT | None = None) -> Parts:
    """The parts of a configuration; `model` is trained in place of its own.

    Raises errors.UserError where a data set is missing or does not fit the model.
    """
    model = build.model(config) if model is None else model
    tx, learning_rate = build.optimizer(config)
    source = load_source(config, model)

    def make_step(teacher: restore.Teacher | None) -> Step:
        return _on_devices(
            train_step.make_train_step(model, tx, config, teacher and teacher.model), teacher
        )

    return Parts(
        model=model,
        create=build.creation(config, model),
        make_step=make_step,
        batches=functools.partial(input_batches, config, model, source),
        evaluator=evaluate.Evaluator(config, model, source),
        source=source,
        learning_rate=learning_rate,
    )


def next_batch(
    batches: Iterator[loader.Batch], running: dict[str, jax.Array] | None
) -> tuple[loader.Batch, float]:
    """The next batch, and the seconds that the devices may have waited for it: none if the step
    before is still running.
    """
    started = time.monotonic()
    batch = next(batches)
    idle = running is not None and running["loss"].is_ready()
    return batch, idle * (time.monotonic() - started)


def check(config: ConfigDict, *names: str) -> None:
    """Raises errors.UserError where the configuration makes no sense, or is not that of the first
    process.

    Or where a batch of "train" or "eval", whichever is named, cannot be spread evenly over all
    devices.
    """
    config_lib.check(config)
    differing = config_lib.changes(
        config, distributed.from_first_json(json.loads(config.to_json_best_effort()))
    )
    if differing:
        raise errors.UserError(
            f"the configuration differs from the first process's: {differing}; start all with the "
            "same one."
        )
    for name in names:
        size = config[name].batch_size
        if size % jax.device_count():
            raise errors.UserError(
                f"config.{name}.batch_size {size} must be a multiple of the number of devices, "
                f"{jax.device_count()}."
            )


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    allow_changed_config: bool = False,
    model: vit.AViT | None = None,
) -> None:
    """Trains to the last step, from the last checkpoint in `workdir` if there is one, and reports.

    SIGTERM or SIGINT makes it save after the current step, and return; the next call continues from
    there.

    Args:
      config: see `avit_jax/config.py`.
      workdir: gets `metrics.jsonl`, `timing.jsonl`, `tensorboard/`, `checkpoints/`, `summary.json`
        and `depth.png`.
      allow_changed_config: goes on from a checkpoint of another configuration too.
      model: is trained in place of the configuration's; it has the same parameters, or some more.

    Raises:
      errors.UserError: a mistake in the configuration, the data set is missing, the workdir cannot
        be written or belongs to another run, or the loss is no longer finite.
      KeyboardInterrupt: SIGINT came before the first step, so that there is nothing to save.
    """
    check(config, "train", "eval")
    run(config, workdir, parts(config, model), allow_changed_config=allow_changed_config)


def run(
    config: ConfigDict, workdir: epath.PathLike, parts: Parts, *, allow_changed_config: bool = False
) -> None:
    """Runs the training loop with the given parts; arguments and errors are those of `train`."""
    workdir, evaluator = epath.Path(workdir).expanduser(), parts.evaluator
    with contextlib.ExitStack() as stack:
        stop, checkpoints = stack.enter_context(distributed.Stop()), None
        stack.enter_context(_named_nans(config.debug.nans))
        if distributed.is_first():
            stack.enter_context(checkpoint.claim(workdir))
            checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
        kept = restore.to_keep(config, parts.source, evaluator.source)
        state, past = restore.begin(
            config, parts.model, parts.create, checkpoints, kept, allow_changed_config
        )
        start = int(state.step)
        if checkpoints and start < config.train.steps:
            (workdir / "summary.json").unlink(missing_ok=True)  # it tells that a run has ended
            _warn_of_a_long_average(config)
        teacher = restore.teacher(config, parts.model, past, allow_changed_config)
        kept["teacher"] = teacher and teacher.fingerprint
        kept["parent"] = restore.evaluate_before(
            config, parts.model, state.params, teacher, past, stop
        )
        if kept["parent"] is None:
            return _stopped(stop, "before training", is_empty=True)
        log = stack.enter_context(
            progress.Log(config, workdir if checkpoints else None, parts.learning_rate, start, past)
        )
        batches = stack.enter_context(contextlib.closing(parts.batches(start)))
        state = evaluate.replicate(state)
        step_fn = parts.make_step(teacher)
        results, values, saved, seconds = None, None, start, past.get("train_seconds", 0.0)
        profile = config.debug.profile if start < config.debug.profile[0] else (0, 0)
        for step in range(start, config.train.steps + 1):
            results, new = None, step > start
            if new:
                with _profiled(profile, step, workdir):
                    try:
                        batch, waited = next_batch(batches, values)
                    except Exception:
                        if (
                            step - 1 > saved
                        ):  # what has been trained is saved, even where it cannot go on
                            _save(checkpoints, step - 1, state, log, kept, None)
                        raise
                    state, values = step_fn(state, batch)
                    if step == profile[1]:
                        jax.block_until_ready(values)
                log.add(step, values, waited)
            evaluates = _evaluates_after(step, config) and (new or not past["evaluated"])
            if evaluates:
                log.flush()
            stopping = stop()
            try:
                if evaluates and not stopping:
                    results = evaluator(state.eval_params, stop)
                    stopping = results is None
                if results:
                    log.evaluated(step, evaluator.scalars(results))
            finally:  # likewise where it cannot be evaluated
                if results or (
                    new and (evaluates or stopping or step % config.train.save_every == 0)
                ):
                    seconds, saved = _save(checkpoints, step, state, log, kept, results), step
            if stopping:
                return _stopped(
                    stop,
                    f"after step {step}; the same command continues from there",
                    is_empty=step == start,
                )
        _report(
            evaluator,
            workdir,
            checkpoints,
            state.eval_params,
            results,
            stop,
            train_seconds=seconds,
            **kept["parent"],
        )


def _stopped(stop: distributed.Stop, when: str, *, is_empty: bool) -> None:
    """Logs the end of a run that was stopped; raises KeyboardInterrupt if SIGINT came before
    anything was done.

    Several processes return together instead.
    """
    if is_empty and stop.name == "SIGINT" and jax.process_count() == 1:
        raise KeyboardInterrupt
    _logger.info("stopped by %s %s", stop.name, when)


def _report(
    evaluator: evaluate.Evaluator,
    workdir: epath.Path,
    checkpoints: checkpoint.Checkpoints | None,
    params: Any,
    results: evaluate.Results | None,
    stop: distributed.Stop,
    **more: float,
) -> None:
    """The summary and the picture of a run whose last checkpoint is written, unless its evaluation
    has been stopped.
    """
    if checkpoints is not None:
        checkpoints.wait()
    results = results or evaluator(params, stop)
    if results is None:
        _logger.info("stopped by %s before the report; the same command writes it", stop.name)
    else:
        evaluator.report(workdir / "summary.json", workdir / "depth.png", params, results, **more)


def _on_devices(
    one_step: Callable[..., Any], teacher: restore.Teacher | None
) -> Callable[..., Any]:
    """The training step over all devices, of the state, which it takes for its own, and a batch."""
    taught = () if teacher is None else (evaluate.replicate(teacher.params),)
    step_fn = jax.pmap(one_step, axis_name=train_step.AXIS, donate_argnums=0)
    return lambda state, batch: step_fn(state, batch, *taught)


def _warn_of_a_long_average(config: ConfigDict) -> None:
    left = config.optimizer.ema_decay**config.train.steps
    if left > 0.1:
        _logger.warning(
            "at the end %.0f%% of the moving average, which is what is evaluated, will be the "
            "weights that training starts "
            "from: for %d steps set --config.optimizer.ema_decay=%.6g, or 0",
            *(100 * left, config.train.steps, 0.01 ** (1 / config.train.steps)),
        )


@contextlib.contextmanager
def _profiled(steps: tuple[int, int], step: int, workdir: epath.Path) -> Iterator[None]:
    """Traces from the first of the steps to the last."""
    if step == steps[0]:
        jax.profiler.start_trace(str(workdir / "profile"))
    yield
    if step == steps[1]:
        jax.profiler.stop_trace()
        _logger.info("wrote the trace of steps %d to %d into %s", *steps, workdir / "profile")


@contextlib.contextmanager
def _named_nans(find: bool) -> Iterator[None]:
    """Looks for the operation that gives the first nan, if asked to; slow."""
    try:
        with jax.debug_nans(find):
            yield
    except FloatingPointError as error:
        raise errors.UserError(
            f"{errors.first_line(error)} (found by --config.debug.nans)."
        ) from error


def _evaluates_after(step: int, config: ConfigDict) -> bool:
    every = config.train.eval_every
    return step == config.train.steps or bool(step and every and step % every == 0)


def _save(
    checkpoints: checkpoint.Checkpoints | None,
    step: int,
    state: build.TrainState,
    log: progress.Log,
    kept: dict[str, Any],
    results: evaluate.Results | None,
) -> float:
    """Saves all that the run is made of, once its losses are known to be finite; returns the
    seconds of training until then.
    """
    past = log.past() | kept | {"evaluated": results is not None}
    if checkpoints is not None:
        top1 = None if results is None else float(results["top1"])
        checkpoints.save(step, jax_utils.unreplicate(state), top1=top1, extra=past)
    return past["train_seconds"]


def restore_and_evaluate(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates a checkpoint of `workdir` (`config.eval.checkpoint`), and reports there, in
    `eval.json` and `eval.png`.

    Raises:
      errors.UserError: no such checkpoint, it does not fit the configuration, or the data set is
        missing.
    """
    workdir = epath.Path(workdir).expanduser()
    check(config, "eval")
    model = build.model(config)
    evaluator = evaluate.Evaluator(config, model)
    params, past = restore.params(config, model, workdir)
    odd = restore.changed_class(past, evaluator.source.label_names)
    if odd:
        _logger.warning("%s: the accuracy means nothing unless both are the same", odd)
    params = evaluate.replicate(params)
    results = evaluator(params)
    for name, value in evaluator.scalars(results).items():
        _logger.info("%s: %.6g", name, value)
    report = (workdir / "eval.json", workdir / "eval.png")  # the run's own report stays
    evaluator.report(
        *report, params, results, train_seconds=past["train_seconds"], **past.get("parent", {})
    )
