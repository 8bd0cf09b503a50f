"""Progress of a run: console, metrics files, and the error if a loss is not finite."""

import logging
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax
from etils import epath
from tqdm import tqdm

from avit_jax.training import build, devices, metrics, writers
from avit_jax.training.state import LogState, Row
from avit_jax.utils import errors

_logger = logging.getLogger(__name__)
# Steps that the devices may be behind the host. Two keep them busy, and end soon after a signal.
_MAX_BEHIND = 2
# The run ends if all steps since the last row, at least this many, were skipped.
_MAX_SKIPPED = 20
_FINITE = (  # must be finite; the error names the first one that is not
    "task_loss",
    "distill_loss",
    "ponder_loss",
    "prior_loss",
    "own_loss",
    "loss",
    "grad_norm",
    "param_norm",
)
_COUNTS = ("skipped", "nonfinite")


class _Console(logging.StreamHandler):
    """Writes each message above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def to_console(level: int) -> logging.Logger:
    """Shows this package's log on stderr, with the time, and returns its logger."""
    console = _Console()
    console.setFormatter(errors.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("avit_jax")
    logger.addHandler(console)
    logger.setLevel(level)
    logger.propagate = False
    return logger


def mean_row(rows: Sequence[Row]) -> Row:
    """Returns one row for several steps: sums of counts, and means of other values.

    The means leave out steps that were not finite.
    """
    finite = [row for row in rows if not row["nonfinite"]]
    # If a run resumes with or without a teacher, only some rows have the teacher's loss.
    mean = {
        name: float(np.mean([row[name] for row in finite if name in row])) for name in finite[-1]
    }
    return mean | {name: int(sum(row[name] for row in rows)) for name in _COUNTS}


class Log:
    """Collects metrics on the devices, and writes their mean every `log_every` steps.

    A context manager. All processes use it in the same way; only the first one writes.

    Args:
      options: of the run.
      workdir: folder of the metrics files; None writes nothing.
      learning_rate: as a function of the step.
      step: number of steps done.
      state: from `snapshot` at that step; empty for a new run.
      others: other receivers of the metrics; unused without a workdir.
    """

    def __init__(
        self,
        options: build.RunOptions,
        workdir: epath.Path | None,
        learning_rate: optax.Schedule,
        step: int,
        state: LogState,
        others: Sequence[writers.ScalarWriter] = (),
    ) -> None:
        self._options, self._learning_rate = options, learning_rate
        self._writer = None if workdir is None else metrics.Writer(workdir, step, state.sizes)
        self._others = others if self._writer else ()
        self._bar = tqdm(
            total=options.steps,
            initial=step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=self._writer is None or not (sys.stderr and sys.stderr.isatty()),
        )
        self._rows = list(state.rows)
        self._on_device: list[tuple[int, dict[str, jax.Array]]] = []
        self._skipped, self._steps = state.skipped, state.steps
        self._seconds_before, self._started = state.train_seconds, time.monotonic()
        self._has_compiled = False
        self._restart_clock()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()
        for other in self._others:
            other.close()

    def _restart_clock(self) -> None:
        self._flushed, self._waited, self._timed = time.monotonic(), 0.0, 0

    def snapshot(self) -> LogState:
        """Returns the state that a later start needs to continue; raises as `collect` does."""
        self.collect()
        return LogState(
            train_seconds=self._seconds_before + time.monotonic() - self._started,
            rows=tuple(self._rows),
            skipped=self._skipped,
            steps=self._steps,
            sizes=self._writer.sizes() if self._writer else {},
        )

    def add(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
        """Adds the metrics of a step; waits until the devices are at most two steps behind.

        It waits for the first step of this start, which compiles and does not count in images/s.

        Args:
          step: number of the step, which may still run.
          values: its metrics, on the devices.
          waited: seconds that the devices waited for its batch.
        """
        self._on_device.append((step, values))
        self._bar.update()
        if self._has_compiled:
            jax.block_until_ready(self._on_device[-_MAX_BEHIND - 1 : -_MAX_BEHIND])
            self._waited += waited
            self._timed += 1
        else:
            jax.block_until_ready(values)
            self._has_compiled = True
            self._restart_clock()
        if step % self._options.log_every == 0:
            self.flush()

    def collect(self) -> None:
        """Fetches the metrics of all steps so far.

        Raises:
          errors.UserError: a loss or a norm is not finite, and such steps are not skipped.
        """
        fetched, self._on_device = jax.device_get(self._on_device), []
        for step, values in fetched:
            row = {name: float(value) for name, value in devices.first(values).items()}
            wrong = [name for name in _FINITE if not np.isfinite(row.get(name, 0.0))]
            if wrong and not self._options.skip_nonfinite:
                raise errors.UserError(
                    f"{wrong[0]} became {row[wrong[0]]} at step {step}, learning rate "
                    f"{self._learning_rate(step - 1):.2e}: the last checkpoint is still valid; "
                    "lower --config.optimizer.learning_rate, set --config.optimizer.clip_norm=1, "
                    "or find the operation with --config.debug.nans=True."
                )
            self._rows.append((int(step), row))

    def flush(self) -> None:
        """Writes the mean of the steps since the last row.

        Writes nothing if all of them were skipped; the next row counts them.

        Raises:
          errors.UserError: a loss or a norm is not finite; all steps since the last row, at least
            `_MAX_SKIPPED`, or all steps of the run were skipped; or too many records could not be
            read.
        """
        self.collect()
        if not self._rows:
            return
        steps, rows = zip(*self._rows, strict=True)
        if all(row["nonfinite"] for row in rows):
            is_last = steps[-1] == self._options.steps
            if len(rows) >= _MAX_SKIPPED or (is_last and not self._steps):
                raise errors.UserError(
                    f"loss or gradient was not finite in any of the {len(rows)} steps up to step "
                    f"{steps[-1]}: training has stopped and the last checkpoint is still valid; "
                    "lower --config.optimizer.learning_rate."
                )
            if is_last:
                _logger.warning("the last %d updates were not finite and were skipped", len(rows))
            return
        self._rows = []
        mean = mean_row(rows)
        self._check_counts(mean, len(rows))
        self._write(steps[-1], mean | {"learning_rate": float(self._learning_rate(steps[-1] - 1))})

    def _check_counts(self, mean: Row, steps: int) -> None:
        """Sums the counts; raises errors.UserError if too many records could not be read."""
        self._skipped += mean["skipped"]
        self._steps += steps
        ratio = self._skipped / (self._skipped + self._steps * self._options.batch_size)
        if ratio > self._options.max_bad_share:
            raise errors.UserError(
                f"{self._skipped} records, {ratio:.1%} of all, could not be read: training has "
                "stopped and the last checkpoint is still valid; fix the data set or raise "
                "--config.data.max_bad_share."
            )
        if mean["nonfinite"]:
            _logger.warning(
                "%d of the last %d updates were not finite and were skipped",
                *(mean["nonfinite"], steps),
            )

    def _write(self, step: int, mean: Row) -> None:
        """Writes a row to the files and to the console."""
        options, elapsed = self._options, max(time.monotonic() - self._flushed, 1e-9)
        rate = self._timed / elapsed  # steps of this start per second
        timing = {
            "images_per_second": rate * options.batch_size,
            "data_wait": self._waited / elapsed,
        }
        self._restart_clock()
        self._write_files(step, "train", mean, timing if rate else {})
        speed = ""
        if rate:  # after a resume, all steps of a row may be from earlier starts
            minutes, seconds = divmod(round((options.steps - step) / rate), 60)
            speed = f"  {timing['images_per_second']:.0f} images/s  ETA {minutes}:{seconds:02d}"
        _logger.info(
            "step %d/%d  loss %.4f  top-1 %.1f%%%s",
            *(step, options.steps, mean["loss"], 100 * mean["top1"], speed),
        )

    def _write_files(self, step: int, split: str, values: Row, timing: Row) -> None:
        if self._writer:
            self._writer.write(step, split, values, timing)
        scalars = {f"{split}/{name}": value for name, value in (values | timing).items()}
        for other in self._others:
            other.write_scalars(step, scalars)

    def evaluated(self, step: int, values: Row) -> None:
        """Writes the results of an evaluation, whose time does not count in images/s."""
        self._restart_clock()
        self._write_files(step, "eval", values, {})
        _logger.info("step %d  %s", step, metrics.in_words(values))
