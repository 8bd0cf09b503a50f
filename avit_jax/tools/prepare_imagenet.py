"""Prepares ImageNet-1k from the two ILSVRC2012 tars for tensorflow-datasets, without TensorFlow.

python -m avit_jax.tools.prepare_imagenet imagenet2012 --tars=/data/tars --data_dir=/data/tfds

The records and their order are those of TFDS's own builder. Images are copied from the tars without
decoding. Only 23 images are not RGB JPEGs, as TFDS lists them. Pillow converts these; TFDS uses
TensorFlow for them. Shards are written one by one. After an interruption, the same command
continues with the next shard. The data set gets its name after all shards are written and checked.
"""

import argparse
import bisect
import dataclasses
import io
import itertools
import pathlib
import shutil
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import tqdm

from avit_jax.data import image_files
from avit_jax.utils import errors

_NAME = "imagenet2012"
_TAR_NAMES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_COUNTS = {"train": 1_281_167, "validation": 50_000}
# Approximate bytes of a record besides its image. The number of shards depends on it.
_RECORD_OVERHEAD = 80
_CHECKED = 1000  # records per split that are read again as a check


@dataclasses.dataclass(frozen=True)
class Member:
    """The position of an image in a tar.

    Attributes:
      name: of the file, which is also the key of the record.
      label: WordNet id.
      offset: position of the first byte in the tar.
      size: number of bytes.
    """

    name: str
    label: str
    offset: int
    size: int


def _index_train(tar_path: pathlib.Path, progress: tqdm.tqdm) -> list[Member]:
    """Returns the members of the training tar, which contains one tar per class."""
    found = []
    with tarfile.open(tar_path, mode="r:") as outer:
        for archive in filter(tarfile.TarInfo.isfile, outer):
            label = pathlib.PurePath(archive.name).stem
            with tarfile.open(fileobj=outer.extractfile(archive), mode="r:") as inner:
                for image in inner:
                    offset = archive.offset_data + image.offset_data
                    found.append(Member(image.name, label, offset, image.size))
                    progress.update()
    return found


def _index_validation(tar_path: pathlib.Path, progress: tqdm.tqdm) -> list[Member]:
    """Returns the members of the validation tar.

    tensorflow-datasets contains the labels, in alphabetical order of the names.
    """
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with tarfile.open(tar_path, mode="r:") as tar:
        images = sorted((x.name, x.offset_data, x.size) for x in tar if x.isfile())
    progress.update(len(images))
    # A surplus image gets no label here; `_index` reports the wrong count.
    labels += [""] * (len(images) - len(labels))
    return [Member(name, labels[i], *place) for i, (name, *place) in enumerate(images)]


class SplitWriter:
    """Writes the records of one split, in the order of TFDS's own builder.

    Args:
      builder: TFDS's builder of the data set.
      split: "train" or "validation".
      tar_path: the tar that contains the members.
      members: of the whole split.
      folder: for the shards.
    """

    def __init__(
        self,
        builder: Any,
        split: str,
        tar_path: pathlib.Path,
        members: Sequence[Member],
        folder: pathlib.Path,
    ) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import example_serializer, hashing
        from tensorflow_datasets.core.utils import shard_utils
        from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as theirs

        key = hashing.Hasher(split).hash_key
        self.members = sorted(members, key=lambda member: key(member.name))
        num_bytes = sum(member.size + _RECORD_OVERHEAD for member in members)
        num_shards = shard_utils.ShardConfig().get_number_shards(num_bytes, len(members))
        bounds = [0, *shard_utils.get_shard_boundaries(len(members), num_shards)]
        self._ranges = [range(*pair) for pair in itertools.pairwise(bounds)]
        self._converted = {*theirs.CMYK_IMAGES, *theirs.PNG_IMAGES}
        self._features = builder.info.features
        serialized = self._features.get_serialized_info()
        self._serializer = example_serializer.ExampleSerializer(serialized)
        self._tar_path = tar_path
        self.info = tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(numbers) for numbers in self._ranges],
            num_bytes=num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=_NAME, split=split, filetype_suffix="array_record"
            ),
        )

    def write(self) -> None:
        """Writes the missing shards."""
        from tensorflow_datasets.core import file_adapters

        adapter = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
        total, description = len(self.members), f"writing {self.info.name}"
        progress = tqdm.tqdm(total=total, desc=description, unit=" images")
        with self._tar_path.open("rb") as tar, progress:
            for path, numbers in zip(self.paths(), self._ranges, strict=True):
                if not path.exists():
                    members = (self.members[i] for i in numbers)
                    examples = ((member.name, self._record(member, tar)) for member in members)
                    unfinished = path.with_name(f"unfinished.{path.name}")
                    adapter.write_examples(unfinished, examples)
                    unfinished.rename(path)
                progress.update(len(numbers))

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """Compares the number of records, and a sample of them, with the tar.

        Raises:
          errors.UserError: they differ.
        """
        if len(records) != len(self.members):
            raise errors.UserError(
                f"{self.info.name} has {len(records)} records and not {len(self.members)}: delete "
                f'the folder "{self.paths()[0].parent}" and start again.'
            )
        with self._tar_path.open("rb") as tar:
            for i in range(0, len(records), max(1, len(records) // _CHECKED)):
                member, record = self.members[i], records[i]
                label = self._features["label"].int2str(record["label"])
                found = record["file_name"].decode(), label, record["image"]
                if found != (member.name, member.label, self._image(member, tar)):
                    shard = bisect.bisect_right(self._ranges, i, key=lambda x: x.start) - 1
                    raise errors.UserError(
                        f'"{self.paths()[shard]}" does not hold "{member.name}" as the tar does: '
                        "delete the file and start again."
                    )

    def paths(self) -> list[pathlib.Path]:
        """Returns the paths of the shards."""
        template, count = self.info.filename_template, len(self._ranges)
        paths = [template.sharded_filepath(shard_index=i, num_shards=count) for i in range(count)]
        return [pathlib.Path(path) for path in paths]

    def _record(self, member: Member, tar: BinaryIO) -> bytes:
        image = io.BytesIO(self._image(member, tar))
        example = {"file_name": member.name, "image": image, "label": member.label}
        return self._serializer.serialize_example(self._features.encode_example(example))

    def _image(self, member: Member, tar: BinaryIO) -> bytes:
        tar.seek(member.offset)
        data = tar.read(member.size)
        if member.name not in self._converted:
            return data
        file = io.BytesIO()
        image_files.decode(data).save(file, "jpeg", quality=100, subsampling=0)
        return file.getvalue()


def imagenet2012(tars: pathlib.Path, data_dir: pathlib.Path) -> None:
    """Prepares ImageNet-1k in `data_dir` from the two tars in the folder `tars`.

    Raises:
      errors.UserError: a tar is missing, damaged or incomplete, the disk is too small, or a check
        of the written files fails.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(_NAME, data_dir=data_dir, file_format="array_record")
    target = pathlib.Path(builder.data_path)
    if target.exists():
        raise errors.UserError(f'"{target}" exists already: delete it to prepare it again.')
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    writers: dict[str, SplitWriter] = {}
    labels = set(builder.info.features["label"].names)
    for split, index in (("validation", _index_validation), ("train", _index_train)):
        path = tars / _TAR_NAMES[split]
        members = _index(path, split, index)
        unknown = {member.label for member in members} - labels
        if unknown:
            raise errors.UserError(
                f'"{path}" holds the class "{min(unknown)}", which ImageNet-1k does not have: get '
                "the tar again."
            )
        writers[split] = SplitWriter(builder, split, path, members, unfinished)
    _check_space(unfinished, writers)
    for writer in writers.values():
        writer.write()
    builder.info.set_splits(tfds.core.splits.SplitDict([x.info for x in writers.values()]))
    builder.info.write_to_directory(unfinished)
    written = tfds.builder_from_directory(unfinished)
    for split, writer in writers.items():
        try:
            decoders = {"image": tfds.decode.SkipDecoding()}
            writer.check(written.as_data_source(split, decoders=decoders))
        except RuntimeError as error:  # array_record's, if a shard is damaged
            raise errors.UserError(
                f'a file in "{unfinished}" is damaged ({error}): delete the folder and start again.'
            ) from error
    unfinished.rename(target)
    counts = (f"{len(writer.members)} images in {name}" for name, writer in writers.items())
    print(f"{target}: {', '.join(counts)}")


def _check_space(folder: pathlib.Path, writers: dict[str, SplitWriter]) -> None:
    """Deletes files of other runs; raises errors.UserError if the shards do not fit on the disk."""
    shards = {path for writer in writers.values() for path in writer.paths()}
    for path in set(folder.iterdir()) - shards:
        path.unlink()
    missing = sum(writer.info.num_bytes for writer in writers.values())
    missing -= sum(path.stat().st_size for path in folder.iterdir())
    if missing > shutil.disk_usage(folder).free:
        raise errors.UserError(
            f'the disk of "{folder}" is too small: {missing / 1e9:.1f} GB must be free.'
        )


def _index(
    path: pathlib.Path, split: str, index: Callable[[pathlib.Path, tqdm.tqdm], list[Member]]
) -> list[Member]:
    description = f"reading the index of {path.name}"
    try:
        with tqdm.tqdm(total=_COUNTS[split], desc=description, unit=" images") as progress:
            members = index(path, progress)
    except (OSError, tarfile.TarError) as error:
        raise errors.UserError(
            f'cannot read "{path}": {error}; get the tar from image-net.org (ILSVRC 2012).'
        ) from error
    if len(members) != _COUNTS[split]:
        raise errors.UserError(
            f'"{path}" holds {len(members)} images and not {_COUNTS[split]}: get the tar again.'
        )
    return members


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avit_jax.tools.prepare_imagenet", description=__doc__.splitlines()[0]
    )
    builder = "tfds.builder(name, data_dir=..., file_format='array_record')"
    other = f"for other data sets: `{builder}.download_and_prepare()`"
    parser.add_argument("name", choices=[_NAME], help=other)
    tars = f"folder of {' and '.join(_TAR_NAMES.values())}"
    parser.add_argument("--tars", type=pathlib.Path, required=True, help=tars)
    data_dir = "folder of data sets, the later --config.data.dir"
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help=data_dir)
    arguments = parser.parse_args()
    try:
        imagenet2012(arguments.tars, arguments.data_dir)
    except (errors.UserError, OSError) as error:
        errors.stop(error)


if __name__ == "__main__":
    _main()
