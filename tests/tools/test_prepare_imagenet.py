"""Compares the prepared ImageNet with the output of tensorflow-datasets' own writer."""

import io
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from avit_jax.data import image_files, sources
from avit_jax.tools import prepare_imagenet
from avit_jax.utils import errors

# The first three classes, one of their pictures in CMYK, one a PNG.
TRAIN = {
    "n01440764": ["n01440764_10.JPEG", "n01440764_7.JPEG", "n01440764_123.JPEG"],
    "n01739381": ["n01739381_1309.JPEG", "n01739381_2.JPEG"],
    "n02105855": ["n02105855_2933.JPEG", "n02105855_1.JPEG", "n02105855_5.JPEG"],
}
VALIDATION = [f"ILSVRC2012_val_{i:08}.JPEG" for i in (3, 1, 2, 5, 4)]


def picture(name: str) -> bytes:
    pixels = np.random.default_rng(sum(name.encode())).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels).resize((48, 36)), io.BytesIO()
    kind = "png" if name == "n02105855_2933.JPEG" else "jpeg"
    (image.convert("CMYK") if name == "n01739381_1309.JPEG" else image).save(file, kind)
    return file.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def tars(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    classes = {
        f"{label}.tar": tar_of({name: picture(name) for name in names})
        for label, names in TRAIN.items()
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(
        tar_of({name: picture(name) for name in VALIDATION})
    )
    monkeypatch.setattr(prepare_imagenet, "_COUNTS", {"train": 8, "validation": 5})
    return folder


def test_the_records_and_their_order_are_those_of_tfds(
    tars: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

    names = pathlib.Path(imagenet_common.label_names_file()).read_text().split()
    validation_labels = (
        tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    )

    class PlainImagenet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=names),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _: object) -> dict[str, Iterator]:
            train = ((name, label) for label, names in TRAIN.items() for name in names)
            return {
                "train": self._generate_examples(train),
                "validation": self._generate_examples(
                    zip(sorted(VALIDATION), validation_labels, strict=False)
                ),
            }

        def _generate_examples(self, labelled: Iterator) -> Iterator:
            for name, label in labelled:
                yield name, {"file_name": name, "image": io.BytesIO(picture(name)), "label": label}

    reference = PlainImagenet(data_dir=str(tmp_path / "reference"), file_format="array_record")
    reference.download_and_prepare()
    prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    for split, count in (("train", 8), ("validation", 5)):
        ours = sources.load(
            "imagenet2012", split=split, data_dir=str(tmp_path / "data"), image_size=(8, 8)
        )
        theirs = reference.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        assert ours.label_names == names
        assert len(ours.records) == len(theirs) == count
        for a, b in zip(ours.records, theirs, strict=True):
            assert (a["file_name"], a["label"]) == (b["file_name"], b["label"])
            if a["file_name"] in (b"n01739381_1309.JPEG", b"n02105855_2933.JPEG"):
                assert Image.open(io.BytesIO(a["image"])).format == "JPEG"
                assert Image.open(io.BytesIO(a["image"])).mode == "RGB"
                rgb = [
                    np.asarray(image_files.decode(record["image"])).astype(float)
                    for record in (a, b)
                ]
                assert np.abs(rgb[0] - rgb[1]).max() < 6
            else:
                assert a["image"] == b["image"]


def test_a_second_start_goes_on_and_a_third_is_refused(
    tars: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *_: 4)
    read, left = prepare_imagenet.SplitWriter._image, iter(range(9))

    def interrupted(*arguments: object) -> bytes:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_imagenet.SplitWriter, "_image", interrupted)
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    with pytest.raises(errors.UserError, match="not prepared"):
        sources.load(
            "imagenet2012", split="train", data_dir=str(tmp_path / "data"), image_size=(8, 8)
        )
    (unfinished,) = (tmp_path / "data/imagenet2012").iterdir()
    whole = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("imagenet2012*")}
    assert 4 < len(whole) < 8
    prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    finished = {
        path.name: path.stat().st_mtime_ns
        for path in (tmp_path / "data/imagenet2012/5.1.0").iterdir()
    }
    assert whole.items() <= finished.items()
    assert sum("array_record" in name for name in finished) == 8
    with pytest.raises(errors.UserError, match="exists already"):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")


def test_tars_that_are_missing_damaged_or_incomplete(
    tars: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tars / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.unlink()
    with pytest.raises(
        errors.UserError, match=r"cannot read .*ILSVRC2012_img_train\.tar.*No such file"
    ):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    for damaged in (b"no tar", whole[: len(whole) // 3]):
        train.write_bytes(damaged)
        with pytest.raises(
            errors.UserError, match=r"cannot read .*train\.tar|holds \d images and not 8"
        ):
            prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    train.write_bytes(whole)
    monkeypatch.setattr(
        prepare_imagenet.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})
    )
    with pytest.raises(errors.UserError, match=r"is too small: .* GB must be free"):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")


def test_a_tar_of_more_pictures_than_there_are_labels(
    tars: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(50_001)]
    (tars / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict.fromkeys(names, b"")))
    monkeypatch.setitem(prepare_imagenet._COUNTS, "validation", 50_000)
    with pytest.raises(errors.UserError, match="holds 50001 images and not 50000"):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")


def test_a_class_that_imagenet_does_not_have(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = {f"n99999999_{i}.JPEG": picture(str(i)) for i in range(8)}
    (tars / "ILSVRC2012_img_train.tar").write_bytes(tar_of({"n99999999.tar": tar_of(files)}))
    with pytest.raises(errors.UserError, match='class "n99999999"'):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")


def test_left_over_files_do_not_get_into_the_data_set(
    tars: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    unfinished = tmp_path / "data/imagenet2012/5.1.0.unfinished"
    unfinished.mkdir(parents=True)
    for name in ("imagenet2012-train.array_record-00000-of-00099", "unfinished.imagenet2012-train"):
        (unfinished / name).write_bytes(b"old")
    damaged = unfinished / "imagenet2012-train.array_record-00000-of-00001"
    damaged.write_bytes(b"old")
    with pytest.raises(errors.UserError, match=r"is damaged .*delete the folder"):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    damaged.unlink()
    prepare_imagenet.imagenet2012(tars, tmp_path / "data")
    names = sorted(path.name for path in (tmp_path / "data/imagenet2012/5.1.0").iterdir())
    assert names == [
        "dataset_info.json", "features.json", "imagenet2012-train.array_record-00000-of-00001",
        "imagenet2012-validation.array_record-00000-of-00001", "label.labels.txt",
    ]  # fmt: skip


def test_what_was_written_is_checked(
    tars: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, first = prepare_imagenet.SplitWriter._image, iter([b"something else"])
    monkeypatch.setattr(
        prepare_imagenet.SplitWriter,
        "_image",
        lambda *arguments: next(first, None) or read(*arguments),
    )
    with pytest.raises(
        errors.UserError, match=r"imagenet2012-validation.*does not hold .*ILSVRC2012_val.*delete"
    ):
        prepare_imagenet.imagenet2012(tars, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "words"), [("cifar10", "choose from"), ("imagenet2012", "5 images and not 50000")]
)
def test_command_line(tars: pathlib.Path, tmp_path: pathlib.Path, name: str, words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "avit_jax.tools.prepare_imagenet",
        name,
        f"--tars={tars}",
        f"--data_dir={tmp_path}",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert (
        "error: " in result.stderr.strip().splitlines()[-1]
        and words in result.stderr.strip().splitlines()[-1]
    )
