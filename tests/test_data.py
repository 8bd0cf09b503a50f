"""Sources, host transforms and the loader."""

import io
import os
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from avit_jax import errors
from avit_jax.data import loader, sources, transforms

# Sources ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "images"), [("train", slice(0, 1437)), ("test", slice(1437, 1797))])
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
        sources.load("digits", split="test", data_dir="", image_size=size).records[5]["image"] for size in ((8, 8), (24, 40))
    )
    assert (large.shape, large.dtype) == ((24, 40, 1), np.uint8)
    np.testing.assert_array_equal(large[1::3, 2::5], small)
    np.testing.assert_allclose(large[1::3, 4:-1:5], 0.6 * small[:, :-1] + 0.4 * small[:, 1:], atol=1)


def test_digits_have_no_other_split() -> None:
    with pytest.raises(errors.UserError, match=r'"train" and "test".*"validation"'):
        sources.load("digits", split="validation", data_dir="", image_size=(8, 8))


@pytest.mark.parametrize(("image", "channels"), [(np.zeros((4, 4, 1), np.uint8), 1), (b"encoded", 3)])
def test_classes_and_channels_have_to_fit(image: object, channels: int) -> None:
    source = sources.Source([{"image": image, "label": 0}], ["cat", "dog"])
    sources.check_fit(source, num_classes=2, channels=channels)
    with pytest.raises(errors.UserError, match="num_classes=2"):
        sources.check_fit(source, num_classes=10, channels=channels)
    with pytest.raises(errors.UserError, match=f"model.channels={channels}"):
        sources.check_fit(source, num_classes=2, channels=4)


@pytest.mark.parametrize("name", ["imagenet2012", "cifar10"])
def test_data_set_that_is_not_prepared(tmp_path: pathlib.Path, name: str) -> None:
    expected = rf'"{name}" is not prepared in "{re.escape(str(tmp_path))}".*tfds build {name} .*configs/digits\.py'
    with pytest.raises(errors.UserError, match=expected):
        sources.load(name, split="train", data_dir=str(tmp_path), image_size=(8, 8))


@pytest.mark.parametrize("name", ["no_such_data_set", "", "two words", "cifar10:9.9.9", "cifar10/no_such_config"])
def test_data_set_that_does_not_exist(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(errors.UserError, match=f'cannot open "{name}"'):
        sources.load(name, split="train", data_dir=str(tmp_path), image_size=(8, 8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a data set "tiny_pictures" of tensorflow-datasets: PNG pictures, the i-th of shade 10 * i and label i % 3."""
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b", "c"])}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: object) -> dict[str, Iterator]:
            return {"train": self._generate_examples(12), "validation": self._generate_examples(5)}

        def _generate_examples(self, count: int) -> Iterator:
            for i in range(count):
                yield i, {"image": io.BytesIO(_png(np.full((6, 8, 3), 10 * i, np.uint8))), "label": i % 3}

    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("validation", 5), ("train[:4]", 4), ("train[50%:]", 6)])
def test_prepared_data_set(tiny: str, split: str, count: int) -> None:
    source = sources.load("tiny_pictures", split=split, data_dir=tiny, image_size=(8, 8))
    assert source.label_names == ["a", "b", "c"]
    assert len(source.records) == count
    shades = [np.asarray(Image.open(io.BytesIO(record["image"])))[0, 0, 0] // 10 for record in source.records]
    assert len(set(shades)) == count
    assert [record["label"] for record in source.records] == [shade % 3 for shade in shades]


@pytest.mark.parametrize("split", ["nowhere", "train[:", ""])
def test_split_that_does_not_exist(tiny: str, split: str) -> None:
    with pytest.raises(errors.UserError, match=re.escape(f'split "{split}" of "tiny_pictures"')):
        sources.load("tiny_pictures", split=split, data_dir=tiny, image_size=(8, 8))


@pytest.fixture
def data_dir() -> str:
    """Folder of the real data sets, where there is one."""
    if "AVIT_DATA_DIR" not in os.environ:
        pytest.skip("set AVIT_DATA_DIR to a folder with imagenet2012 and cifar10, prepared in array_record format")
    return os.environ["AVIT_DATA_DIR"]


@pytest.mark.parametrize(
    ("name", "classes", "splits"), [("imagenet2012", 1000, ("train", "validation")), ("cifar10", 10, ("train", "test"))]
)
def test_real_data_set(data_dir: str, name: str, classes: int, splits: tuple[str, str]) -> None:
    train, test, part = (
        sources.load(name, split=split, data_dir=data_dir, image_size=(224, 224)) for split in (*splits, "train[3:7]")
    )
    sources.check_fit(train, num_classes=classes, channels=3)
    assert [record["image"] for record in part.records] == [train.records[i]["image"] for i in range(3, 7)]
    for source in (train, test):
        record = source.records[len(source.records) - 1]
        assert 0 <= record["label"] < classes
        for out in (
            transforms.train(record, np.random.default_rng(0), image_size=(224, 224)),
            transforms.evaluate(record, image_size=(224, 224), crop_ratio=0.875),
        ):
            assert (out["image"].shape, out["image"].dtype) == ((224, 224, 3), np.uint8)
            assert out["label"] == record["label"]
            assert out["image"].std() > 1


# Host transforms -------------------------------------------------------------------------------------------------------


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _map(width: int, height: int) -> sources.Record:
    """A picture whose red is the column and whose green is the row; both below 256."""
    rows, columns = np.mgrid[:height, :width]
    return {"image": _png(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)), "label": 3}


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _train(record: sources.Record, seed: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    out = transforms.train(record, np.random.default_rng(seed), image_size=size)
    assert (out["image"].shape, out["image"].dtype) == ((*size, 3), np.uint8)
    assert (out["label"], out["label"].dtype) == (record["label"], np.int32)
    return out["image"].astype(int)


def test_random_crop_follows_from_the_generator() -> None:
    record = _map(200, 150)
    np.testing.assert_array_equal(_train(record, 1), _train(record, 1))
    assert len({_train(record, seed).tobytes() for seed in range(20)}) == 20


def test_random_crop_has_the_area_and_shape_it_should() -> None:
    record, areas, ratios, flips, corners = _map(240, 200), [], [], 0, []
    for seed in range(300):
        image = _train(record, seed)
        # Samples lie half a step from the edges of the box; red falls where the picture is flipped.
        red, green = image[16, :, 0], image[:, 24, 1]
        width, height = abs(red[-1] - red[0]) * 48 / 47, (green[-1] - green[0]) * 32 / 31
        assert height > 0
        flips += red[-1] < red[0]
        areas.append(width * height / (240 * 200))
        ratios.append(width / height)
        corners.append((red.min(), green.min()))
    assert 0.07 < min(areas) < 0.12
    assert 0.9 < max(areas) < 1.02
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert 110 < flips < 190
    assert abs(np.median(np.log(ratios))) < 0.06  # shapes are drawn evenly in their logarithm
    assert np.ptp(corners, axis=0).min() > 90


@pytest.mark.parametrize(("width", "height"), [(250, 4), (4, 250)])
def test_where_no_crop_fits_it_is_the_central_one(width: int, height: int) -> None:
    image = _train(_map(width, height), 0)
    assert (image[..., 0].min(), image[..., 0].max()) == ((122, 126) if width > height else (0, 3))
    assert (image[..., 1].min(), image[..., 1].max()) == ((0, 3) if width > height else (122, 126))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 200), (200, 1), (2, 3)])
def test_tiny_pictures_do_not_stop_training(width: int, height: int) -> None:
    for seed in range(20):
        _train(_map(width, height), seed)


@pytest.mark.parametrize(
    ("picture_size", "image_size", "crop_ratio", "resized", "box"),
    [
        ((300, 200), (224, 224), 0.875, (384, 256), (80, 16, 304, 240)),
        ((120, 400), (56, 56), 0.875, (64, 213), (4, 78, 60, 134)),
        ((100, 80), (32, 64), 1.0, (64, 51), (0, 10, 64, 42)),
        ((100, 100), (50, 50), 1.0, (50, 50), (0, 0, 50, 50)),
    ],
)
def test_evaluation_crop(picture_size: tuple, image_size: tuple, crop_ratio: float, resized: tuple, box: tuple) -> None:
    picture = _noise(*picture_size)
    record = {"image": _png(np.asarray(picture)), "label": 7}
    out = transforms.evaluate(record, image_size=image_size, crop_ratio=crop_ratio)
    expected = picture.resize(resized, Image.Resampling.BICUBIC).crop(box)
    np.testing.assert_array_equal(out["image"], np.asarray(expected))
    assert (out["image"].dtype, out["label"], out["label"].dtype) == (np.uint8, 7, np.int32)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_any_picture_becomes_rgb(mode: str) -> None:
    file = io.BytesIO()
    _noise(40, 30).convert(mode).save(file, "jpeg" if mode == "CMYK" else "png")
    record = {"image": file.getvalue(), "label": 0}
    evaluated = transforms.evaluate(record, image_size=(16, 16), crop_ratio=1.0)["image"]
    assert evaluated.shape == _train(record, 0, (16, 16)).shape == (16, 16, 3)
    if mode == "L":
        np.testing.assert_array_equal(evaluated[..., 0], evaluated[..., 2])


def test_arrays_pass_as_they_are() -> None:
    record = {"image": np.arange(12, dtype=np.uint8).reshape(3, 4, 1), "label": 2}
    for out in (
        transforms.train(record, np.random.default_rng(0), image_size=(3, 4)),
        transforms.evaluate(record, image_size=(3, 4), crop_ratio=0.5),
    ):
        np.testing.assert_array_equal(out["image"], record["image"])
        assert (out["label"], out["label"].dtype) == (2, np.int32)


# Loader ----------------------------------------------------------------------------------------------------------------


def _numbered(count: int) -> sources.Source:
    """Images whose label is their place."""
    records = [{"image": np.full((2, 3, 1), i % 256, np.uint8), "label": i} for i in range(count)]
    return sources.Source(records, [str(i) for i in range(count)])


def _with_draw(record: sources.Record, rng: np.random.Generator) -> sources.Record:
    return {"image": record["image"], "label": np.int32(record["label"]), "draw": rng.random()}


def _take(count: int, images: int = 20, batch_size: int = 8, **settings: int) -> list[loader.Batch]:
    settings = {"seed": 0, "start_step": 0, "num_threads": 1} | settings
    batches = loader.train_batches(_numbered(images), _with_draw, batch_size=batch_size, **settings)
    return [jax.device_get(next(batches)) for _ in range(count)]


def _flat(batches: list[loader.Batch], key: str = "label") -> list:
    return np.concatenate([batch[key].reshape(-1) for batch in batches]).tolist()


def test_each_epoch_is_a_new_permutation() -> None:
    labels = np.reshape(_flat(_take(10)), (4, 20))  # 2 1/2 batches an epoch
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(20), (4, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 4
    assert _flat(_take(3, seed=1)) != _flat(_take(3))


def test_batches_are_spread_over_devices_and_say_where_each_image_lies() -> None:
    (batch,) = _take(1, images=40, batch_size=16)
    assert jax.local_device_count() == 8
    assert {key: x.shape for key, x in batch.items()} == {
        "image": (8, 2, 2, 3, 1), "label": (8, 2), "draw": (8, 2), "index": (8, 2),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["index"], np.arange(16).reshape(8, 2))
    np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], batch["label"])
    assert (batch["image"].dtype, batch["label"].dtype, batch["index"].dtype) == (np.uint8, np.int32, np.int32)


@pytest.mark.parametrize("start_step", [1, 3, 7])
def test_start_step_goes_on_with_the_same_batches(start_step: int) -> None:
    resumed, whole = _take(9 - start_step, start_step=start_step), _take(9)
    for a, b in zip(resumed, whole[start_step:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_number_of_threads_does_not_matter() -> None:
    for a, b in zip(_take(6), _take(6, num_threads=4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_transform_draws_anew_for_each_image_and_epoch() -> None:
    assert len(set(_flat(_take(10), "draw"))) == 80
    assert not set(_flat(_take(10), "draw")) & set(_flat(_take(10, seed=1), "draw"))


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("batch_size", [56, 360, 512])
def test_evaluation_sees_each_image_once_in_order(batch_size: int, num_threads: int) -> None:
    def transform(record: sources.Record) -> sources.Record:
        return {"image": record["image"], "label": np.int32(record["label"])}

    batches = list(loader.eval_batches(_numbered(360), transform, batch_size=batch_size, num_threads=num_threads))
    assert len(batches) == -(-360 // batch_size)
    assert all(batch["image"].shape == (8, batch_size // 8, 2, 3, 1) for batch in batches)
    labels, weight = np.array(_flat(batches)), np.array(_flat(batches, "weight"))
    assert batches[0]["weight"].dtype == np.float32
    np.testing.assert_array_equal(weight, np.arange(len(weight)) < 360)
    np.testing.assert_array_equal(labels[weight == 1], np.arange(360))
