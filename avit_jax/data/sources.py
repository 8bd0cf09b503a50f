"""Where images come from: random access to records `{"image", "label"}`, with label names."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from avit_jax.data import pictures
from avit_jax.utils import errors

Record = dict[str, Any]
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
      name: of the data set and the split, for messages.
      records: random access; each record holds `image`, a uint8 array `(H, W, C)` or an encoded
        picture, `label`, an int, and `file_name` where there is one.
      label_names: one name a class.
      channels: of the decoded images; encoded pictures become RGB.
    """

    name: str
    records: Sequence[Record]
    label_names: list[str]
    channels: int = 3

    def fingerprint(self) -> str:
        """SHA-256 of its length and the names of its classes; of files also of their names and
        classes, wherever they lie.
        """
        files = isinstance(self.records, _Files)
        paths = [pathlib.PurePath(path).parts[-2:] for path in self.records.paths] if files else []
        return hashlib.sha256(
            json.dumps([len(self.records), self.label_names, paths]).encode()
        ).hexdigest()

    def where(self, i: int, record: Record) -> str:
        """What a message calls the i-th record."""
        name = record.get("file_name", f"record {i} of {self.name}")
        return name.decode() if isinstance(name, bytes) else name


def load(name: str, *, split: str, data_dir: str, image_size: tuple[int, int]) -> Source:
    """Opens a split of a data set.

    Args:
      name: "digits", "folder", or a data set of tensorflow-datasets that has been prepared in
        array_record format.
      split: "train" or "test" for the digits, a folder in `data_dir` for "folder", else a TFDS
        split, with slices such as "train[:99%]".
      data_dir: the folder, or where TFDS data sets lie; empty for TFDS's own default.
      image_size: (height, width) that the digits are enlarged to; other pictures are resized by the
        host transforms.

    Raises:
      errors.UserError: no such split, or the data set is not prepared.
    """
    pictures.forget_warnings()
    if name == "digits":
        return _digits(split, image_size)
    if name == "folder":
        return _folder(pathlib.Path(data_dir), split)
    return _tfds(name, split, data_dir)


def check_same_classes(train: Source, evaluation: Source) -> None:
    """Raises errors.UserError unless label k means the same class in both."""
    if train.label_names != evaluation.label_names:
        odd = sorted(set(train.label_names) ^ set(evaluation.label_names))
        raise errors.UserError(
            f"{train.name} and {evaluation.name} differ in their classes: {', '.join(odd[:5])}."
        )


def check_fit(source: Source, *, num_classes: int, channels: int) -> None:
    """Raises errors.UserError unless the data set has the classes and the channels of the model."""
    if len(source.label_names) != num_classes:
        raise errors.UserError(
            f"the data set has {len(source.label_names)} classes but the model {num_classes}: "
            f"set --config.model.num_classes={len(source.label_names)}."
        )
    if source.channels != channels:
        raise errors.UserError(
            f"the images have {source.channels} channels but the model {channels}: "
            f"set --config.model.channels={source.channels}."
        )


def _digits(split: str, image_size: tuple[int, int]) -> Source:
    """scikit-learn's 1,797 handwritten 8x8 digits, enlarged bilinearly; the last 360 are the test
    split.
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
        picture = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))[..., None]

    chosen = zip(bunch.images[splits[split]], bunch.target[splits[split]], strict=True)
    records = [{"image": enlarge(pixels), "label": int(label)} for pixels, label in chosen]
    return Source(
        f'the digits, split "{split}"',
        records,
        [str(name) for name in bunch.target_names],
        channels=1,
    )


@dataclasses.dataclass(frozen=True)
class _Files(Sequence[Record]):
    """Picture files, read when they are asked for.

    Attributes:
      paths: of the files.
      labels: one a file.
    """

    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        return {
            "image": pathlib.Path(self.paths[i]).read_bytes(),
            "label": self.labels[i],
            "file_name": self.paths[i],
        }


def _folder(root: pathlib.Path, split: str) -> Source:
    """Pictures `root/split/class/*` whose name ends as a picture's does; classes and files in
    alphabetical order.
    """
    folder = root / split
    paths, labels = [], []
    try:
        entries = [entry for entry in list(os.scandir(folder)) if not entry.name.startswith(".")]
        names = sorted(entry.name for entry in entries if _is_class(entry, folder))
        ignored = sum(
            entry.is_symlink() and entry.name not in names and not _is(entry.is_file)
            for entry in entries
        )
        for label, name in enumerate(names):
            entries = list(os.scandir(folder / name))
            found = sorted(entry.path for entry in entries if _is_picture(entry))
            ignored += len(entries) - len(found)
            paths += found
            labels += [label] * len(found)
    except OSError as error:
        raise errors.UserError(
            f'cannot read "{error.filename}": {error.strerror}; set --config.data.dir to the '
            "folder that holds "
            "<split>/<class>/<picture>, and --config.data.train_split and eval_split to its parts "
            "(which take no slices)."
        ) from error
    if not paths:
        raise errors.UserError(
            f'no pictures in "{folder}": they belong into one folder a class, and their names end '
            "in "
            f"{', '.join(pictures.ENDINGS)}."
        )
    _logger.info(
        "%s: %d pictures of %d classes, %d other files ignored",
        folder,
        len(paths),
        len(names),
        ignored,
    )
    return Source(f'"{folder}"', _Files(paths, labels), names)


def _is_picture(entry: os.DirEntry) -> bool:
    return (
        entry.name.lower().endswith(pictures.ENDINGS)
        and not entry.name.startswith(".")
        and _is(entry.is_file)
    )


def _is_class(entry: os.DirEntry, folder: pathlib.Path) -> bool:
    """Whether an entry of the folder is a folder, and no link back to this one or to one above."""
    back = entry.is_symlink() and pathlib.Path(os.path.realpath(folder)).is_relative_to(
        os.path.realpath(entry.path)
    )
    return not back and _is(entry.is_dir)


def _is(kind: Callable[[], bool]) -> bool:
    """What `os.DirEntry` says; False for a link that leads in circles."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _tfds(name: str, split: str, data_dir: str) -> Source:
    """A prepared array_record data set, pictures left encoded."""
    import tensorflow_datasets as tfds

    where = f'in "{data_dir}"' if data_dir else "in ~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        prepared = builder.data_path.exists()
    except (
        Exception
    ) as error:  # of a wrong name, of a builder that wants TensorFlow, of a damaged description
        raise errors.UserError(
            f'tensorflow-datasets cannot open "{name}": {errors.first_line(error)}'
        ) from error
    if not prepared:
        how = (
            "`python -m avit_jax.tools.prepare_imagenet imagenet2012`"
            if name == "imagenet2012"
            else f"`tfds.builder('{name}', data_dir={data_dir or None!r}, "
            "file_format='array_record').download_and_prepare()` "
            "in Python"
        )
        raise errors.UserError(
            f'the data set "{name}" is not prepared {where}: prepare it once with {how} '
            "(or set --config.data.dir to where it lies), or try --config=configs/digits.py, "
            "which needs no download."
        )
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(
        features["label"], tfds.features.ClassLabel
    ):
        raise errors.UserError(
            f'"{name}" has no image with one label: its records hold {", ".join(sorted(features))}.'
        )
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if not len(records):
            raise ValueError("it is empty")
    except Exception as error:  # of a wrong split or slice, of files in another format
        raise errors.UserError(
            f'cannot read the split "{split}" of "{name}" {where}: {errors.first_line(error)}'
        ) from error
    return Source(f'"{name}", split "{split}"', records, features["label"].names)
