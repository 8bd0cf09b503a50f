"""Host transforms."""

import numpy as np
import pytest
from PIL import Image

from avit_jax.data import transforms


def _map(width: int, height: int) -> Image.Image:
    """Returns an image whose red is the column and whose green is the row; both are below 256."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def _train(picture: Image.Image, seed: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    out = transforms.Train(image_size=size)(picture, np.random.default_rng(seed))
    assert (out.shape, out.dtype) == ((*size, 3), np.uint8)
    return out.astype(int)


def test_random_crop_follows_from_the_generator() -> None:
    picture = _map(200, 150)
    np.testing.assert_array_equal(_train(picture, 1), _train(picture, 1))
    assert len({_train(picture, seed).tobytes() for seed in range(20)}) == 20


def test_random_crop_has_the_area_and_shape_it_should() -> None:
    picture, areas, ratios, flips, corners = _map(240, 200), [], [], 0, []
    for seed in range(300):
        image = _train(picture, seed)
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
def test_evaluation_crop(
    picture_size: tuple, image_size: tuple, crop_ratio: float, resized: tuple, box: tuple
) -> None:
    picture = _noise(*picture_size)
    out = transforms.Evaluate(image_size=image_size, crop_ratio=crop_ratio)(picture)
    expected = picture.resize(resized, Image.Resampling.BICUBIC).crop(box)
    np.testing.assert_array_equal(out, np.asarray(expected))
    assert out.dtype == np.uint8


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (30_000, 2)])
def test_a_long_strip_does_not_fill_the_memory(width: int, height: int) -> None:
    strip = np.zeros((height, width, 3), np.uint8)
    strip[2 * height // 5 : 3 * height // 5 + 1, 2 * width // 5 : 3 * width // 5 + 1] = 255
    out = transforms.Evaluate(image_size=(16, 16), crop_ratio=0.8)(Image.fromarray(strip))
    assert out.shape == (16, 16, 3) and (out == 255).all()  # the middle is seen


def test_arrays_pass_as_they_are() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    for out in (
        transforms.Train(image_size=(3, 4), magnitude=9.0, channels=1)(
            image, np.random.default_rng(0)
        ),
        transforms.Evaluate(image_size=(3, 4), crop_ratio=0.5, channels=1)(image),
    ):
        np.testing.assert_array_equal(out, image)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels @ [0.299, 0.587, 0.114]  # ITU-R 601


def test_channels_are_those_of_the_network() -> None:
    picture, size = _noise(40, 30), (16, 20)
    for make in (
        lambda channels: transforms.Train(image_size=size, magnitude=9.0, channels=channels),
        lambda channels: transforms.Evaluate(image_size=size, crop_ratio=0.9, channels=channels),
    ):
        is_training = isinstance(make(1), transforms.Train)
        for seed in range(5):
            rng = [[np.random.default_rng(seed)] * is_training for _ in range(2)]
            rgb, grey = (make(c)(picture, *rng[c // 3]) for c in (3, 1))
            assert (grey.shape, grey.dtype) == ((*size, 1), np.uint8)
            np.testing.assert_allclose(grey[..., 0], _grey(rgb), atol=1)
    array, evaluate = np.asarray(picture), transforms.Evaluate
    grey = evaluate(image_size=(30, 40), crop_ratio=1.0, channels=1)(array)
    np.testing.assert_allclose(grey[..., 0], _grey(array), atol=1)
    rgb = evaluate(image_size=(30, 40), crop_ratio=1.0, channels=3)(grey)
    np.testing.assert_array_equal(rgb, np.dstack([grey] * 3))
