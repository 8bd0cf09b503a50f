"""Data sets: random access to records `{"image", "label"}`, with the names of the classes."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from avit_jax.data import image_files
from avit_jax.utils import errors

Record = dict[str, Any]
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
      name: of the data set and the split, for messages.
      records: random access. A record holds `image`, a uint8 array `(H, W, C)` or the bytes of an
        image file; `label`, an int; and `file_name` if there is a file.
      label_names: one name per class.
      channels: of the decoded images; image files become RGB.
    """

    name: str
    records: Sequence[Record]
    label_names: list[str]
    channels: int = 3

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the number of records and the names of classes.

        For image files it also covers the names and classes of the files, but not their folder.
        """
        files = isinstance(self.records, _Files)
        paths = self.records.names() if files else []
        content = json.dumps([len(self.records), self.label_names, paths])
        return hashlib.sha256(content.encode()).hexdigest()

    def describe(self, i: int, record: Record) -> str:
        """Returns the name of the i-th record for messages."""
        name = record.get("file_name", f"record {i} of {self.name}")
        return name.decode() if isinstance(name, bytes) else name


def load(name: str, *, split: str, data_dir: str, image_size: tuple[int, int]) -> Source:
    """Opens a split of a data set.

    Args:
      name: "digits", "folder", or a data set that tensorflow-datasets has prepared in the format
        array_record.
      split: "train" or "test" of the digits, a folder in `data_dir` for "folder", otherwise a TFDS
        split, with slices such as "train[:99%]".
      data_dir: the folder, or where TFDS data sets are; empty for TFDS's default.
      image_size: (height, width) of the enlarged digits; host transforms resize other images.

    Raises:
      errors.UserError: there is no such split, or the data set is not prepared.
    """
    image_files.reset_warnings()
    if name == "digits":
        return _digits(split, image_size)
    if name == "folder":
        return _folder(pathlib.Path(data_dir), split)
    return _tfds(name, split, data_dir)


def check_same_classes(train: Source, evaluation: Source) -> None:
    """Raises errors.UserError unless label k means the same class in both."""
    if train.label_names != evaluation.label_names:
        differing = sorted(set(train.label_names) ^ set(evaluation.label_names))
        raise errors.UserError(
            f"{train.name} and {evaluation.name} differ in their classes: "
            f"{', '.join(differing[:5]) or 'their order'}: set --config.data.train_split and "
            "eval_split to splits with the same classes."
        )


def check_fit(source: Source, *, num_classes: int, channels: int) -> None:
    """Raises errors.UserError unless the model has the classes of the data set, and can see it.

    Transforms convert between 1 and 3 channels; a log line says so.
    """
    if len(source.label_names) != num_classes:
        raise errors.UserError(
            f"the data set has {len(source.label_names)} classes but the model {num_classes}: "
            f"set --config.model.num_classes={len(source.label_names)}."
        )
    if source.channels == channels:
        return
    if {source.channels, channels} != {1, 3}:
        raise errors.UserError(
            f"the images have {source.channels} channels but the model {channels}: "
            f"set --config.model.channels={source.channels}."
        )
    change = "RGB images become grey" if channels == 1 else "grey images become RGB"
    _logger.info("%s: %s, because config.model.channels is %d", source.name, change, channels)


def _digits(split: str, image_size: tuple[int, int]) -> Source:
    """Opens scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged bilinearly.

    The last 360 are the test split.
    """
    import sklearn.datasets
    from PIL import Image

    splits = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    if split not in splits:
        raise errors.UserError(
            f'the digits have the splits "train" and "test"; config.data names "{split}".'
        )
    bunch = sklearn.datasets.load_digits()
    height, width = image_size

    def enlarge(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[..., None]

    chosen = zip(bunch.images[splits[split]], bunch.target[splits[split]], strict=True)
    records = [{"image": enlarge(pixels), "label": int(label)} for pixels, label in chosen]
    names = [str(name) for name in bunch.target_names]
    return Source(f'the digits, split "{split}"', records, names, channels=1)


@dataclasses.dataclass(frozen=True)
class _Files(Sequence[Record]):
    """Records of image files; a file is read when its record is accessed."""

    folder: str
    paths: list[str]
    labels: list[int]

    def names(self) -> list[list[str]]:
        """Returns the parts of each path below the folder."""
        return [os.path.relpath(path, self.folder).split(os.sep) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        path = self.paths[i]
        image = pathlib.Path(path).read_bytes()
        return {"image": image, "label": self.labels[i], "file_name": path}


def _folder(root: pathlib.Path, split: str) -> Source:
    """Opens the image files in `root/split/class/` and below, in alphabetical order."""
    folder = root / split
    paths, labels = [], []
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        classes = sorted(entry.name for entry in entries if _is_class(entry, folder))
        broken = [entry for entry in entries if entry.is_symlink() and entry.name not in classes]
        ignored = sum(not image_files.points_to(entry.is_file) for entry in broken)
        for label, name in enumerate(classes):
            found, others = image_files.find(folder / name)
            ignored += others
            paths += found
            labels += [label] * len(found)
    except OSError as error:
        raise errors.UserError(
            f'cannot read "{error.filename}": {error.strerror}; set --config.data.dir to the '
            "folder that holds <split>/<class>/<image>, and --config.data.train_split and "
            "eval_split to its parts (which take no slices)."
        ) from error
    if not paths:
        raise errors.UserError(
            f'no images in "{folder}": put them into one folder per class, under names that end in '
            f"{', '.join(image_files.ENDINGS)}."
        )
    message = "%s: %d images of %d classes, %d other files ignored"
    _logger.info(message, folder, len(paths), len(classes), ignored)
    return Source(f'"{folder}"', _Files(str(folder), paths, labels), classes)


def _is_class(entry: os.DirEntry, folder: pathlib.Path) -> bool:
    """Returns whether an entry is a folder, and not a link to `folder` or to a parent of it."""
    target, here = (pathlib.Path(os.path.realpath(path)) for path in (entry.path, folder))
    is_parent = entry.is_symlink() and here.is_relative_to(target)
    return not is_parent and image_files.points_to(entry.is_dir)


def _tfds(name: str, split: str, data_dir: str) -> Source:
    """Opens a prepared array_record data set; its images stay encoded."""
    import tensorflow_datasets as tfds

    where = f'in "{data_dir}"' if data_dir else "in ~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        prepared = builder.data_path.exists()
    except Exception as error:  # an unknown name, a missing TensorFlow, a damaged description
        raise errors.UserError(
            f'tensorflow-datasets cannot open "{name}": {errors.first_line(error)}'
        ) from error
    if not prepared:
        how = (
            f"`tfds.builder('{name}', data_dir={data_dir or None!r}, "
            "file_format='array_record').download_and_prepare()` in Python"
        )
        if name == "imagenet2012":
            how = (
                "`python -m avit_jax.tools.prepare_imagenet imagenet2012 --tars=... --data_dir=...`"
            )
        raise errors.UserError(
            f'the data set "{name}" is not prepared {where}: prepare it once with {how} (or set '
            f"--config.data.dir to the folder that contains {name}/), or try "
            "--config=configs/digits.py, which needs no download."
        )
    features = builder.info.features
    named = {"image", "label"} <= set(features)
    if not named or not isinstance(features["label"], tfds.features.ClassLabel):
        raise errors.UserError(
            f'"{name}" has no image with one label: its records hold '
            f"{', '.join(sorted(features))}; name another data set."
        )
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if not len(records):
            raise ValueError("it is empty")
    except Exception as error:  # an unknown split or slice, files in another format
        raise errors.UserError(
            f'cannot read the split "{split}" of "{name}" {where}: {errors.first_line(error)}'
        ) from error
    return Source(f'"{name}", split "{split}"', records, features["label"].names)
