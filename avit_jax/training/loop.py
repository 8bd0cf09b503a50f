"""The training loop."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from avit_jax import run_config
from avit_jax.data import loader
from avit_jax.models import vit
from avit_jax.training import (
    announce,
    build,
    checkpoint,
    devices,
    distributed,
    evaluate,
    metrics,
    progress,
    restore,
    writers,
)
from avit_jax.training import (
    parts as parts_lib,
)
from avit_jax.training import (
    teacher as teacher_lib,
)
from avit_jax.training.profiler import Profiler
from avit_jax.training.state import RunMetadata, TrainState
from avit_jax.utils import errors

_logger = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    allow_changed_config: bool = False,
    model: vit.AViT | None = None,
    writers: Sequence[writers.ScalarWriter] = (),
) -> None:
    """Trains up to the last step, from the last checkpoint in `workdir` if there is one.

    At SIGTERM or SIGINT, it finishes the current step, saves and returns. The next call continues
    from there.

    Args:
      config: see `avit_jax/config.py`.
      workdir: gets `config.json`, `log.txt`, `metrics.jsonl`, `timing.jsonl`, `tensorboard/`,
        `checkpoints/`, `summary.json` and `depth.png`.
      allow_changed_config: accepts a checkpoint of another configuration, data set or
        teacher.
      model: replaces the configuration's network; it must have at least the same parameters.
      writers: other receivers of the metrics, which are closed at the end.

    Raises:
      errors.UserError: the configuration or the data set is invalid; the workdir is not writable or
        belongs to another run; or the loss is not finite.
      KeyboardInterrupt: SIGINT came before the first step of this call, in a run of one process.
    """
    build.check(config, "train", "eval")
    parts = parts_lib.of_config(config, model)
    run(parts, workdir, allow_changed_config=allow_changed_config, others=writers)


def run(
    parts: parts_lib.Parts,
    workdir: epath.PathLike,
    *,
    allow_changed_config: bool = False,
    others: Sequence[writers.ScalarWriter] = (),
) -> None:
    """Starts or resumes a run, trains and reports; see `train`."""
    workdir, options = epath.Path(workdir).expanduser(), parts.options
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(distributed.Stop())
        stack.enter_context(announce.quiet())
        stack.enter_context(_nans_as_errors(options.find_nans))
        checkpoints = _open_workdir(workdir, stack)
        announce.start(parts, workdir)
        begun = restore.begin(
            parts.create,
            parts.initial_params,
            checkpoints,
            _metadata(parts),
            steps=options.steps,
            allow_changed_config=allow_changed_config,
        )
        if checkpoints:
            _prepare_workdir(workdir, parts, begun.step)
        teacher = parts.load_teacher(None if allow_changed_config else begun.metadata.teacher)
        baselines = teacher_lib.measure_baselines(
            begun, parts.model, teacher, parts.top1, stop, parent=parts.parent
        )
        if baselines is None:
            return _end_stopped(stop, "before training", is_empty=True)
        metadata = dataclasses.replace(
            begun.metadata, teacher=teacher and teacher.fingerprint, parent=baselines
        )
        log_dir = workdir if checkpoints else None
        started = (options, log_dir, parts.learning_rate, begun.step, metadata.log)
        log = progress.Log(*started, _writers(parts, log_dir, others))
        stack.enter_context(log)
        batches = stack.enter_context(contextlib.closing(parts.batches(begun.step)))
        saver = Saver(checkpoints, metadata, log, begun.step)
        state = devices.replicate(begun.train)
        profiler = Profiler(options.profile, begun.step, workdir / "profile")
        stack.callback(profiler.close)
        step_fn = parts.make_step(teacher)
        state, results = loop(state, step_fn, batches, parts, log, saver, stop, profiler)
        if saver.step < options.steps or (results is None and stop()):
            when = f"after step {saver.step}; the same command continues from there"
            return _end_stopped(stop, when, is_empty=saver.step == begun.step)
        if checkpoints:
            checkpoints.wait()
        results = results or parts.evaluator(state.eval_params, stop)
        if results is None:
            _logger.info("stopped by %s before the report; the same command writes it", stop.name)
            return None
        files = (workdir / "summary.json", workdir / "depth.png")
        more = {"train_seconds": saver.metadata.log.train_seconds} | baselines
        parts.evaluator.report(*files, state.eval_params, results, **more)


def _open_workdir(
    workdir: epath.Path, stack: contextlib.ExitStack
) -> checkpoint.Checkpoints | None:
    """Locks the workdir, opens its log and returns its checkpoints, on the first process."""
    if not distributed.is_first():
        return None
    stack.enter_context(checkpoint.lock_workdir(workdir))
    stack.enter_context(announce.log_file(workdir))
    return stack.enter_context(checkpoint.Checkpoints(workdir))


def _prepare_workdir(workdir: epath.Path, parts: parts_lib.Parts, step: int) -> None:
    """Writes the configuration, and removes the report if the run is not finished."""
    run_config.write(workdir, parts.config)
    if step < parts.options.steps:
        (workdir / "summary.json").unlink(missing_ok=True)  # it marks a run as finished
        warn_of_long_average(parts.options)


def loop(
    state: TrainState,
    step_fn: parts_lib.Step,
    batches: Iterator[loader.Batch],
    parts: parts_lib.Parts,
    log: progress.Log,
    saver: "Saver",
    stop: distributed.Stop,
    profiler: Profiler,
) -> tuple[TrainState, evaluate.Results | None]:
    """Trains up to the last step or until `stop` is true, and saves.

    Args:
      state: the state after step `saver.step`, replicated.
      step_fn: the training step.
      batches: the batches after step `saver.step`.
      parts: the parts of the run; only their evaluator and options are used.
      log: gets the metrics of each step.
      saver: saves checkpoints.
      stop: whether to stop now.
      profiler: records some of the steps.

    Returns:
      The state after step `saver.step`, and its evaluation, None if it was not evaluated here.
    """
    options, evaluator = parts.options, parts.evaluator
    step, values, results = saver.step, None, None
    if _is_evaluated(step, options) and not saver.metadata.evaluated:  # a signal stopped it
        results = _evaluate(step, state, evaluator, log, saver, stop)
    while step < options.steps and not stop():
        profiler.start(step + 1)
        with saver.after_errors(step, state):
            batch, waited = next_batch(batches, values)
        step += 1
        state, values = step_fn(state, batch)
        profiler.stop(step, values)
        log.add(step, values, waited)
        results = None
        if _is_evaluated(step, options):
            results = _evaluate(step, state, evaluator, log, saver, stop)
        elif step % options.save_every == 0:
            saver.save(step, state)
    saver.save(step, state)
    return state, results


def _is_evaluated(step: int, options: build.RunOptions) -> bool:
    every = options.eval_every
    return step == options.steps or bool(step and every and step % every == 0)


def _evaluate(
    step: int,
    state: TrainState,
    evaluator: evaluate.Evaluator,
    log: progress.Log,
    saver: "Saver",
    stop: distributed.Stop,
) -> evaluate.Results | None:
    """Evaluates and saves; returns None if `stop` ended the evaluation."""
    log.flush()
    with saver.after_errors(step, state):
        results = evaluator(state.eval_params, stop)
        if results:
            log.evaluated(step, evaluator.scalars(results))
    saver.save(step, state, results)
    return results


class Saver:
    """Saves snapshots of a run. All processes use it; only the first one writes checkpoints.

    Args:
      checkpoints: the checkpoints of the run; None on all processes but the first.
      metadata: metadata of the last checkpoint, or of a new run.
      log: the log of the run.
      step: the last step saved; 0 at the start of a run.

    Attributes:
      step: the last step saved.
      metadata: metadata of this step.
    """

    def __init__(
        self,
        checkpoints: checkpoint.Checkpoints | None,
        metadata: RunMetadata,
        log: progress.Log,
        step: int,
    ) -> None:
        self.step, self.metadata = step, metadata
        self._checkpoints, self._log = checkpoints, log

    def save(self, step: int, state: TrainState, results: evaluate.Results | None = None) -> None:
        """Saves a replicated state, unless the step is saved and there are no new results.

        Raises:
          errors.UserError: the checkpoint is not writable, or a loss so far is not finite.
        """
        if step == self.step and results is None:
            return
        self.metadata = dataclasses.replace(
            self.metadata, log=self._log.snapshot(), evaluated=results is not None
        )
        if self._checkpoints:
            top1 = None if results is None else metrics.quality(results)[1]
            snapshot, extra = devices.first(state), self.metadata.to_json()
            self._checkpoints.save(step, snapshot, top1=top1, extra=extra)
        self.step = step

    @contextlib.contextmanager
    def after_errors(self, step: int, state: TrainState) -> Iterator[None]:
        """Saves the state if the code inside fails, so that no step is lost."""
        try:
            yield
        except Exception:
            self.save(step, state)
            raise


def next_batch(
    batches: Iterator[loader.Batch], running: dict[str, jax.Array] | None
) -> tuple[loader.Batch, float]:
    """Returns the next batch, and the seconds that the devices waited for it.

    The wait counts as 0 if the devices are still busy when the batch arrives.

    Args:
      batches: on the devices.
      running: metrics of the previous step; the devices are idle if these are ready.
    """
    started = time.monotonic()
    batch = next(batches)
    is_idle = running is not None and running["loss"].is_ready()
    return batch, is_idle * (time.monotonic() - started)


def _metadata(parts: parts_lib.Parts) -> RunMetadata:
    """Returns the metadata of a new run."""
    data = {
        "training": parts.source.fingerprint(),
        "evaluation": parts.evaluator.source.fingerprint(),
    }
    return RunMetadata(config=parts.config, label_names=parts.source.label_names, data=data)


def _writers(
    parts: parts_lib.Parts, log_dir: epath.Path | None, others: Sequence[writers.ScalarWriter]
) -> Sequence[writers.ScalarWriter]:
    """Returns the writers other than those of the workdir, on the first process."""
    project = parts.options.wandb
    if not project or log_dir is None:
        return others
    return [*others, writers.WandbWriter(project, log_dir, parts.config)]


def _end_stopped(stop: distributed.Stop, when: str, *, is_empty: bool) -> None:
    """Logs that a signal stopped the run.

    A single process raises KeyboardInterrupt if SIGINT came before the first step. Several
    processes return together instead.
    """
    if is_empty and stop.name == "SIGINT" and jax.process_count() == 1:
        raise KeyboardInterrupt
    _logger.info("stopped by %s %s", stop.name, when)


def warn_of_long_average(options: build.RunOptions) -> None:
    """Warns if the moving average will consist largely of the initial parameters."""
    left = options.ema_decay**options.steps
    if left > 0.1:
        _logger.warning(
            "the initial weights will be %.0f%% of the moving average after %d steps: set "
            "--config.optimizer.ema_decay=%.6g, or 0 for no average",
            *(100 * left, options.steps, 0.01 ** (1 / options.steps)),
        )


@contextlib.contextmanager
def _nans_as_errors(find: bool) -> Iterator[None]:
    """Raises errors.UserError at the operation that returns the first nan, if `find`; slow."""
    try:
        with jax.debug_nans(find):
            yield
    except FloatingPointError as error:
        raise errors.UserError(
            f"{errors.first_line(error)} (found by --config.debug.nans)."
        ) from error
