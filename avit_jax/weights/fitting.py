"""Fits the content of a weight file to a model. See `weight_files`."""

import dataclasses
import json
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
from avit_jax.weights import architecture, name_maps
from avit_jax.weights.positions import fit_positions, num_prefix_tokens, with_prefix
from avit_jax.weights.reading import WeightFile, read

_HEAD_WIDTH = 64  # channels of a head in all common vision transformers
_MAX_NAMED = 12  # mismatches in one message
_logger = logging.getLogger(__name__)


def load(
    path: epath.PathLike,
    model: vit.AViT,
    *,
    grid: Sequence[int] = (),
    ema: bool = False,
    antialias: bool = False,
) -> dict[str, Any]:
    """Returns the parameters of a model from a weight file; see `read` and `to_params`."""
    file = read(path, ema=ema)
    return to_params(file, model, name=str(path), grid=grid, antialias=antialias)


def to_params(
    file: WeightFile,
    model: vit.AViT,
    *,
    name: str,
    new_head: bool = False,
    grid: Sequence[int] = (),
    antialias: bool = False,
) -> dict[str, Any]:
    """Returns the parameters of a model from the content of a file.

    A log line names what the file does not give and the model assumes. If the model's gate is
    learnable, its gamma and beta come from the file. If the model halts, a warning reports a gate
    of the file that differs otherwise.

    Args:
      file: the content.
      model: the model that it must fit.
      name: of the file, for messages.
      new_head: as in `fit`.
      grid: (rows, columns) of patches of the file's position embeddings; empty if unknown.
      antialias: as in `positions.resize_positions`.

    Raises:
      errors.UserError: the tensors do not fit, or the file has another number of heads, another
        epsilon of the layer norms, another grid, or another pooling or activation.
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
    _check_attributes(file, model, name=name, new_head=new_head)
    tensors = file.tensors
    if new_head and model.pool != "map":
        tensors = {key: x for key, x in tensors.items() if not key.startswith(architecture.POOL)}
    if file.attributes.get("position_class") is False and grid:
        has_none = np.shape(tensors.get("pos_embed"))[1:2] == (math.prod(grid),)
        tensors = with_prefix(tensors) if has_none else tensors
    params = fit(tensors, model, new_head=new_head, grid=grid, antialias=antialias, name=name)
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


def _check_attributes(file: WeightFile, model: vit.AViT, *, name: str, new_head: bool) -> None:
    """Compares what the tensors do not show; a log line names what nothing gives."""
    ours = architecture.of_model(model)
    given = {"num_heads": file.num_heads, "norm_eps": file.norm_eps}
    shown = architecture.of_tensors(file.tensors) | file.attributes
    given |= {key: shown.get(key) for key in architecture.UNSEEN}
    for key in architecture.UNSEEN:
        if given[key] in (None, ours[key]):
            continue
        if (key == "pool" and new_head) or {given[key], ours[key]} == {"gelu", "gelu_tanh"}:
            message = "%s has %s=%s, and the model %s"
            _logger.warning(message, errors.printable(name), key, given[key], ours[key])
        else:
            raise errors.UserError(
                f"{name} has {key}={given[key]}: set --config.model.{key}={given[key]}."
            )
    if "pos_embed" in file.tensors and num_prefix_tokens(file.tensors):
        given["position_class"] = file.attributes.get("position_class")
    unknown = {key: getattr(model, key) for key, value in given.items() if value is None}
    assumed = ", ".join(f"{key}={value}" for key, value in unknown.items())
    if unknown.keys() - {"norm_eps"}:
        message = (
            "%s does not give these values, which are assumed: %s. It is also assumed that norms "
            'come before the branches%s. If a value is wrong, correct it in {"model_args": %s}, '
            "and save this as config.json beside the file"
        )
        plain = "" if model.rope_theta else ", and without rotary position embeddings"
        args = json.dumps(architecture.to_config(unknown, shown))
        _logger.warning(message, errors.printable(name), assumed, plain, args)
    elif unknown:
        _logger.info("%s does not give %s: assumed", errors.printable(name), assumed)


def infer(
    file: WeightFile, *, image_size: tuple[int, int], name: str
) -> tuple[vit.AViT, dict[str, Any]]:
    """Returns the model that a file belongs to, and its parameters; see `describe`.

    Raises:
      errors.UserError: the file holds no complete vision transformer.
    """
    model, file = describe(file, image_size=image_size, name=name)
    return model, to_params(file, model, name=name)


def describe(
    file: WeightFile, *, image_size: tuple[int, int], name: str
) -> tuple[vit.AViT, WeightFile]:
    """Returns the model that a file belongs to, and the file with all tensors of this model.

    It runs nothing on a device.

    If the file does not give the number of heads, heads have 64 channels, as in all common vision
    transformers. If it gives no pooling, the class token is read out, or the average of the patch
    tokens if there is none. Without a classifier, the model has no classes.

    Args:
      file: the content.
      image_size: (height, width) of the images in pixels.
      name: of the file, for messages.

    Raises:
      errors.UserError: the file holds no complete vision transformer.
    """
    try:
        tensors = file.tensors
        width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
        ratio = hidden / width
        if not file.num_heads and width % _HEAD_WIDTH:
            raise ValueError(
                f"neither it nor a config.json beside it gives num_heads, and {width} channels "
                f"are not heads of {_HEAD_WIDTH}"
            )
        grid = tuple(side // patch_size for side in image_size)
        attributes = _inferred_attributes(file, grid)
        if attributes.get("position_class") is False:
            tensors = with_prefix(tensors) if "position_class" not in file.attributes else tensors
        model = vit.AViT(
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            width=width,
            depth=len([key for key in tensors if key.endswith("attn.qkv.weight")]),
            num_heads=file.num_heads or width // _HEAD_WIDTH,
            mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
            num_classes=len(tensors.get("head.weight", ())),
            distilled="dist_token" in tensors,
            norm_eps=file.norm_eps or vit.AViT.norm_eps,
            halting=halting.HaltingConfig(**file.gate) if file.gate else None,
            **{key: attributes[key] for key in attributes.keys() & architecture.PLAIN.keys()},
        )
        model.check()
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise errors.UserError(
            f"{name} holds no vision transformer that can be run: {errors.first_line(error)}"
        ) from error
    return model, dataclasses.replace(file, tensors=tensors)


def _inferred_attributes(file: WeightFile, grid: tuple[int, ...]) -> dict[str, Any]:
    """Returns the attributes of a file, and assumptions about the others."""
    attributes = architecture.of_tensors(file.tensors) | file.attributes
    pooled = not attributes["class_token"] or attributes["fc_norm"]
    attributes.setdefault("pool", "avg" if pooled else "token")
    if "position_class" not in attributes and "pos_embed" in file.tensors:
        count = np.shape(file.tensors["pos_embed"])[1]
        patches = count - num_prefix_tokens(file.tensors)
        for whole in (math.prod(file.grid or grid), math.isqrt(max(0, patches)) ** 2):
            if whole in (patches, count):
                break
        else:
            whole = math.isqrt(count) ** 2
        attributes["position_class"] = not (patches != whole == count)
    return attributes


def fit(
    tensors: Mapping[str, np.ndarray],
    model: vit.AViT,
    *,
    new_head: bool = False,
    grid: tuple[int, int] | None = None,
    antialias: bool = False,
    name: str = "the file",
) -> dict[str, Any]:
    """Returns the parameters of a model from tensors; resizes position embeddings if necessary.

    The patch embedding of RGB images is converted for a model of grey images, and the reverse.

    Args:
      tensors: timm's name -> array.
      model: the model that they must fit.
      new_head: whether classifiers start at zero if they are missing or have other classes.
      grid: (rows, columns) of patches of the position embeddings; None if unknown.
      antialias: as in `positions.resize_positions`.
      name: of the file, for messages.

    Returns:
      Tree for `model.apply({"params": tree}, images)`, float32.

    Raises:
      errors.UserError: tensors are missing, unexpected, or of another shape.
    """
    tensors = dict(tensors)
    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    parts = {name: tree for name, tree in shapes.items() if name in name_maps.PARTS}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), parts)
    patch_shape = (model.patch_size, model.patch_size, model.channels)
    expected = name_maps.to_torch(zeros, patch_shape=patch_shape)
    heads = {key: array for key, array in expected.items() if key.startswith("head")}
    if new_head and any(np.shape(tensors.get(key)) != x.shape for key, x in heads.items()):
        tensors |= heads
    if "norm_pre.weight" in tensors and "patch_embed.proj.bias" not in tensors:
        tensors["patch_embed.proj.bias"] = expected["patch_embed.proj.bias"]  # CLIP has none
    _fit_channels(tensors, model.channels, name)
    _fit_positions(tensors, expected, model, grid=grid, antialias=antialias, name=name)
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


def _fit_channels(tensors: dict[str, np.ndarray], channels: int, name: str) -> None:
    """Converts the patch embedding between 1 and 3 channels, in place; a warning says so.

    From 3 to 1, the channels are summed up, as in timm. From 1 to 3, each channel gets a third. So
    an RGB image of equal channels gives the tokens of the grey image, if all are normalized alike.
    """
    key = "patch_embed.proj.weight"
    kernel = tensors.get(key, np.zeros(4))
    if kernel.ndim != 4 or (kernel.shape[1], channels) not in ((3, 1), (1, 3)):
        return
    kernel = kernel.astype(np.float32)
    tensors[key] = (
        kernel.sum(axis=1, keepdims=True) if channels == 1 else np.repeat(kernel / 3, 3, axis=1)
    )
    message = "%s is for images of %d channels: its patch embedding is converted to %d"
    _logger.warning(message, errors.printable(name), 4 - channels, channels)


def _fit_positions(
    tensors: dict[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    model: vit.AViT,
    *,
    grid: tuple[int, int] | None,
    antialias: bool,
    name: str,
) -> None:
    """Resizes position embeddings, in place, if all other tensors may fit."""
    ours, theirs = np.shape(expected.get("pos_embed")), np.shape(tensors.get("pos_embed"))
    if not (len(theirs) == 3 and theirs[::2] == ours[::2] and tensors.keys() == expected.keys()):
        return
    count = model.num_prefix_tokens
    has_none = not model.position_class
    if has_none and theirs[1] == math.prod(grid or model.grid) != count + math.prod(model.grid):
        tensors["pos_embed"] = with_prefix(tensors)["pos_embed"]
    tensors["pos_embed"] = fit_positions(
        tensors["pos_embed"], model.grid, count, old_grid=grid, antialias=antialias, name=name
    )
    if has_none:  # each prefix token takes its position embedding in
        prefix, tensors["pos_embed"] = np.split(tensors["pos_embed"], [count], axis=1)
        for token in ("cls_token", "dist_token", "reg_token"):
            if token in tensors:
                size = tensors[token].shape[1]
                tensors[token] = tensors[token] + prefix[:, :size]
                prefix = prefix[:, size:]


def _mismatches(tensors: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[str]:
    found = [f"{name} is missing" for name in expected if name not in tensors]
    for name, array in expected.items():
        if name in tensors and tensors[name].shape != array.shape:
            found.append(f"{name} is {tensors[name].shape} and not {array.shape}")
    return found + [f"{name} is unexpected" for name in sorted(tensors.keys() - expected.keys())]
