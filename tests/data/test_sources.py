"""Sources of images."""

import dataclasses
import functools
import io
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import fixtures
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from avit_jax.data import image_files, loader, sources, transforms
from avit_jax.utils import errors


@pytest.mark.parametrize(
    ("split", "images"), [("train", slice(0, 1437)), ("test", slice(1437, 1797))]
)
def test_digits(split: str, images: slice) -> None:
    bunch = sklearn.datasets.load_digits()
    source = sources.load("digits", split=split, data_dir="", image_size=(8, 8))  # not enlarged
    assert source.label_names == list("0123456789")
    assert [record["label"] for record in source.records] == list(bunch.target[images])
    pixels = np.stack([record["image"] for record in source.records])
    assert (pixels.shape, pixels.dtype) == ((images.stop - images.start, 8, 8, 1), np.uint8)
    np.testing.assert_allclose(pixels[..., 0] / 255, bunch.images[images] / 16, atol=0.5 / 255)


def test_digits_are_enlarged_also_to_an_oblong() -> None:
    small, large = (
        sources.load("digits", split="test", data_dir="", image_size=size).records[5]["image"]
        for size in ((8, 8), (24, 40))
    )
    assert (large.shape, large.dtype) == ((24, 40, 1), np.uint8)
    np.testing.assert_array_equal(large[1::3, 2::5], small)
    np.testing.assert_allclose(
        large[1::3, 4:-1:5], 0.6 * small[:, :-1] + 0.4 * small[:, 1:], atol=1
    )


def test_digits_have_no_other_split() -> None:
    with pytest.raises(errors.UserError, match=r'"train" and "test".*"validation"'):
        sources.load("digits", split="validation", data_dir="", image_size=(8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_classes_and_channels_have_to_fit(channels: int) -> None:
    source = sources.Source("pets", [], ["cat", "dog"], channels=channels)
    sources.check_fit(source, num_classes=2, channels=channels)
    with pytest.raises(errors.UserError, match="num_classes=2"):
        sources.check_fit(source, num_classes=10, channels=channels)
    with pytest.raises(errors.UserError, match=f"model.channels={channels}"):
        sources.check_fit(source, num_classes=2, channels=4)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(1, "pets: grey images become RGB, because"), (3, "pets: RGB images become grey, because")],
)
def test_other_channels_are_reported(
    channels: int, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = sources.Source("pets", [], ["cat", "dog"], channels=channels)
    with caplog.at_level("INFO", logger="avit_jax"):
        sources.check_fit(source, num_classes=2, channels=channels)
        sources.check_fit(source, num_classes=2, channels=4 - channels)
    (message,) = fixtures.messages(caplog, "avit_jax.data.sources")
    assert message.startswith(expected)


@pytest.mark.parametrize("name", ["imagenet2012", "cifar10"])
def test_data_set_that_is_not_prepared(tmp_path: pathlib.Path, name: str) -> None:
    how = (
        "avit_jax.tools.prepare_imagenet imagenet2012"
        if name == "imagenet2012"
        else r"tfds\.builder\('cifar10', .*download_and_prepare"
    )
    expected = (
        rf'"{name}" is not prepared in "{re.escape(str(tmp_path))}".*{how}.*configs/digits\.py'
    )
    with pytest.raises(errors.UserError, match=expected):
        sources.load(name, split="train", data_dir=str(tmp_path), image_size=(8, 8))


@pytest.mark.parametrize(
    "name", ["no_such_data_set", "two words", "cifar10:9.9.9", "cifar10/no_such_config"]
)
def test_data_set_that_does_not_exist(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(errors.UserError, match=f'cannot open "{name}"'):
        sources.load(name, split="train", data_dir=str(tmp_path), image_size=(8, 8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepares a TFDS data set `tiny_pictures`: PNG number i has the grey value 10 * i and label i % 3."""
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _: object) -> dict[str, Iterator]:
            return {"train": self._generate_examples(12), "validation": self._generate_examples(5)}

        def _generate_examples(self, count: int) -> Iterator:
            for i in range(count):
                yield (
                    i,
                    {
                        "image": io.BytesIO(fixtures.png(np.full((6, 8, 3), 10 * i, np.uint8))),
                        "label": i % 3,
                    },
                )

    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize(
    ("split", "count"), [("train", 12), ("validation", 5), ("train[:4]", 4), ("train[50%:]", 6)]
)
def test_prepared_data_set(tiny: str, split: str, count: int) -> None:
    source = sources.load("tiny_pictures", split=split, data_dir=tiny, image_size=(8, 8))
    assert source.label_names == ["a", "b", "c"]
    assert len(source.records) == count
    shades = [
        np.asarray(Image.open(io.BytesIO(record["image"])))[0, 0, 0] // 10
        for record in source.records
    ]
    assert len(set(shades)) == count
    assert [record["label"] for record in source.records] == [shade % 3 for shade in shades]


@pytest.mark.parametrize("split", ["nowhere", "train[:", "", "train[:0]", "train[4:2]"])
def test_split_that_does_not_exist(tiny: str, split: str) -> None:
    with pytest.raises(errors.UserError, match=re.escape(f'split "{split}" of "tiny_pictures"')):
        sources.load("tiny_pictures", split=split, data_dir=tiny, image_size=(8, 8))


@pytest.fixture
def data_dir() -> str:
    """Returns the folder of the real data sets, or skips."""
    if "AVIT_DATA_DIR" not in os.environ:
        pytest.skip(
            "set AVIT_DATA_DIR to a folder with imagenet2012 and cifar10, prepared in "
            "array_record format"
        )
    return os.environ["AVIT_DATA_DIR"]


@pytest.mark.parametrize(
    ("name", "classes", "splits"),
    [("imagenet2012", 1000, ("train", "validation")), ("cifar10", 10, ("train", "test"))],
)
def test_real_data_set(data_dir: str, name: str, classes: int, splits: tuple[str, str]) -> None:
    train, test, part = (
        sources.load(name, split=split, data_dir=data_dir, image_size=(224, 224))
        for split in (*splits, "train[3:7]")
    )
    sources.check_fit(train, num_classes=classes, channels=3)
    assert [record["image"] for record in part.records] == [
        train.records[i]["image"] for i in range(3, 7)
    ]
    for source in (train, test):
        record = source.records[len(source.records) - 1]
        assert 0 <= record["label"] < classes
        picture = image_files.decode(record["image"])
        for out in (
            transforms.Train(image_size=(224, 224), magnitude=9.0)(
                picture, np.random.default_rng(0)
            ),
            transforms.Evaluate(image_size=(224, 224), crop_ratio=0.875)(picture),
        ):
            assert (out.shape, out.dtype) == ((224, 224, 3), np.uint8)
            assert out.std() > 1


# Folders of pictures
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Makes a folder of cat and dog images, with other files among them."""
    for name in (
        "train/dog/1.JPG",
        "train/dog/2.jpeg",
        "train/cat/b.png",
        "train/cat/a.WebP",
        "train/cat/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "train/dog/album.jpg").mkdir()
    (tmp_path / "train/readme.jpg").write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.png").write_bytes(b"linked")
    (tmp_path / "train/dog/3.png").symlink_to(tmp_path / "elsewhere/c.png")
    (tmp_path / "train/fox").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/dog/gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train/dog/._1.jpg").write_bytes(b"")
    (tmp_path / "train/.thumbnails").mkdir()
    return tmp_path


def test_folder(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="avit_jax"):
        source = sources.load("folder", split="train", data_dir=str(folder), image_size=(8, 8))
    assert source.label_names == ["cat", "dog", "fox"]
    found = [(record["image"].decode(), record["label"]) for record in source.records]
    assert found == [
        ("train/cat/a.WebP", 0), ("train/cat/b.png", 0),
        ("train/dog/1.JPG", 1), ("train/dog/2.jpeg", 1), ("linked", 1), ("linked", 2),
    ]  # fmt: skip
    assert "6 images of 3 classes, 3 other files ignored" in caplog.text
    assert source.describe(2, source.records[2]) == str(folder / "train/dog/1.JPG")
    sources.check_fit(source, num_classes=3, channels=3)


@pytest.mark.parametrize(
    ("split", "expected"),
    [("val", "cannot read .*val.*No such file"), ("empty", "no images in .*empty")],
)
def test_folder_without_pictures(folder: pathlib.Path, split: str, expected: str) -> None:
    (folder / "empty/cat").mkdir(parents=True)
    with pytest.raises(errors.UserError, match=expected):
        sources.load("folder", split=split, data_dir=str(folder), image_size=(8, 8))


def test_fingerprint_of_a_folder(folder: pathlib.Path) -> None:
    shutil.copytree(folder / "train", folder / "copy/train", symlinks=True)
    load = functools.partial(sources.load, "folder", split="train", image_size=(8, 8))
    here = load(data_dir=str(folder))
    assert load(data_dir=str(folder / "copy")).fingerprint() == here.fingerprint()
    (folder / "copy/train/dog/1.JPG").rename(folder / "copy/train/dog/0.JPG")
    assert load(data_dir=str(folder / "copy")).fingerprint() != here.fingerprint()
    for change in ({"label_names": ["dog", "cat", "fox"]}, {"records": list(here.records)[1:]}):
        assert dataclasses.replace(here, **change).fingerprint() != here.fingerprint()


def test_what_is_no_picture_is_left_out_and_counted(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    cat = folder / "train/cat"
    (cat / "loop.png").symlink_to(cat / "loop.png")
    (cat / "here.png").symlink_to(cat)
    (cat / "above").symlink_to(folder)
    os.mkfifo(cat / "pipe.png")
    for name, target in (
        ("self", "self"),
        ("parent", "."),
        ("root", str(folder)),
        ("nowhere", "gone"),
    ):
        (folder / "train" / name).symlink_to(target)
    with caplog.at_level("INFO", logger="avit_jax"):
        source = sources.load("folder", split="train", data_dir=str(folder), image_size=(8, 8))
    assert source.label_names == ["cat", "dog", "fox"]
    assert [len(source.records[i]) for i in range(len(source.records))] == [3] * 6
    assert "6 images of 3 classes, 11 other files ignored" in caplog.text


def test_classes_may_have_folders_inside(folder: pathlib.Path) -> None:
    """Also behind links, but never the images of another class through a link to a parent."""
    names = ("cat/2.png", "cat/big/a.TIF", "cat/big/old/b.tiff", "dog/c.jfif", "dog/.no/d.png")
    for name in names:
        (folder / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / name).write_bytes(name.encode())
    (folder / "val/cat/big/more").symlink_to(folder / "elsewhere")
    (folder / "elsewhere/all").symlink_to(folder)
    (folder / "elsewhere/again").symlink_to(folder / "val/cat/big")
    source = sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))
    assert source.label_names == ["cat", "dog"]
    found = [(record["image"].decode(), record["label"]) for record in source.records]
    expected = [("cat/2.png", 0), ("cat/big/a.TIF", 0), ("linked", 0), ("cat/big/old/b.tiff", 0)]
    assert found == [*expected, ("dog/c.jfif", 1)]
    before = source.fingerprint()
    (folder / "val/cat/big/old").rename(folder / "val/cat/old")  # the same files in this order
    moved = sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))
    assert moved.fingerprint() != before


def test_classes_of_training_and_evaluation_have_to_be_the_same(folder: pathlib.Path) -> None:
    (folder / "val/cat").mkdir(parents=True)
    (folder / "val/cat/a.png").write_bytes(b"")
    train, val = (
        sources.load("folder", split=split, data_dir=str(folder), image_size=(8, 8))
        for split in ("train", "val")
    )
    sources.check_same_classes(train, train)
    with pytest.raises(errors.UserError, match="differ in their classes: dog, fox: set"):
        sources.check_same_classes(train, val)
    reversed_names = dataclasses.replace(train, label_names=train.label_names[::-1])
    with pytest.raises(errors.UserError, match="differ in their classes: their order: set"):
        sources.check_same_classes(train, reversed_names)


@pytest.mark.parametrize("label", [None, "number"])
def test_data_set_without_labels(tmp_path: pathlib.Path, label: str | None) -> None:
    import tensorflow_datasets as tfds

    class UnlabelledPictures(tfds.core.GeneratorBasedBuilder):
        name = f"pictures_with_{label or 'no_label'}"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image()} | (
                {"label": tfds.features.Scalar(np.int32)} if label else {}
            )
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _: object) -> dict[str, Iterator]:
            record = {"image": io.BytesIO(fixtures.png(np.zeros((2, 2, 3), np.uint8)))} | (
                {"label": 1} if label else {}
            )
            return {"train": iter([(0, record)])}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    UnlabelledPictures(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    with pytest.raises(
        errors.UserError, match=r"no image with one label or .*: .* image.*; name another"
    ):
        sources.load(
            UnlabelledPictures.name, split="train", data_dir=str(tmp_path), image_size=(8, 8)
        )


def test_damaged_data_set(tiny: str, tmp_path: pathlib.Path) -> None:
    shutil.copytree(f"{tiny}/tiny_pictures", tmp_path / "tiny_pictures")
    (shard,) = (tmp_path / "tiny_pictures").rglob("*train.array_record*")
    whole = shard.read_bytes()
    for damaged in (None, b"", whole[:1000], bytes(len(whole))):
        shard.unlink(missing_ok=True)
        if damaged is not None:
            shard.write_bytes(damaged)
        with pytest.raises(errors.UserError, match='"tiny_pictures"'):
            source = sources.load(
                "tiny_pictures", split="train", data_dir=str(tmp_path), image_size=(8, 8)
            )
            loader.Reader(source=source, transform=np.asarray)(0)
    shard.write_bytes(whole)
    (description,) = (tmp_path / "tiny_pictures").rglob("dataset_info.json")
    description.write_text("{")
    with pytest.raises(errors.UserError, match='cannot open "tiny_pictures"'):
        sources.load("tiny_pictures", split="train", data_dir=str(tmp_path), image_size=(8, 8))
