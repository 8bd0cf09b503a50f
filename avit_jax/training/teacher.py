"""The teacher of a distillation, and the accuracies that are measured before training."""

import dataclasses
from collections.abc import Callable
from typing import Any

from avit_jax.models import vit
from avit_jax.training import restore
from avit_jax.training.state import RunState
from avit_jax.utils import errors
from avit_jax.weights import weight_files

# Network, parameters, name, stop -> top-1 accuracy; None if stopped. See `evaluate.top1`.
Top1 = Callable[[vit.AViT, Any, str, Callable[[], bool]], float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The network whose predictions supervise the student.

    Attributes:
      name: name of its weight file or workdir.
      model: the network.
      params: its parameters.
      fingerprint: SHA-256 of the content of its weight file.
    """

    name: str
    model: vit.AViT
    params: Any
    fingerprint: str


def load(name: str, model: vit.AViT, expected: str | None = None) -> Teacher | None:
    """Loads the teacher of a network. Returns None if `name` is empty.

    Args:
      name: a weight file, a name on the hub or the workdir of a run; empty: no teacher.
      model: the student.
      expected: fingerprint of the teacher that the run started with; None accepts any teacher.

    Raises:
      errors.UserError: it is not readable, does not fit the student, or is not the expected one.
    """
    if not name:
        return None
    file = restore.weights_of(name)
    network, params = weight_files.infer(file, image_size=model.pixels, name=name)
    for key in ("num_classes", "channels"):
        if getattr(network, key) != getattr(model, key):
            raise errors.UserError(
                f"the teacher {name} has {key}={getattr(network, key)}, and the model has "
                f"{key}={getattr(model, key)}: choose another teacher."
            )
    fingerprint = weight_files.fingerprint(file)
    if expected not in (None, fingerprint):
        raise errors.UserError(
            f"the teacher {name} has changed since the run started: restore the old one, set "
            "another --workdir, or continue with --allow_changed_config."
        )
    network = network.clone(dtype=model.dtype)
    return Teacher(name=name, model=network, params=params, fingerprint=fingerprint)


def measure_baselines(
    run: RunState,
    model: vit.AViT,
    teacher: Teacher | None,
    top1: Top1,
    stop: Callable[[], bool],
    *,
    parent: str = "",
) -> dict[str, float] | None:
    """Measures the accuracies to compare the result with, unless the run already has them.

    Args:
      run: a new run, or a restored one.
      model: the network.
      teacher: of the run, if any.
      top1: measures an accuracy.
      stop: whether to stop now.
      parent: weight file that a new run starts from; its static network is measured. Empty: none.

    Returns:
      `parent_top1` if there is a parent, `teacher_top1` if there is a teacher; None if `stop` ended
      a measurement.
    """
    known = run.metadata.parent
    baselines = {name: value for name, value in known.items() if name == "parent_top1"}
    if parent and run.step == 0:
        static = model.clone(halting=None, removal=None)
        params = {name: value for name, value in run.train.params.items() if name != "gate"}
        name = f"the static network of {parent}, before training"
        baselines["parent_top1"] = top1(static, params, name, stop)
    if teacher is not None and run.metadata.teacher == teacher.fingerprint:
        baselines["teacher_top1"] = known["teacher_top1"]
    elif teacher is not None:
        name = f"the teacher {teacher.name}"
        baselines["teacher_top1"] = top1(teacher.model, teacher.params, name, stop)
    return None if None in baselines.values() else baselines
