"""Predicts the classes of images, and the number of layers that compute each token."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from avit_jax import config as config_lib
from avit_jax import networks
from avit_jax.data import augment, class_names, image_files, transforms
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.models.pretrained import PretrainedAViT
from avit_jax.training import announce, build, restore
from avit_jax.utils import errors, files, visualize

_BATCH = 16  # images per batch; the last one is filled up
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction of one image.

    Attributes:
      path: of the image.
      top5: names of the most likely classes, or their numbers if the names are unknown.
      words: words for the same classes: ImageNet-1k's have synsets as names, such as n01440764.
      probabilities: of these classes. The probabilities of all classes sum to 1. If the network was
        trained with the sigmoid loss, each class has its own probability instead.
      depth: `(rows, columns)` int32, number of layers in which each patch token is computed.
      macs: MACs of the image.
      macs_ratio: `macs` as a ratio to those of the static network.
      image: `(H, W, C)` uint8, the input of the network.
    """

    path: str
    top5: list[str]
    words: list[str]
    probabilities: list[float]
    depth: np.ndarray
    macs: float
    macs_ratio: float
    image: np.ndarray

    def to_json(self) -> str:
        """Returns all fields except the image in one line."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["image"]
        return json.dumps(fields | {"depth": self.depth.tolist()})


def predict(
    config: ConfigDict, checkpoint: epath.PathLike, paths: Sequence[epath.PathLike]
) -> Iterator[Prediction]:
    """Predicts images in the order of the paths.

    Halted tokens are removed. On a GPU they are masked, which is faster for these small batches.

    Args:
      config: the recipe of the network.
      checkpoint: a weight file, or the workdir of a run; `config.eval.checkpoint` selects the
        checkpoint.
      paths: image files, and folders to search for image files.

    Yields:
      A prediction per readable image. A warning names each unreadable one.

    Raises:
      errors.UserError: a path is empty or does not exist; there is no image; or the checkpoint
        cannot be read or does not fit.
    """
    config_lib.check(config)
    model = build.model(config).clone(removal=None)
    _check_channels(model)
    if not all(os.fspath(path) for path in paths):  # pathlib would use the current folder
        raise errors.UserError(
            "the name of an image is empty: name images to predict, or folders that hold some."
        )
    found = [file for path in paths for file in _find(pathlib.Path(path))]
    if not found:
        raise errors.UserError("name images to predict, or folders that hold some.")
    params, names = restore.trained(config, model, checkpoint)
    yield from predict_images(networks.prepared(model, config, names), params, found)


def predict_images(model: PretrainedAViT, params: Any, images: Any) -> Iterator[Prediction]:
    """Predicts paths or arrays; see `avit_jax.predict` for the arguments.

    Raises:
      errors.UserError: there is no image, an array is no image, or the network has no classes.
    """
    if not model.num_classes:
        raise errors.UserError(
            "the network has no classes to predict: fine-tune it, or call model.apply for its "
            "features."
        )
    read = _read(_list(images), model)
    run = _compiled(model, jax.default_backend())
    while batch := list(itertools.islice(read, _BATCH)):
        yield from _predict_batch(run, params, batch, model)


def read_images(model: PretrainedAViT, images: Any, *, most: int) -> np.ndarray:
    """Returns images as the network needs them, uint8 `(B, H, W, C)`, without unreadable ones.

    Args:
      model: the network.
      images: paths or arrays, as in `avit_jax.predict`.
      most: largest number of images. If there are more, every n-th one is read.

    Raises:
      errors.UserError: there is no image, none is readable, or an array is no image.
    """
    found = _list(images)
    found = found[:: -(-len(found) // most)]
    pixels = [image for _, image in _read(found, model)]
    if not pixels:
        raise errors.UserError("none of the images can be read: the warnings above give reasons.")
    return np.stack(pixels)


@functools.lru_cache(maxsize=8)
def _compiled(model: PretrainedAViT, backend: str) -> Callable[..., Any]:
    """Returns the jitted network, always the same object, so that it compiles once."""
    apply = adaptive.make_apply(model, images=_BATCH)
    run = jax.jit(lambda params, images: apply({"params": params}, images))
    return announce.first_call(run, f"the network for {backend}")


def _predict_batch(
    run: Callable[..., Any],
    params: Any,
    batch: list[tuple[str, np.ndarray]],
    model: PretrainedAViT,
) -> Iterator[Prediction]:
    images = np.stack([image for _, image in batch] + [batch[0][1]] * (_BATCH - len(batch)))
    normalized = augment.normalize(images, model.mean, model.std)
    logits, aux = jax.device_get(run(params, normalized))
    activation = jax.nn.sigmoid if model.sigmoid else jax.nn.softmax
    probabilities = np.asarray(activation(logits.astype(np.float32)))
    depth = np.asarray(flops.patch_depth(model, aux.active))
    macs, names = aux.macs, model.label_names
    for i, (path, image) in enumerate(batch):
        best = np.argsort(-probabilities[i], kind="stable")[:5]
        top5 = [names[k] if names else str(k) for k in best]
        yield Prediction(
            path=path,
            top5=top5,
            words=[class_names.words(name) for name in top5],
            probabilities=[float(p) for p in probabilities[i][best]],
            depth=depth[i],
            macs=float(macs[i]),
            macs_ratio=float(macs[i]) / flops.static_macs(model),
            image=image,
        )


def _list(images: Any) -> list[pathlib.Path | np.ndarray]:
    """Returns a list of files and arrays `(H, W, C)`, from a path, an array or a list of them."""
    if isinstance(images, str | os.PathLike):
        return list(_find(pathlib.Path(images)))
    if hasattr(images, "shape"):
        array = np.asarray(images)
        if array.ndim not in (3, 4) or array.dtype != np.uint8 or array.shape[-1] not in (1, 3):
            raise errors.UserError(
                "an image must be a uint8 array (height, width, 1 or 3) of pixels from 0 to 255; "
                f"got {array.dtype} {array.shape}."
            )
        found = list(array) if array.ndim == 4 else [array]
    else:
        found = [one for image in images for one in _list(image)]
    if not found:
        raise errors.UserError("name images to predict, or folders that hold some.")
    return found


def _read(
    images: Sequence[pathlib.Path | np.ndarray], model: PretrainedAViT
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and images, uint8 `(H, W, channels)`, of the readable ones; 1 channel: grey."""
    _check_channels(model)
    image_files.reset_warnings()
    transform = transforms.Evaluate(
        image_size=model.pixels, crop_ratio=model.crop_ratio, channels=model.channels
    )
    for i, image in enumerate(images):
        if isinstance(image, np.ndarray):
            if image.shape[:2] != model.pixels:
                image = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)).copy())
            yield f"image {i}", transform(image)
            continue
        path = str(image)
        try:
            decoded = image_files.decode(image.read_bytes(), model.value_range)
        except (image_files.BadImage, OSError) as error:
            _logger.warning("cannot read %s: %s", path, errors.first_line(error))
            continue
        yield path, transform(decoded)


def _check_channels(model: vit.AViT) -> None:
    if model.channels not in (1, 3):
        raise errors.UserError(
            f"images have 1 or 3 channels, and the network has {model.channels}: name another "
            "network."
        )


def _find(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns an image file itself, or the image files in a folder."""
    endings = ", ".join(image_files.ENDINGS)
    if path.is_dir():
        found, _ = image_files.find(path)
        if not found:
            raise errors.UserError(f"there is no image in {path}: images end in {endings}.")
        return [pathlib.Path(file) for file in found]
    if not path.exists():
        raise errors.UserError(f"there is no image {path}: name images or their folders.")
    if not path.is_file():  # reading a pipe or a device may never end
        raise errors.UserError(
            f"{path} is no file, but a pipe, a socket or a device: name images or their folders."
        )
    return [path]


def report(
    predictions: Iterator[Prediction],
    *,
    num_layers: int,
    jsonl: epath.PathLike | None,
    folder: epath.PathLike | None,
) -> int:
    """Prints a table of predictions; writes JSON lines and figures if paths for them are given.

    Args:
      predictions: the iterator to consume.
      num_layers: of the network.
      jsonl: file for JSON lines.
      folder: for figures `<name>.depth.png`; repeated names get numbers.

    Returns:
      The number of images.

    Raises:
      errors.UserError: there are no predictions.
    """
    lines: list[str] = []
    used_names: set[str] = set()
    try:
        for one in predictions:
            if not lines:
                print(f"{'depth':>5} {'GMACs':>6} {'ratio':>5}  image: classes", flush=True)
            pairs = zip(one.top5, one.probabilities, strict=True)
            classes = ", ".join(f"{class_names.readable(name)} {p:.1%}" for name, p in pairs)
            lines.append(one.to_json() + "\n")
            row = (
                f"{one.depth.mean():5.2f} {one.macs / 1e9:6.3f} {one.macs_ratio:5.2f}  "
                f"{one.path}: {classes}"
            )
            print(errors.printable(row), flush=True)  # names may hold control characters
            if folder is not None:
                _draw(one, epath.Path(folder), used_names, num_layers)
    finally:  # also after an interruption
        if jsonl is not None and lines:
            files.write(jsonl, "".join(lines))
    if not lines:
        raise errors.UserError("none of the images can be read: the warnings above give reasons.")
    return len(lines)


def _draw(one: Prediction, folder: epath.Path, used_names: set[str], num_layers: int) -> None:
    name = pathlib.Path(one.path).stem
    while name in used_names:
        name = f"{name}-{len(used_names)}"
    used_names.add(name)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{class_names.readable(one.top5[0])} {one.probabilities[0]:.0%}"
    figure = visualize.depth_map(one.image, one.depth, num_layers=num_layers, title=title)
    visualize.write(figure, folder / f"{name}.depth.png", dpi=120)
