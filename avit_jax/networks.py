"""Trained networks from Python: loads them from anywhere, and predicts images."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax import run_config, zoo
from avit_jax.data import class_names
from avit_jax.models import pretrained
from avit_jax.models.pretrained import PretrainedAViT
from avit_jax.utils import errors, files
from avit_jax.weights import locate, positions, tensor_files, weight_files

_MOST_IMAGES = 64  # that `make_adaptive` measures
_logger = logging.getLogger(__name__)


def load(
    where: epath.PathLike,
    *,
    checkpoint: str = "last",
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> tuple[PretrainedAViT, dict[str, Any]]:
    """Loads a trained network.

    Args:
      where: the workdir of a run; a weight file, or a folder of Hugging Face or timm; a name on the
        Hugging Face hub, such as `timm/deit_tiny_patch16_224.fb_in1k`, also after `hf-hub:`; or a
        name of the zoo, such as `digits`.
      checkpoint: of a workdir: "last" or "best".
      image_size: pixels, one number or (height, width), for a weight file that does not give it;
        default: the size that the position embeddings fit.
      num_heads: of the attention, for a weight file that does not give it; default: heads have 64
        channels.

    Returns:
      The network and its parameters, for `predict`, or for
      `model.apply({"params": params}, images)` with normalized images.

    Raises:
      errors.UserError: there is no such network, or it cannot be read.

    Examples:
      >>> model, params = avit_jax.load("digits")
      >>> print(avit_jax.predict(model, params, "photo.png")[0].top5)
    """
    where = _locate(where)
    if tensor_files.is_weights(where):
        model, file = _describe_weights(where, image_size, num_heads)
        return model, weight_files.to_params(file, model, name=str(where))
    return _from_run(where, checkpoint)


def describe(where: epath.PathLike) -> PretrainedAViT:
    """Returns the network that `load` returns, without its parameters.

    It runs nothing on a device. So a recipe may call it.

    Raises:
      errors.UserError: there is no such network, or it cannot be read.
    """
    where = _locate(where)
    if tensor_files.is_weights(where):
        return _describe_weights(where, None, None)[0]
    from avit_jax.training import build

    config = run_config.get_config(os.fspath(where))
    config.train.adaptive = False
    return prepared(build.model(config), config, ())


def _locate(where: epath.PathLike) -> epath.PathLike:
    """Returns the path or the name on the hub of a network that exists."""
    where = locate.locate(files.resolve(os.fspath(where), "the network"))
    is_hub = str(where).startswith(tensor_files.HUB)
    if not (is_hub or "://" in str(where) or pathlib.Path(where).exists()):
        raise errors.UserError(
            f"there is no {where}: name the workdir of a run, a weight file, hf-hub:owner/name, or "
            f"a network of the zoo ({', '.join(zoo.NETWORKS)})."
        )
    return where


def _from_run(where: epath.PathLike, checkpoint: str) -> tuple[PretrainedAViT, dict[str, Any]]:
    from avit_jax.training import announce, build, restore

    with announce.quiet():
        saved = run_config.read(where)
        config = saved.config if saved else restore.saved_config(where)
        config.eval.checkpoint = checkpoint
        config_lib.check(config)
        model = build.model(config).clone(removal=None)
        params, names = restore.trained(config, model, where)
    return prepared(model, config, names), params


def _describe_weights(
    where: epath.PathLike, image_size: int | tuple[int, int] | None, num_heads: int | None
) -> tuple[PretrainedAViT, weight_files.WeightFile]:
    path = tensor_files.find(where)
    file, saved = weight_files.read(path), run_config.read(path)
    if num_heads and file.num_heads not in (None, num_heads):
        raise errors.UserError(
            f"{where} gives num_heads={file.num_heads}, and load got num_heads={num_heads}: "
            "leave it out."
        )
    file = dataclasses.replace(file, num_heads=file.num_heads or num_heads)
    if image_size is None:
        size = saved.config.model.image_size if saved else _image_size(file, path)
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if min(size) < 1:
        raise errors.UserError(f"image_size must be at least 1; got {image_size}.")
    model, file = weight_files.describe(file, image_size=size, name=str(where))
    if saved:
        return prepared(model, saved.config, saved.label_names), file
    how = _preprocessing(path) or _preprocessing(_fetch_preprocessing(where, path))
    if not how:
        _logger.warning(
            "%s does not give mean and std of its images: usual ones are assumed; to change them, "
            "call model.clone(mean=..., std=...)",
            where,
        )
    names = file.label_names or ()
    names = names if len(names) == model.num_classes else ()
    names = class_names.of_classes(names, model.num_classes)
    return pretrained.of_model(model, label_names=names, **how), file


def prepared(model: Any, config: ConfigDict, label_names: Iterable[str]) -> PretrainedAViT:
    """Returns a network with the preprocessing of a configuration and the names of its classes."""
    return pretrained.of_model(
        model,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        crop_ratio=config.data.crop_ratio,
        value_range=tuple(config.data.range),
        sigmoid=config.loss.sigmoid,
        label_names=class_names.of_classes(tuple(label_names), model.num_classes),
    )


def _image_size(file: weight_files.WeightFile, path: pathlib.Path) -> tuple[int, int]:
    """Returns the size of the images that the position embeddings of a file fit."""
    try:
        patch_size = file.tensors["patch_embed.proj.weight"].shape[-1]
        if file.attributes.get("rope_theta"):
            if file.grid is None:
                raise errors.UserError(
                    f'{path} does not give the size of its images: write "image_size" into the '
                    "config.json beside it, or call load(..., image_size=(height, width))."
                )
            return file.grid[0] * patch_size, file.grid[1] * patch_size
        whole = file.tensors["pos_embed"].shape[1]
    except (KeyError, IndexError) as error:
        raise errors.UserError(f"{path} holds no vision transformer that can be run.") from error
    count = max(0, whole - positions.num_prefix_tokens(file.tensors))
    is_known = "position_class" in file.attributes  # then `read` has added those of prefix tokens
    count = count if is_known or _is_square(count) or not _is_square(whole) else whole
    side = math.isqrt(count)
    if file.grid is None and side * side != count:
        raise errors.UserError(
            f"{path} has position embeddings for {count} patches, which do not form a square: "
            "call load(..., image_size=(height, width))."
        )
    if file.grid is None:
        message = (
            "%s does not give the size of its images: %d x %d pixels are assumed, since its %d "
            "patches may form a square; for another size, call load(..., image_size=(height, "
            "width))"
        )
        size = side * patch_size
        _logger.warning(message, errors.printable(str(path)), size, size, count)
    rows, columns = file.grid or (side, side)
    return rows * patch_size, columns * patch_size


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _fetch_preprocessing(where: epath.PathLike, path: pathlib.Path) -> pathlib.Path:
    """Downloads Hugging Face's file with mean and std, if `where` is a name on the hub."""
    if not str(where).startswith(tensor_files.HUB):
        return path
    with contextlib.suppress(Exception):  # no such file: then the defaults are assumed
        from huggingface_hub import hf_hub_download

        name = str(where).removeprefix(tensor_files.HUB)
        return pathlib.Path(hf_hub_download(name, "preprocessor_config.json"))
    return path


def _preprocessing(path: pathlib.Path) -> dict[str, Any]:
    """Returns mean, std and crop_ratio from the files beside a weight file; empty if unknown."""
    for name in ("config.json", "preprocessor_config.json"):
        try:
            content = json.loads(path.with_name(name).read_text())
            section = {**content, **(content.get("pretrained_cfg") or {})}
            how = {
                key: tuple(float(x) for x in section.get(key) or section[f"image_{key}"])
                for key in ("mean", "std")
            }
            if not all(map(math.isfinite, how["mean"])) or not all(x > 0 for x in how["std"]):
                continue
            return how | {"crop_ratio": float(section.get("crop_pct") or 0.875)}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # `weight_files.read` reports a config.json that makes no sense
    return {}


def make_adaptive(
    where: epath.PathLike,
    images: epath.PathLike | np.ndarray | Iterable[Any] = (),
    *,
    budget: float = 0.6,
    checkpoint: str = "last",
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Any:
    """Adds a gate to any trained network, and measures what it costs; nothing is trained.

    Tokens that resemble an earlier token merge into it. One threshold of this similarity, for all
    images, brings the MACs ratio on the given images to the budget.

    Args:
      where: a network without a gate, as in `load`.
      images: typical images, as in `predict`. Of more than 64 images, 64 of equal distance are
        used.
      budget: MACs as a ratio to those of the network without a gate, above 0 and at most 1.
      checkpoint: as in `load`.
      image_size: as in `load`.
      num_heads: as in `load`.

    Returns:
      An `avit_jax.inference.adapt.Adapted`, with `model` and `params` for `predict`, `save` and
      fine-tuning; `macs_ratio`; `agreement`, the fraction of images whose class stays the same;
      `similarity` of the logits or features. All are measured on these images, without training.
      Other images differ, most of all if these are few. If the cost jumps over the budget,
      `macs_ratio` is above it, and a warning says so.

    Raises:
      errors.UserError: the network cannot be read or has a gate already, there is no image, or the
        budget is out of reach.

    Examples:
      >>> found = avit_jax.make_adaptive("hf-hub:timm/vit_small_patch14_dinov2.lvd142m", "photos/")
      >>> print(found.macs_ratio, found.similarity)
    """
    from avit_jax.data import augment
    from avit_jax.inference import adapt
    from avit_jax.tools import predict as tool

    model, params = load(where, checkpoint=checkpoint, image_size=image_size, num_heads=num_heads)
    if model.halting is not None:
        raise errors.UserError(
            f"{where} has a gate already: use avit_jax.load, and --mode=calibrate for another "
            "budget."
        )
    pixels = tool.read_images(model, images, most=_MOST_IMAGES)
    try:
        found = adapt.add_gate(
            model, params, augment.normalize(pixels, model.mean, model.std), budget=budget
        )
    except ValueError as error:
        raise errors.UserError(errors.first_line(error)) from error
    if abs(found.macs_ratio - budget) > adapt.RATIO_TOLERANCE:
        message = "no gate bias meets the MACs ratio %g: the cost jumps over it; the ratio is %.3f"
        _logger.warning(message, budget, found.macs_ratio)
    return found


def predict(
    model: Any,
    params: Any,
    images: epath.PathLike | np.ndarray | Iterable[Any],
) -> list[Any]:
    """Predicts the classes of images, and the layers that each token uses.

    Compiles at the first call; later calls for the same network run at once.

    Args:
      model: from `load`; any other `AViT` gets ImageNet's mean and std.
      params: its parameters.
      images: one image or several: paths of image files or of folders, or uint8 arrays `(H, W, C)`
        or `(B, H, W, C)` of pixels from 0 to 255. Images of another size are resized and cropped.

    Returns:
      A `avit_jax.tools.predict.Prediction` per image, in order. Files that cannot be read are left
      out with a warning.

    Raises:
      errors.UserError: there is no image, or an array is no image.
    """
    from avit_jax.tools import predict as tool

    if not isinstance(model, PretrainedAViT):
        names = class_names.of_classes((), model.num_classes)
        model = pretrained.of_model(model, label_names=names)
    return list(tool.predict_images(model.clone(removal=None), params, images))
