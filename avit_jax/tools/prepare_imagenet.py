"""ImageNet-1k from the two ILSVRC2012 tars to the layout that tensorflow-datasets reads, without
TensorFlow.

python -m avit_jax.tools.prepare_imagenet imagenet2012 --tars=/data/tars --data_dir=/data/tfds

The records and their order are those of TFDS's own builder. The pictures are copied straight from
their place in the tars, but
for 23 that are no RGB JPEG: Pillow converts them where the builder takes TensorFlow. Shards are
written one by one: a second start goes on after the last whole one. The data set appears under its
  name once everything has been written and checked.
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

from avit_jax.data import pictures
from avit_jax.utils import errors

_NAME = "imagenet2012"
_TAR_NAMES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_COUNTS = {"train": 1_281_167, "validation": 50_000}
# bytes of a record beside its picture, about; the number of shards follows from the size of the
# split
_RECORD_OVERHEAD = 80
_CHECKED = 1000  # records of a split that are read back
_AGAIN = "delete the file and start again."


@dataclasses.dataclass(frozen=True)
class Member:
    """A picture's place in a tar.

    Attributes:
      name: of the file, which is also the key of the record.
      label: WordNet id.
      offset: of its first byte, from the start of the tar.
      size: bytes.
    """

    name: str
    label: str
    offset: int
    size: int


def _index_train(tar_path: pathlib.Path, progress: tqdm.tqdm) -> list[Member]:
    """Members of the training tar, a tar of one tar a class."""
    found = []
    with _open(tar_path) as outer:
        for archive in outer:
            if not archive.isfile():
                continue
            label = pathlib.PurePath(archive.name).stem
            with tarfile.open(fileobj=outer.extractfile(archive), mode="r:") as inner:
                for picture in inner:
                    found.append(
                        Member(
                            picture.name,
                            label,
                            archive.offset_data + picture.offset_data,
                            picture.size,
                        )
                    )
                    progress.update()
    return found


def _index_validation(tar_path: pathlib.Path, progress: tqdm.tqdm) -> list[Member]:
    """Members of the validation tar; the labels, by alphabetical order of the names, come with
    tensorflow-datasets.
    """
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with _open(tar_path) as tar:
        members = sorted(
            (picture.name, picture.offset_data, picture.size) for picture in tar if picture.isfile()
        )
    progress.update(len(members))
    labelled = itertools.zip_longest(
        members, labels[: len(members)], fillvalue=""
    )  # how many there have to be is told later
    return [Member(name, label, *place) for (name, *place), label in labelled]


def _open(tar_path: pathlib.Path) -> tarfile.TarFile:
    return tarfile.open(tar_path, mode="r:")


class SplitWriter:
    """The records of one split, in the order of TFDS's own builder, and the shards they belong to.

    Args:
      builder: TFDS's, of the data set.
      split: "train" or "validation".
      tar_path: where the members lie.
      members: all of the split.
      folder: of the shards.
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
        from tensorflow_datasets.datasets.imagenet2012 import (
            imagenet2012_dataset_builder as official,
        )

        key = hashing.Hasher(split).hash_key
        self.members = sorted(members, key=lambda member: key(member.name))
        num_bytes = sum(member.size + _RECORD_OVERHEAD for member in members)
        num_shards = shard_utils.ShardConfig().get_number_shards(num_bytes, len(members))
        self._bounds = [0, *shard_utils.get_shard_boundaries(len(members), num_shards)]
        self._converted = {*official.CMYK_IMAGES, *official.PNG_IMAGES}
        self._features = builder.info.features
        self._serializer = example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )
        self._tar_path = tar_path
        self.info = tfds.core.SplitInfo(
            name=split,
            shard_lengths=[stop - start for start, stop in itertools.pairwise(self._bounds)],
            num_bytes=num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=_NAME, split=split, filetype_suffix="array_record"
            ),
        )

    def write(self) -> None:
        """Writes the shards that are not there yet."""
        from tensorflow_datasets.core import file_adapters

        adapter = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
        progress = tqdm.tqdm(
            total=len(self.members), desc=f"writing {self.info.name}", unit=" pictures"
        )
        with self._tar_path.open("rb") as tar, progress:
            for path, (start, stop) in zip(
                self.paths(), itertools.pairwise(self._bounds), strict=True
            ):
                if not path.exists():
                    unfinished = path.with_name(f"unfinished.{path.name}")
                    adapter.write_examples(
                        unfinished,
                        (
                            (member.name, self._record(member, tar))
                            for member in self.members[start:stop]
                        ),
                    )
                    unfinished.rename(path)
                progress.update(stop - start)

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """Raises errors.UserError unless there are as many records as members, and a sample of them
        is what the tar holds.
        """
        if len(records) != len(self.members):
            raise errors.UserError(
                f"{self.info.name} has {len(records)} records and not {len(self.members)}: {_AGAIN}"
            )
        with self._tar_path.open("rb") as tar:
            for i in range(0, len(records), max(1, len(records) // _CHECKED)):
                member, record = self.members[i], records[i]
                label = self._features["label"].int2str(record["label"])
                found = record["file_name"].decode(), label, record["image"]
                if found != (member.name, member.label, self._picture(member, tar)):
                    shard = self.paths()[bisect.bisect_right(self._bounds, i) - 1]
                    raise errors.UserError(
                        f'"{shard}" does not hold "{member.name}" as the tar does: {_AGAIN}'
                    )

    def paths(self) -> list[pathlib.Path]:
        """Of the shards."""
        template, count = self.info.filename_template, len(self.info.shard_lengths)
        return [
            pathlib.Path(template.sharded_filepath(shard_index=i, num_shards=count))
            for i in range(count)
        ]

    def _record(self, member: Member, tar: BinaryIO) -> bytes:
        example = {
            "file_name": member.name,
            "image": io.BytesIO(self._picture(member, tar)),
            "label": member.label,
        }
        return self._serializer.serialize_example(self._features.encode_example(example))

    def _picture(self, member: Member, tar: BinaryIO) -> bytes:
        tar.seek(member.offset)
        data = tar.read(member.size)
        if member.name not in self._converted:
            return data
        file = io.BytesIO()
        pictures.decode(data).save(file, "jpeg", quality=100, subsampling=0)
        return file.getvalue()


def imagenet2012(tars: pathlib.Path, data_dir: pathlib.Path) -> None:
    """Prepares ImageNet-1k in `data_dir` from the two tars in the folder `tars`.

    Raises:
      errors.UserError: a tar is missing, damaged or incomplete, the disk is too small, or what was
        written is not right.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(_NAME, data_dir=data_dir, file_format="array_record")
    target = pathlib.Path(builder.data_path)
    if target.exists():
        raise errors.UserError(f'"{target}" is there already: delete it to prepare it anew.')
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
                f'"{path}" holds the class "{min(unknown)}", which ImageNet-1k does not have.'
            )
        writers[split] = SplitWriter(builder, split, path, members, unfinished)
    ours = {path for writer in writers.values() for path in writer.paths()}
    for path in set(unfinished.iterdir()) - ours:
        path.unlink()  # what a start that was broken off, or other tars, left behind
    missing = sum(writer.info.num_bytes for writer in writers.values()) - _size(unfinished)
    if missing > shutil.disk_usage(unfinished).free:
        raise errors.UserError(
            f'"{data_dir}" lacks room: {missing / 1e9:.0f} GB more have to be written.'
        )
    for writer in writers.values():
        writer.write()
    builder.info.set_splits(
        tfds.core.splits.SplitDict([writer.info for writer in writers.values()])
    )
    builder.info.write_to_directory(unfinished)
    written = tfds.builder_from_directory(unfinished)
    for split, writer in writers.items():
        try:
            writer.check(
                written.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            )
        except RuntimeError as error:  # array_record's, of a damaged shard
            raise errors.UserError(
                f'a file in "{unfinished}" is damaged ({error}): delete the folder and start again.'
            ) from error
    unfinished.rename(target)
    print(
        f"{target}: ",
        ", ".join(f"{len(writer.members)} pictures in {name}" for name, writer in writers.items()),
        sep="",
    )


def _index(
    path: pathlib.Path, split: str, index: Callable[[pathlib.Path, tqdm.tqdm], list[Member]]
) -> list[Member]:
    try:
        with tqdm.tqdm(
            total=_COUNTS[split], desc=f"reading the index of {path.name}", unit=" pictures"
        ) as progress:
            members = index(path, progress)
    except (OSError, tarfile.TarError) as error:
        raise errors.UserError(
            f'cannot read "{path}": {error}; get the tar from image-net.org (ILSVRC 2012).'
        ) from error
    if len(members) != _COUNTS[split]:
        raise errors.UserError(
            f'"{path}" holds {len(members)} pictures and not {_COUNTS[split]}: get the tar anew.'
        )
    return members


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avit_jax.tools.prepare_imagenet", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "name",
        choices=[_NAME],
        help="any other data set: `tfds.builder(name, data_dir=..., "
        "file_format='array_record').download_and_prepare()`",
    )
    parser.add_argument(
        "--tars",
        type=pathlib.Path,
        required=True,
        help=f"folder of {' and '.join(_TAR_NAMES.values())}",
    )
    parser.add_argument(
        "--data_dir",
        type=pathlib.Path,
        required=True,
        help="of data sets, the later --config.data.dir",
    )
    arguments = parser.parse_args()
    try:
        imagenet2012(arguments.tars, arguments.data_dir)
    except (errors.UserError, OSError) as error:
        errors.stop(error)


if __name__ == "__main__":
    _main()
