"""What a run starts from: random weights, a weight file, or its last checkpoint."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax import run_config
from avit_jax.models import vit
from avit_jax.training import announce, build, distributed
from avit_jax.training.checkpoint import Checkpoints
from avit_jax.training.state import RunMetadata, RunState, TrainState
from avit_jax.utils import errors
from avit_jax.weights import locate, tensor_files, weight_files

_logger = logging.getLogger(__name__)
_Params = dict[str, Any]
_PREDICTION = {"data.mean", "data.std", "data.range", "loss.sigmoid"}  # keys that predictions use


def begin(
    create: Callable[[], TrainState],
    initial_params: Callable[[], _Params] | None,
    checkpoints: Checkpoints | None,
    current: RunMetadata,
    *,
    steps: int,
    allow_changed_config: bool = False,
) -> RunState:
    """Returns the last checkpoint of a run, or a new run if there is none; on all processes.

    Args:
      create: returns a random state.
      initial_params: returns the parameters to start from; None: the random ones.
      checkpoints: of the run; None on all processes but the first.
      current: metadata of a new run.
      steps: of the whole run.
      allow_changed_config: accepts a checkpoint of another configuration or data set.

    Raises:
      errors.UserError: the checkpoint or the initial parameters do not fit the run.
    """
    state, metadata = _zeros(create), current
    if checkpoints is not None and checkpoints.step() is not None:
        state, saved = checkpoints.restore(state)
        saved = RunMetadata.from_json(saved)
        if not allow_changed_config:
            _check_unchanged(saved, current)
        if int(state.step) > steps:
            raise errors.UserError(
                f"the checkpoint is of step {int(state.step)}, beyond config.train.steps, {steps}: "
                "raise config.train.steps, or set another --workdir."
            )
        _logger.info("continuing from the checkpoint of step %d", int(state.step))
        metadata = dataclasses.replace(
            saved, config=current.config, label_names=current.label_names, data=current.data
        )
    metadata = RunMetadata.from_json(distributed.from_first_json(metadata.to_json()))
    if distributed.from_first_json(int(state.step)):
        return RunState(train=distributed.from_first(state), metadata=metadata)
    params = initial_params() if initial_params else {}
    with announce.compiling("the initial state"):
        state = jax.jit(create)()
    if params:
        params = {**state.params, **params}  # the file may lack some, such as the gate's
        ema_params = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
        state = state.replace(params=params, ema_params=ema_params)
    return RunState(train=state, metadata=metadata)


def _check_unchanged(saved: RunMetadata, current: RunMetadata) -> None:
    """Raises errors.UserError if configuration, classes or data changed since the run started."""
    config_lib.check_same(current.config, saved.config)
    mismatch = changed_class(saved.label_names, current.label_names) or changed_data(
        saved.data, current.data
    )
    if mismatch:
        raise errors.UserError(
            f"{mismatch}: restore the old data, or continue with --allow_changed_config."
        )


def changed_class(saved: list[str], current: list[str]) -> str:
    """Returns in words which class names changed since training; "" if none changed."""
    if len(saved) != len(current):
        return (
            f"the data set has {len(current)} classes, and had {len(saved)} when the network was "
            "trained"
        )
    for i, (before, now) in enumerate(zip(saved, current, strict=True)):
        if before != now:
            return f'class {i} of the data set is "{now}", and was "{before}" in training'
    return ""


def changed_data(saved: dict[str, str], current: dict[str, str]) -> str:
    """Returns in words which split changed since the run started; "" if none changed.

    Runs of older versions did not save the fingerprints; their data cannot be compared.
    """
    for split in current if saved else ():
        if saved.get(split) != current[split]:
            return (
                f"the {split} split has other files, or another number of images, than when the "
                "run started"
            )
    return ""


def _zeros(create: Callable[[], TrainState]) -> TrainState:
    """Returns zeros of the shapes and dtypes of what `create` would return."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(create))


def initial_params(config: ConfigDict, model: vit.AViT) -> _Params:
    """Returns the parameters that `config.init` names, fitted to the model."""
    how = {"new_head": config.init_new_head, "grid": config.init_grid}
    how["antialias"] = config.init_antialias
    file = weights_of(config.init, ema=config.init_ema)
    return weight_files.to_params(file, model, name=config.init, **how)


def weights_of(path: epath.PathLike, *, ema: bool = False) -> weight_files.WeightFile:
    """Reads weights; the same on all processes.

    Args:
      path: a weight file, a name on the hub or of the zoo, or the workdir of a run, whose last
        checkpoint is read.
      ema: as in `weight_files.read`. A workdir gives its moving average if it has one.

    Raises:
      errors.UserError: the weights cannot be read.
    """
    path = locate.locate(path)
    if distributed.from_first_json(tensor_files.is_weights(path)):
        file = weight_files.read(path, ema=ema)
        distributed.check_same(weight_files.fingerprint(file), path)
        return file
    config = saved_config(path)
    model = build.model(config).clone(removal=None)
    config.eval.checkpoint = "last"
    return weight_files.to_file(params(config, model, path)[0], model)


def saved_config(workdir: epath.PathLike) -> ConfigDict:
    """Returns the configuration in the last checkpoint of a run; the same on all processes."""
    saved: dict[str, Any] = {}
    if distributed.is_first():
        with Checkpoints(workdir, read_only=True) as checkpoints:
            saved = RunMetadata.from_json(checkpoints.extra()).config
    return config_lib.from_json(distributed.from_first_json(saved))


def params(
    config: ConfigDict, model: vit.AViT, workdir: epath.PathLike
) -> tuple[_Params, RunMetadata | None]:
    """Returns the parameters that `config.eval.checkpoint` selects, and their metadata.

    Args:
      config: of the run.
      model: the network.
      workdir: of the run; not read if `config.eval.checkpoint` is "init".

    Returns:
      Parameters of a checkpoint and its metadata; or parameters of `config.init` and None.

    Raises:
      errors.UserError: there is no such checkpoint, or it does not fit the configuration.
    """
    if config.eval.checkpoint == "init":
        return initial_params(config, model), None
    state, saved = _zeros(build.creation(config, model)), {}
    if distributed.is_first():
        with Checkpoints(workdir, read_only=True) as checkpoints:
            state, saved = checkpoints.restore(state, config.eval.checkpoint)
        saved = RunMetadata.from_json(saved).to_json()
    metadata = RunMetadata.from_json(distributed.from_first_json(saved))
    return distributed.from_first(state.eval_params), metadata


def trained(
    config: ConfigDict, model: vit.AViT, checkpoint: epath.PathLike
) -> tuple[_Params, list[str]]:
    """Returns the parameters of a workdir or a weight file, and its class names; [] if unknown.

    Raises:
      errors.UserError: the parameters cannot be read, or do not fit.
    """
    if distributed.from_first_json(tensor_files.is_weights(checkpoint)):
        how = {"grid": config.init_grid, "antialias": config.init_antialias}
        weights = weight_files.load(checkpoint, model, ema=config.init_ema, **how)
        return weights, _names_in(checkpoint)
    weights, metadata = params(config, model, checkpoint)
    if metadata is None:
        return weights, []
    _warn_of_differences(config, metadata)
    return weights, metadata.label_names


def class_names(config: ConfigDict, metadata: RunMetadata | None) -> list[str]:
    """Returns the class names of what `params` has read; [] if unknown."""
    if metadata is not None:
        return metadata.label_names
    is_file = config.init and distributed.from_first_json(tensor_files.is_weights(config.init))
    return _names_in(config.init) if is_file else []


def _names_in(weights: epath.PathLike) -> list[str]:
    saved = run_config.read(tensor_files.find(weights))
    return list(saved.label_names) if saved else []


def _warn_of_differences(config: ConfigDict, metadata: RunMetadata) -> None:
    """Warns if a network is used with other settings than in training."""
    now = config_lib.flat(config_lib.to_json(config))
    before = config_lib.saved_values(metadata.config)
    for key in sorted(now.keys() - {"model.remat", "model.drop_path", "model.dropout"}):
        used = key.startswith(("model.", "halting.")) or key in _PREDICTION
        if used and now[key] != before[key]:
            _logger.warning(
                "config.%s is %s, and the network was trained with %s", key, now[key], before[key]
            )
