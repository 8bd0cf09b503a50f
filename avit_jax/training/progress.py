"""What a training run tells: progress on the console, rows in the metrics files, and the end where
a loss is not finite.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from avit_jax.training import metrics
from avit_jax.utils import errors

_logger = logging.getLogger(__name__)
# steps that the devices may be behind the host: they have what to go on with, and a signal is soon
# obeyed
_AHEAD = 2
_LONGEST = 20  # steps in a row that may be skipped where not one between two rows is finite
_FINITE = (
    "task_loss",
    "distill_loss",
    "ponder_loss",
    "prior_loss",
    "own_loss",
    "loss",
    "grad_norm",
    "param_norm",
)  # in this order: what comes first is named
Row = dict[str, float]


def to_console(level: int) -> logging.Logger:
    """Shows on stderr, with the time, what this package logs; returns its logger."""
    console = logging.StreamHandler()
    console.setFormatter(errors.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("avit_jax")
    logger.addHandler(console)
    logger.setLevel(level)
    logger.propagate = False
    return logger


class Log:
    """Looks at values of the device every `log_every` steps only, and where it is asked to.

    A context manager. The same on all processes; only the first one, which has a workdir, writes.

    Args:
      config: of the run.
      workdir: where the metrics files are; None: nothing is written.
      learning_rate: by step.
      step: the last one done.
      past: what `past` returned at that step; empty at the start of a run.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path | None,
        learning_rate: optax.Schedule,
        step: int,
        past: dict[str, Any],
    ) -> None:
        self._config, self._learning_rate = config, learning_rate
        self._writer = (
            None if workdir is None else metrics.Writer(workdir, step, past.get("sizes", {}))
        )
        self._rows: list[tuple[int, Row]] = [(int(at), row) for at, row in past.get("rows", [])]
        self._on_device: list[tuple[int, dict[str, jax.Array]]] = []
        self._skipped, self._steps = past.get("skipped", 0), past.get("steps", 0)
        self._seconds_before, self._started = past.get("train_seconds", 0.0), time.monotonic()
        self._restart_clock()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.close()

    def _restart_clock(self) -> None:
        self._flushed, self._waited, self._timed = time.monotonic(), 0.0, 0

    @property
    def seconds(self) -> float:
        """Wall time of training so far, evaluation and compilation included, over all starts; lost
        work does not count.
        """
        return self._seconds_before + time.monotonic() - self._started

    def past(self) -> dict[str, Any]:
        """What has to be known to go on from here as if nothing had happened, for JSON; waits as
        `collect` does.
        """
        self.collect()
        return {
            "train_seconds": self.seconds,
            "rows": list(self._rows),
            "skipped": self._skipped,
            "steps": self._steps,
            "sizes": self._writer.sizes() if self._writer else {},
        }

    def add(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
        """Takes the step's values, still on the device, and the seconds that the devices waited for
        its batch.

        Waits until the devices are at most two steps behind.
        """
        self._on_device.append((step, values))
        jax.block_until_ready(self._on_device[-_AHEAD - 1 : -_AHEAD])
        self._waited += waited
        self._timed += 1
        if step % self._config.train.log_every == 0:
            self.flush()

    def collect(self) -> None:
        """Fetches the values of all steps so far.

        Raises errors.UserError at a non-finite loss or gradient, unless such steps are skipped.
        """
        fetched, self._on_device = jax.device_get(self._on_device), []
        for step, values in fetched:
            row = {name: float(value[0]) for name, value in values.items()}
            if self._config.train.nonfinite == "stop":
                for name in _FINITE:
                    if not np.isfinite(row.get(name, 0.0)):
                        raise errors.UserError(
                            f"{name} became {row[name]} at step {step}, learning rate "
                            f"{self._learning_rate(step - 1):.2e}: "
                            "training has stopped and the last checkpoint stands; lower "
                            "--config.optimizer.learning_rate, set "
                            "--config.optimizer.clip_norm=1, or find the operation with "
                            "--config.debug.nans=True."
                        )
            self._rows.append((int(step), row))

    def flush(self) -> None:
        """Writes the mean of what has come since the last time, and how many records could not be
        read and steps were skipped.

        Raises errors.UserError at a non-finite loss or gradient, or where too many records could
        not be read.
        """
        self.collect()
        if not self._rows:
            return
        steps, rows = zip(*self._rows, strict=True)
        is_last = steps[-1] == self._config.train.steps
        if (
            len(rows) < _LONGEST
            and all(row["nonfinite"] for row in rows)
            and not (is_last and not self._steps)
        ):
            if is_last:
                _logger.warning(
                    "the last %d updates were not finite and have been skipped", len(rows)
                )
            return  # they wait for one that was not skipped
        self._rows = []
        mean = self._mean(steps, rows)
        step, total = steps[-1], self._config.train.steps
        now = time.monotonic()
        rate = self._timed / (now - self._flushed)  # of those of this start
        timing = {
            "images_per_second": rate * self._config.train.batch_size,
            "data_wait": self._waited / (now - self._flushed),
        }
        self._restart_clock()
        if self._writer:
            self._writer.write(step, "train", mean, timing)
        minutes, seconds = divmod(round((total - step) / rate) if rate else 0, 60)
        _logger.info(
            "step %d/%d  loss %.4f  top-1 %.3f  %.0f images/s  ETA %d:%02d",
            *(
                step,
                total,
                mean["loss"],
                mean["top1"],
                timing["images_per_second"],
                minutes,
                seconds,
            ),
        )

    def _mean(self, steps: tuple[int, ...], rows: tuple[Row, ...]) -> Row:
        """The row of several steps: means over those that were not skipped, sums of what is
        counted, and the learning rate.
        """
        done = [row for row in rows if not row["nonfinite"]]
        if not done:
            raise errors.UserError(
                f"loss or gradient was not finite in any of the {len(rows)} steps up to step "
                f"{steps[-1]}: training has stopped "
                "and the last checkpoint stands; lower --config.optimizer.learning_rate."
            )
        # A run that goes on without its teacher, or with one, has rows of both kinds.
        mean = {
            name: float(np.mean([row[name] for row in done if name in row])) for name in done[-1]
        }
        for name in ("skipped", "nonfinite"):
            mean[name] = int(sum(row[name] for row in rows))
        self._check_skipped(mean["skipped"], len(steps))
        if mean["nonfinite"]:
            _logger.warning(
                "%d of the last %d updates were not finite and have been skipped",
                mean["nonfinite"],
                len(rows),
            )
        return mean | {"learning_rate": float(self._learning_rate(steps[-1] - 1))}

    def _check_skipped(self, skipped: int, steps: int) -> None:
        self._skipped += skipped
        self._steps += steps
        share = self._skipped / (self._skipped + self._steps * self._config.train.batch_size)
        if share > self._config.data.max_bad_share:
            raise errors.UserError(
                f"{self._skipped} records, {share:.1%} of all, could not be read: training has "
                "stopped and the last checkpoint "
                "stands; mend the data set or raise --config.data.max_bad_share."
            )

    def evaluated(self, step: int, values: Row) -> None:
        """Writes the result of an evaluation, whose time does not count as training in images/s."""
        self._restart_clock()
        if self._writer:
            self._writer.write(step, "eval", values)
        _logger.info(
            "step %d  evaluation of %d images: top-1 %.2f%%  MACs ratio %.3f  depth of patch "
            "tokens %.2f, of class token %.2f",
            *(
                step,
                values["images"],
                100 * values["top1"],
                values["macs_ratio"],
                values["depth_patch"],
                values["depth_class"],
            ),
        )


def check_past(past: Any) -> None:
    """Raises errors.UserError if this version does not write such checkpoint metadata."""
    known = {"data": {}} | past if isinstance(past, dict) else {}  # older runs did not keep it
    wrong = [key for key, is_valid in _PAST.items() if not is_valid(known.get(key))]
    if wrong:
        raise errors.UserError(
            "the checkpoint's metadata is damaged, or of another version of this program "
            f"({', '.join(wrong)}): set another "
            "--workdir."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_count(value[0])
        and _holds(dict, _is_number)(value[1])
    )


def _holds(kind: type, is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for a list, or for a dictionary with text as keys, of valid values."""
    return lambda value: (
        isinstance(value, kind) and all(map(is_valid, value.values() if kind is dict else value))
    )


_PAST = {
    "config": lambda value: isinstance(value, dict),
    "parent": _holds(dict, _is_number),
    "label_names": _holds(list, lambda value: isinstance(value, str)),
    "evaluated": lambda value: isinstance(value, bool),
    "train_seconds": lambda value: _is_number(value) and 0 <= value < 1e12,
    "rows": _holds(list, _is_row),
    "skipped": _is_count,
    "steps": _is_count,
    "sizes": _holds(dict, _is_count),
    "data": _holds(dict, lambda value: isinstance(value, str)),
}
