"""What a run consists of: the training state, and the metadata that its checkpoints hold."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax

from avit_jax.utils import errors

Row = dict[str, float]  # metrics by name


@flax.struct.dataclass(kw_only=True)
class TrainState:
    """All that a training step changes. Random keys follow from the seed and the step.

    Attributes:
      step: int32, number of steps so far, also of those whose update was skipped.
      params: parameter tree.
      ema_params: moving average of `params`; None if there is no average.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate: the moving average if there is one."""
        return self.params if self.ema_params is None else self.ema_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogState:
    """What `progress.Log` needs to continue after a restart.

    Attributes:
      train_seconds: wall time of the training loop with its evaluations, in seconds, over all
        starts; without work that was lost.
      rows: steps that no row of metrics.jsonl covers yet, each with its metrics.
      skipped: number of unreadable records that the rows of metrics.jsonl count.
      steps: number of steps that rows of metrics.jsonl cover.
      sizes: bytes of each metrics file.
    """

    train_seconds: float = 0.0
    rows: tuple[tuple[int, Row], ...] = ()
    skipped: int = 0
    steps: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """The content of a checkpoint besides the training state.

    Attributes:
      config: the configuration, from `config.to_json`.
      label_names: of the classes.
      data: fingerprint of each split; empty in runs of older versions.
      teacher: fingerprint of the teacher; None without one.
      parent: accuracies measured before training, `parent_top1` and `teacher_top1`, if there are a
        parent and a teacher.
      evaluated: whether the run has evaluated the parameters of this step.
      log: progress of the metrics files.
    """

    config: dict[str, Any]
    label_names: list[str]
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    teacher: str | None = None
    parent: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluated: bool = False
    log: LogState = LogState()

    def to_json(self) -> dict[str, Any]:
        """Returns a copy in types that JSON can hold."""
        values = dataclasses.asdict(self)
        return values | values.pop("log")

    @classmethod
    def from_json(cls, values: Any) -> "RunMetadata":
        """Returns the metadata that `to_json` gave, of this version or an older one.

        Raises:
          errors.UserError: a value is missing or has another type.
        """
        known = {"data": {}, "teacher": None} | values if isinstance(values, dict) else {}
        wrong = [key for key, is_valid in _CHECKS.items() if not is_valid(known.get(key))]
        if wrong:
            raise errors.UserError(
                "the checkpoint's metadata is damaged, or another version of this program wrote it "
                f"({', '.join(wrong)}): set another --workdir."
            )
        known = known | {"rows": tuple(map(tuple, known["rows"]))}
        log = LogState(**{field.name: known[field.name] for field in dataclasses.fields(LogState)})
        own = {field.name for field in dataclasses.fields(cls)} - {"log"}
        return cls(**{name: known[name] for name in own}, log=log)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of a checkpoint.

    Attributes:
      train: the training state, one copy.
      metadata: what is saved beside it.
    """

    train: TrainState
    metadata: RunMetadata

    @property
    def step(self) -> int:
        """The number of steps so far, also of those whose update was skipped."""
        return int(self.train.step)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_row(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return _is_count(value[0]) and _contains(dict, _is_number)(value[1])


def _contains(kind: type, is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns a test for a list, or for a dictionary, whose values are all valid."""
    return lambda value: (
        isinstance(value, kind) and all(map(is_valid, value.values() if kind is dict else value))
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "parent": _contains(dict, _is_number),
    "label_names": _contains(list, _is_text),
    "evaluated": lambda value: isinstance(value, bool),
    "train_seconds": lambda value: _is_number(value) and 0 <= value < 1e12,
    "rows": lambda value: isinstance(value, list | tuple) and all(map(_is_row, value)),
    "skipped": _is_count,
    "steps": _is_count,
    "sizes": _contains(dict, _is_count),
    "data": _contains(dict, _is_text),
    "teacher": lambda value: value is None or _is_text(value),
}
