"""Fits the content of a weight file to a model. See `weight_files`."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import name_maps
from avit_jax.weights.positions import fit_positions
from avit_jax.weights.reading import WeightFile, read

_MAX_NAMED = 12  # mismatches in one message
_logger = logging.getLogger(__name__)


def load(path: epath.PathLike, model: vit.AViT, *, grid: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the parameters of a model from a weight file; see `read` and `to_params`."""
    return to_params(read(path), model, name=str(path), grid=grid)


def to_params(
    file: WeightFile,
    model: vit.AViT,
    *,
    name: str,
    new_head: bool = False,
    grid: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns the parameters of a model from the content of a file.

    If the model's gate is learnable, its gamma and beta come from the file. If the model halts, a
    warning reports a gate of the file that differs otherwise.

    Args:
      file: the content.
      model: the model that it must fit.
      name: of the file, for messages.
      new_head: as in `fit`.
      grid: (rows, columns) of patches of the file's position embeddings; empty if unknown.

    Raises:
      errors.UserError: the tensors do not fit, or the file has another number of heads, another
        epsilon of the layer norms, or another grid.
      ValueError: the grid is not two numbers.
    """
    if len(grid) not in (0, 2):
        raise ValueError(f"grid must be the rows and columns of patches, or empty; got {grid}.")
    grid = tuple(grid) or file.grid
    if file.grid not in (None, grid):
        raise errors.UserError(
            f"{name} gives the grid {file.grid}, and config.init_grid is {grid}: remove "
            "config.init_grid."
        )
    for key in ("norm_eps", "num_heads"):
        value = getattr(file, key)
        if value is not None and value != getattr(model, key):
            raise errors.UserError(f"{name} has {key}={value}: set --config.model.{key}={value}.")
    params = fit(file.tensors, model, new_head=new_head, grid=grid, name=name)
    if file.gate and model.halting:
        gate = halting.HaltingConfig(**file.gate)
        gate = dataclasses.replace(gate, learnable=model.halting.learnable)
        if "gate" in params:
            # The learned part of a gate is a parameter like others, and no mismatch.
            params["gate"] = {key: np.float32(getattr(gate, key)) for key in params["gate"]}
            gate = dataclasses.replace(gate, gamma=model.halting.gamma, beta=model.halting.beta)
        if gate != model.halting:
            message = "%s has another gate than config.halting: %s"
            _logger.warning(message, name, file.gate)
    return params


def infer(
    file: WeightFile, *, image_size: tuple[int, int], name: str
) -> tuple[vit.AViT, dict[str, Any]]:
    """Returns the model that a file belongs to, and its parameters.

    If the file does not give the number of heads, heads have 64 channels, as in all common vision
    transformers.

    Args:
      file: the content.
      image_size: (height, width) of the images in pixels.
      name: of the file, for messages.

    Raises:
      errors.UserError: the file holds no complete vision transformer.
    """
    tensors = file.tensors
    try:
        width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        hidden = len(tensors["blocks.0.mlp.fc1.weight"])
        ratio = hidden / width
        model = vit.AViT(
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            width=width,
            depth=len([key for key in tensors if key.endswith("attn.qkv.weight")]),
            num_heads=file.num_heads or width // 64,
            mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
            num_classes=len(tensors["head.weight"]),
            distilled="dist_token" in tensors,
            norm_eps=file.norm_eps or vit.AViT.norm_eps,
            halting=halting.HaltingConfig(**file.gate) if file.gate else None,
        )
        model.check()
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise errors.UserError(
            f"{name} holds no vision transformer that can be run: {errors.first_line(error)}"
        ) from error
    return model, to_params(file, model, name=name)


def fit(
    tensors: Mapping[str, np.ndarray],
    model: vit.AViT,
    *,
    new_head: bool = False,
    grid: tuple[int, int] | None = None,
    name: str = "the file",
) -> dict[str, Any]:
    """Returns the parameters of a model from tensors; resizes position embeddings if necessary.

    Args:
      tensors: timm's name -> array.
      model: the model that they must fit.
      new_head: whether classifiers start at zero if they are missing or have other classes.
      grid: (rows, columns) of patches of the position embeddings; None if unknown.
      name: of the file, for messages.

    Returns:
      Tree for `model.apply({"params": tree}, images)`, float32.

    Raises:
      errors.UserError: tensors are missing, unexpected, or of another shape.
    """
    tensors = dict(tensors)
    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    patch_shape = (model.patch_size, model.patch_size, model.channels)
    expected = name_maps.to_torch(zeros, patch_shape=patch_shape)
    heads = {key: array for key, array in expected.items() if key.startswith("head")}
    if new_head and any(np.shape(tensors.get(key)) != x.shape for key, x in heads.items()):
        tensors |= heads
    ours, theirs = expected["pos_embed"].shape, np.shape(tensors.get("pos_embed"))
    if len(theirs) == 3 and theirs[::2] == ours[::2] and tensors.keys() == expected.keys():
        tensors["pos_embed"] = fit_positions(
            tensors["pos_embed"], model.grid, model.num_prefix_tokens, old_grid=grid, name=name
        )
    if mismatches := _mismatches(tensors, expected):
        rest = f", and {len(mismatches) - _MAX_NAMED} more" if len(mismatches) > _MAX_NAMED else ""
        hint = "" if new_head else ", or --config.init_new_head=True if only the classes differ"
        raise errors.UserError(
            f"the weights do not fit the model: {', '.join(mismatches[:_MAX_NAMED])}{rest}; set "
            f"config.model to their sizes{hint}."
        )
    params = name_maps.from_torch({key: np.asarray(tensors[key], np.float32) for key in expected})
    if "gate" in shapes:  # tensors do not hold the gate
        params["gate"] = {key: np.float32(getattr(model.halting, key)) for key in shapes["gate"]}
    return params


def _mismatches(tensors: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[str]:
    found = [f"{name} is missing" for name in expected if name not in tensors]
    for name, array in expected.items():
        if name in tensors and tensors[name].shape != array.shape:
            found.append(f"{name} is {tensors[name].shape} and not {array.shape}")
    return found + [f"{name} is unexpected" for name in sorted(tensors.keys() - expected.keys())]
