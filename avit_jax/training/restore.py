"""What a run starts from: random weights, a weight file, or its last checkpoint."""

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.data import sources
from avit_jax.models import vit
from avit_jax.training import build, distributed, evaluate, progress
from avit_jax.training.checkpoint import Checkpoints
from avit_jax.utils import errors
from avit_jax.weights import tensor_files, weight_files

_logger = logging.getLogger(__name__)


class Teacher(NamedTuple):
    """A network that does not learn: its model, its parameters, and the SHA-256 of both."""

    model: vit.AViT
    params: Any
    fingerprint: str


def to_keep(
    config: ConfigDict, training: sources.Source, evaluation: sources.Source
) -> dict[str, Any]:
    """Returns what each checkpoint holds beside the state, to detect other data on resume."""
    data = {"training": training.fingerprint(), "evaluation": evaluation.fingerprint()}
    return {
        "config": json.loads(config.to_json_best_effort()),
        "label_names": training.label_names,
        "data": data,
    }


def begin(
    config: ConfigDict,
    model: vit.AViT,
    create: Callable[[], build.TrainState],
    checkpoints: Checkpoints | None,
    kept: dict[str, Any],
    allow_changed_config: bool,
) -> tuple[build.TrainState, dict[str, Any]]:
    """The state of the last checkpoint and what was saved beside it, on all processes; a new one
    and {} where there is none.

    `create` returns the new one, and `kept` is of `to_keep`.
    """
    state, past = _of_its_shapes(create), {}
    if checkpoints is not None and checkpoints.step() is not None:
        state, past = checkpoints.restore(state)
        progress.check_past(past)
        if not allow_changed_config:
            config_lib.check_same(config, past["config"])
            odd = changed_class(past, kept["label_names"]) or _changed_data(past, kept["data"])
            if odd:
                raise errors.UserError(
                    f"{odd}: bring it back, or go on all the same with --allow_changed_config."
                )
        if int(state.step) > config.train.steps:
            raise errors.UserError(
                f"the checkpoint is of step {int(state.step)}, beyond config.train.steps, "
                f"{config.train.steps}: raise it, "
                "or set another --workdir."
            )
        _logger.info("going on from the checkpoint of step %d", int(state.step))
    past = distributed.from_first_json(past)
    if past:
        return distributed.from_first(state), past
    if not config.init:
        return jax.jit(create)(), {}
    params = _adopted(config, model)
    state = jax.jit(create)()
    params = {**state.params, **params}  # what no file holds starts as it is created
    return state.replace(
        params=params,
        ema_params=None if state.ema_params is None else jax.tree.map(jnp.copy, params),
    ), {}


def _adopted(config: ConfigDict, model: vit.AViT) -> dict[str, Any]:
    """The parameters that `config.init` names."""
    how = {"new_head": config.init_new_head, "grid": config.init_grid}
    return weight_files.to_params(weights_of(config.init), model, name=config.init, **how)


def changed_class(past: dict[str, Any], label_names: list[str]) -> str:
    """The first class of another name than when the network was trained, in words; empty where
    there is none.
    """
    then = past.get("label_names", label_names)
    odd = [
        i for i, (before, now) in enumerate(zip(then, label_names, strict=False)) if before != now
    ]
    if len(then) != len(label_names):
        return (
            f"the data set has {len(label_names)} classes, and had {len(then)} when the "
            "network was trained"
        )
    return (
        f'class {odd[0]} of the data set is "{label_names[odd[0]]}", and was "{then[odd[0]]}" in '
        "training"
        if odd
        else ""
    )


def _changed_data(past: dict[str, Any], data: dict[str, str]) -> str:
    """Which of the splits holds other files, or another number of pictures, than when the run
    began; empty where none does.
    """
    then = past.get("data") or data  # of an older run nothing is known
    odd = [split for split in data if then.get(split) != data[split]]
    return (
        f"the {odd[0]} split has other files, or another number of pictures, than when the run "
        "began"
        if odd
        else ""
    )


def _of_its_shapes(create: Callable[[], build.TrainState]) -> build.TrainState:
    """Zeros of the shapes and dtypes of what `create` would return."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(create))


def evaluate_before(
    config: ConfigDict,
    model: vit.AViT,
    params: Any,
    teacher: Teacher | None,
    past: dict[str, Any],
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Accuracies that are known before training, which its own is to be measured against.

    `parent_top1` of the static network that a halting one starts from, and `teacher_top1`, where
    there are such; from `past`, what was saved of the run so far, where it is known. None where
    `stop` has ended it.
    """
    known = past.get("parent", {})
    before = {name: value for name, value in known.items() if name == "parent_top1"}
    if not past and config.init and not config.init_new_head and model.halting is not None:
        static = model.clone(halting=None, removal=None)
        weights = {name: value for name, value in params.items() if name != "gate"}
        before["parent_top1"] = _top1(
            config, static, weights, f"the static network of {config.init}, before training", stop
        )
    if teacher is not None and past.get("teacher") == teacher.fingerprint:
        before["teacher_top1"] = known["teacher_top1"]
    elif teacher is not None:
        before["teacher_top1"] = _top1(
            config, teacher.model, teacher.params, f"the teacher {config.distill.teacher}", stop
        )
    return None if None in before.values() else before


def _top1(
    config: ConfigDict, model: vit.AViT, params: Any, name: str, stop: Callable[[], bool]
) -> float | None:
    results = evaluate.Evaluator(config, model)(evaluate.replicate(params), stop)
    if results is None:
        return None
    _logger.info("%s: top-1 %.2f%%", name, 100 * results["top1"])
    return float(results["top1"])


def weights_of(path: epath.PathLike) -> weight_files.WeightFile:
    """The weights of a file, of a name on the hub, or of the last checkpoint of a run's workdir;
    the same on all processes.

    Raises:
      errors.UserError: it cannot be read.
    """
    if distributed.from_first_json(tensor_files.is_weights(path)):
        file = weight_files.read(path)
        distributed.check_same(weight_files.fingerprint(file), path)
        return file
    past: dict[str, Any] = {}
    if distributed.is_first():
        with Checkpoints(path, read_only=True) as checkpoints:
            past = checkpoints.extra()
        progress.check_past(past)
    past = distributed.from_first_json(past)
    config = config_lib.from_json(past["config"])
    model = build.model(config).clone(removal=None)
    config.eval.checkpoint = "last"
    return weight_files.to_file(params(config, model, path)[0], model)


def teacher(
    config: ConfigDict, model: vit.AViT, past: dict[str, Any], allow_changed: bool = False
) -> Teacher | None:
    """The teacher that `config.distill.teacher` names, if any.

    Args:
      config: of the run.
      model: that is to be taught.
      past: what was saved of the run so far; empty at its start.
      allow_changed: another teacher than the one the run began with will do too.

    Raises:
      errors.UserError: it cannot be read, does not fit the model, or is not the one the run began
        with.
    """
    name = config.distill.teacher
    if not name:
        return None
    file = weights_of(name)
    network, weights = weight_files.infer(file, image_size=model.pixels, name=name)
    for key in ("num_classes", "channels"):
        if getattr(network, key) != getattr(model, key):
            raise errors.UserError(
                f"the teacher {name} has a {key} of {getattr(network, key)}, and the model "
                f"{getattr(model, key)}: take another."
            )
    fingerprint = weight_files.fingerprint(file)
    if not allow_changed and past and past.get("teacher") not in (None, fingerprint):
        raise errors.UserError(
            f"the teacher {name} has changed since the run began: bring it back, or set another "
            "--workdir."
        )
    return Teacher(network.clone(dtype=model.dtype), weights, fingerprint)


def params(
    config: ConfigDict, model: vit.AViT, workdir: epath.PathLike
) -> tuple[Any, dict[str, Any]]:
    """The parameters that are evaluated, of a checkpoint of `workdir` or `config.init`, and what
    was saved beside them.

    `config.eval.checkpoint` tells which.

    Raises:
      errors.UserError: no such checkpoint, or it does not fit the configuration.
    """
    if config.eval.checkpoint == "init":
        return _adopted(config, model), {"train_seconds": 0.0}
    state = _of_its_shapes(build.creation(config, model))
    past: dict[str, Any] = {}
    if distributed.is_first():
        with Checkpoints(workdir, read_only=True) as checkpoints:
            state, past = checkpoints.restore(state, config.eval.checkpoint)
        progress.check_past(past)
    return distributed.from_first(state.eval_params), distributed.from_first_json(past)


def trained(
    config: ConfigDict, model: vit.AViT, checkpoint: epath.PathLike
) -> tuple[Any, list[str]]:
    """Parameters of a run's workdir or of a weight file, and the names of the classes as far as
    they are known.

    Raises:
      errors.UserError: it cannot be read, or does not fit.
    """
    if not distributed.from_first_json(tensor_files.is_weights(checkpoint)):
        weights, past = params(config, model, checkpoint)
        _warn_of_differences(config, past)
        return weights, past.get("label_names", [])
    return weight_files.load(checkpoint, model, grid=config.init_grid), []


def _warn_of_differences(config: ConfigDict, past: dict[str, Any]) -> None:
    """Tells where a network is used otherwise than it was trained."""
    if "config" not in past:
        return
    now, then = (
        config_lib.flat(json.loads(config.to_json_best_effort())),
        config_lib.of_then(past["config"]),
    )
    for key in sorted(
        key for key in now if key.startswith(("model.", "halting.", "data.mean", "data.std"))
    ):
        if now[key] != then[key] and key not in ("model.remat", "model.drop_path", "model.dropout"):
            _logger.warning(
                "config.%s is %s, and the network was trained with %s", key, now[key], then[key]
            )
