"""What a trained network sees in pictures, and where it spends its thought on them."""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from avit_jax import config as config_lib
from avit_jax.data import augment, pictures, transforms
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.training import build, restore
from avit_jax.utils import errors, files, visualize

_BATCH = 16  # pictures at once, the last batch filled up
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network makes of one picture.

    Attributes:
      path: of the picture.
      top5: names of the likeliest classes, or their numbers where the names are not known.
      probabilities: of these; over all classes they sum to 1.
      depth: `(rows, columns)` layers that each patch token has used.
      macs: multiply-accumulates the picture has cost.
      macs_ratio: the same as a share of the static network's.
      image: `(H, W, C)` uint8, what the network was shown.
    """

    path: str
    top5: list[str]
    probabilities: list[float]
    depth: np.ndarray
    macs: float
    macs_ratio: float
    image: np.ndarray

    def to_json(self) -> str:
        """All but the image, in one line."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "image"
        }
        return json.dumps(fields | {"depth": self.depth.tolist()})


def predict(
    config: ConfigDict, checkpoint: epath.PathLike, paths: Sequence[epath.PathLike]
) -> Iterator[Prediction]:
    """Predicts pictures, in the order of the paths; halted tokens are removed, on a GPU masked,
    which is faster.

    Args:
      config: the recipe the network was trained with.
      checkpoint: workdir of a run, of which `config.eval.checkpoint` is taken, or a weight file.
      paths: pictures, and folders that are searched for pictures.

    Yields:
      A prediction for each picture that can be read; the others are named in a warning.

    Raises:
      errors.UserError: a path is empty or does not exist, there is no picture, or the checkpoint
        cannot be used.
    """
    config_lib.check(config)
    model = build.model(config).clone(removal=None)
    if model.channels not in (1, 3):
        raise errors.UserError(
            f"pictures have 1 or 3 channels, and the network has {model.channels}."
        )
    if not all(os.fspath(path) for path in paths):  # pathlib would take it for the current folder
        raise errors.UserError(
            "the name of a picture is empty: name pictures to predict, or folders that hold some."
        )
    found = [file for path in paths for file in _files(pathlib.Path(path))]
    if not found:
        raise errors.UserError("name pictures to predict, or folders that hold some.")
    params, names = restore.trained(config, model, checkpoint)
    transform = transforms.Evaluate(image_size=model.pixels, crop_ratio=config.data.crop_ratio)
    apply = adaptive.make_apply(model, images=_BATCH)
    run = jax.jit(lambda params, images: apply({"params": params}, images))
    shown: list[tuple[pathlib.Path, np.ndarray]] = []
    pictures.forget_warnings()
    for file in found:
        try:
            picture = pictures.decode(file.read_bytes())
        except (pictures.BadPicture, OSError) as error:
            _logger.warning("cannot read %s: %s", file, errors.first_line(error))
            continue
        shown.append((file, _with_channels(transform(picture), model.channels)))
        if len(shown) == _BATCH:
            yield from _predict_batch(run, params, shown, model, config, names)
            shown = []
    if shown:
        yield from _predict_batch(run, params, shown, model, config, names)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_dir():
        found = sorted(
            file
            for file in _walk(path)
            if file.suffix.lower() in pictures.ENDINGS and file.is_file()
        )
        if not found:
            raise errors.UserError(
                f"there is no picture in {path}: they end in {', '.join(pictures.ENDINGS)}."
            )
        return found
    if not path.exists():
        raise errors.UserError(f"there is no picture {path}.")
    if not path.is_file():  # to read a pipe or a device may never end
        raise errors.UserError(
            f"{path} is no file, but a pipe, a socket or a device: name pictures or their folders."
        )
    return [path]


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below a folder, also behind links, but none twice where links lead in circles."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        yield from (pathlib.Path(parent, name) for name in names)


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """An RGB picture with the channels of the network; grey ones for one channel."""
    return image if channels == 3 else np.asarray(Image.fromarray(image).convert("L"))[..., None]


def _predict_batch(
    run: Any,
    params: Any,
    shown: list[tuple[pathlib.Path, np.ndarray]],
    model: vit.AViT,
    config: ConfigDict,
    names: list[str],
) -> Iterator[Prediction]:
    images = np.stack([image for _, image in shown] + [shown[0][1]] * (_BATCH - len(shown)))
    logits, aux = jax.device_get(
        run(params, augment.normalize(images, config.data.mean, config.data.std))
    )
    probabilities = np.asarray(jax.nn.softmax(logits.astype(np.float32)))
    depth = np.asarray(flops.patch_depth(model, aux.active))
    macs = aux.macs
    for i, (path, image) in enumerate(shown):
        best = np.argsort(-probabilities[i], kind="stable")[:5]
        yield Prediction(
            path=str(path),
            top5=[names[k] if names else str(k) for k in best],
            probabilities=[float(p) for p in probabilities[i][best]],
            depth=depth[i],
            macs=float(macs[i]),
            macs_ratio=float(macs[i]) / flops.static_macs(model),
            image=image,
        )


def tell(
    predictions: Iterator[Prediction],
    *,
    num_layers: int,
    jsonl: epath.PathLike | None,
    folder: epath.PathLike | None,
) -> int:
    """Prints a table; writes JSON lines and pictures of the depth where asked to; raises
    errors.UserError without any picture.

    Args:
      predictions: are consumed.
      num_layers: of the network.
      jsonl: file of JSON lines.
      folder: of pictures, `<name>.depth.png` each, numbered where names repeat.

    Returns:
      How many pictures there were.
    """
    lines: list[str] = []
    taken: set[str] = set()
    try:
        for one in predictions:
            if not lines:
                print(f"{'depth':>5} {'GMACs':>6} {'share':>5}  picture: classes", flush=True)
            classes = ", ".join(
                f"{name} {p:.1%}" for name, p in zip(one.top5, one.probabilities, strict=True)
            )
            lines.append(one.to_json() + "\n")
            row = (
                f"{one.depth.mean():5.2f} {one.macs / 1e9:6.3f} {one.macs_ratio:5.2f}  "
                f"{one.path}: {classes}"
            )
            print(errors.printable(row), flush=True)  # names may hold anything
            if folder is not None:
                _draw(one, epath.Path(folder), taken, num_layers)
    finally:  # whatever comes between, an interruption too
        if jsonl is not None and lines:
            files.write(jsonl, "".join(lines))
    if not lines:
        raise errors.UserError("not one of the pictures could be read.")
    return len(lines)


def _draw(one: Prediction, folder: epath.Path, taken: set[str], num_layers: int) -> None:
    """Writes the picture of the depth, under a name that is not taken yet."""
    name = pathlib.Path(one.path).stem
    while name in taken:
        name = f"{name}-{len(taken)}"
    taken.add(name)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{one.top5[0]} {one.probabilities[0]:.0%}"
    figure = visualize.depth_map(one.image, one.depth, num_layers=num_layers, title=title)
    visualize.write(figure, folder / f"{name}.depth.png", dpi=120)
