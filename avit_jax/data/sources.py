"""Data sets: random access to records with image and labels, and the names of the classes."""

import csv
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np

from avit_jax.data import image_files
from avit_jax.utils import errors

Record = dict[str, Any]
_logger = logging.getLogger(__name__)
_LABELS = "labels.csv"  # in the folder of a split whose images have several labels


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
      name: of the data set and the split, for messages.
      records: random access. A record holds `image`, a uint8 array `(H, W, C)` or the bytes of an
        image file; `file_name` if there is a file; and under `label_key` an int, or a sequence of
        ints with `multi_label`.
      label_names: one name per class.
      channels: of the decoded images; image files become RGB.
      label_key: name of the labels in a record.
      multi_label: whether an image has any number of labels.
    """

    name: str
    records: Sequence[Record]
    label_names: list[str]
    channels: int = 3
    label_key: str = "label"
    multi_label: bool = False

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the number of records and the names of classes.

        For image files it also covers the names and labels of the files, but not their folder.
        """
        files = isinstance(self.records, _Files)
        paths = self.records.names() if files else []
        labels = [self.records.labels] if files and self.multi_label else []
        content = json.dumps([len(self.records), self.label_names, paths, *labels])
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
      errors.UserError: no data set is named, there is no such split, or the data set is not
        prepared.
    """
    image_files.reset_warnings()
    if not name:
        raise errors.UserError(
            "the recipe names no data set: set --config.data.name, for example to folder, or name "
            "another recipe with --config."
        )
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
    if train.multi_label != evaluation.multi_label:
        one, other = (train, evaluation) if train.multi_label else (evaluation, train)
        raise errors.UserError(
            f"{one.name} gives an image any number of labels, and {other.name} exactly one: set "
            "--config.data.train_split and eval_split to splits of the same kind."
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
    labels: list[int] | list[list[int]]

    def names(self) -> list[list[str]]:
        """Returns the parts of each path below the folder."""
        return [os.path.relpath(path, self.folder).split(os.sep) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        path = self.paths[i]
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device may never end
            raise OSError(f"{path} is not a file")
        image = pathlib.Path(path).read_bytes()
        return {"image": image, "label": self.labels[i], "file_name": path}


def _folder(root: pathlib.Path, split: str) -> Source:
    """Opens the image files in `root/split/class/` and below, in alphabetical order."""
    folder = root / split
    paths, labels = [], []
    try:
        if (folder / _LABELS).is_file():
            return _labelled_folder(root, folder)
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
    if others := _labelled(root):
        message = "%s holds no %s, as %s is: its folders are the classes"
        _logger.warning(message, folder, _LABELS, others[0])
    if not paths:
        raise errors.UserError(
            f'no images in "{folder}": put them into one folder per class, under names that end in '
            f"{', '.join(image_files.ENDINGS)}."
        )
    message = "%s: %d images of %d classes, %d other files ignored"
    _logger.info(message, folder, len(paths), len(classes), ignored)
    return Source(f'"{folder}"', _Files(str(folder), paths, labels), classes)


def _labelled_folder(root: pathlib.Path, folder: pathlib.Path) -> Source:
    """Opens the images that `labels.csv` names, in its order.

    The classes are the labels of all splits in `root`, in alphabetical order.
    """
    rows = _rows(folder / _LABELS)
    here = {label for _, found in rows for label in found}
    if not here:
        raise errors.UserError(
            f'"{folder / _LABELS}" names no image with a label: write a row for each image, such '
            "as: cats/1.jpg,cat;grass"
        )
    names = here.union(*(found for path in _labelled(root) for _, found in _rows(path)))
    if missing := sorted(names - here):
        message = "%s has no image with these labels of other splits: %s"
        _logger.warning(message, folder, ", ".join(missing[:5]))
    label_names = sorted(names)
    index = {name: i for i, name in enumerate(label_names)}
    paths = [str(folder / file) for file, _ in rows]
    labels = [sorted(index[label] for label in found) for _, found in rows]
    _logger.info("%s: %d images with any of %d labels", folder, len(paths), len(label_names))
    return Source(f'"{folder}"', _Files(str(folder), paths, labels), label_names, multi_label=True)


def _labelled(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the `labels.csv` of all splits."""
    return sorted(path for path in root.glob(f"*/{_LABELS}") if path.is_file())


def _rows(path: pathlib.Path) -> list[tuple[str, set[str]]]:
    """Returns the files in a `labels.csv`, each with its labels; rows of one file are united."""
    rows: dict[str, set[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for i, row in enumerate(csv.reader(file, strict=True)):
                if not row or (i == 0 and [cell.strip() for cell in row] == ["file", "labels"]):
                    continue
                if len(row) != 2 or not row[0].strip():
                    raise ValueError(
                        f"row {i + 1} must hold a file and its labels, such as: "
                        "cats/1.jpg,cat;grass"
                    )
                if i == 0 and not image_files.has_ending(row[0].strip()):
                    raise ValueError(
                        f'row 1 must be "file,labels", or an image and its labels; got "{row[0]}"'
                    )
                labels = {label.strip() for label in row[1].split(";")} - {""}
                rows.setdefault(os.path.normpath(row[0].strip()), set()).update(labels)
    except (OSError, ValueError, csv.Error) as error:
        raise errors.UserError(f'cannot read "{path}": {errors.first_line(error)}') from error
    return list(rows.items())


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
    found = _labels(features)
    if found is None or "image" not in features:
        raise errors.UserError(
            f'"{name}" has no image with one label or a list of labels: its records hold '
            f"{', '.join(sorted(features))}; name another data set."
        )
    key, names, multi_label = found
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if not len(records):
            raise ValueError("it is empty")
    except Exception as error:  # an unknown split or slice, files in another format
        raise errors.UserError(
            f'cannot read the split "{split}" of "{name}" {where}: {errors.first_line(error)}'
        ) from error
    title = f'"{name}", split "{split}"'
    return Source(title, records, names, label_key=key, multi_label=multi_label)


def _labels(features: Any) -> tuple[str, list[str], bool] | None:
    """Returns the key of the labels, the names of classes, and whether a record has a list."""
    import tensorflow_datasets as tfds

    features = dict(features.items())
    for key in ("label", "labels"):
        feature = features.get(key)
        multi_label = isinstance(feature, tfds.features.Sequence)
        feature = feature.feature if multi_label else feature
        if isinstance(feature, tfds.features.ClassLabel):
            return key, feature.names, multi_label
    return None
