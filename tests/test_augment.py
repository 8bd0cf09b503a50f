"""Augmentation on the device against NumPy, pixel by pixel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.data import augment

_affine = jax.jit(augment.random_affine, static_argnums=3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 12, 10, 2), dtype=np.uint8)


def _drawn(monkeypatch: pytest.MonkeyPatch, images: np.ndarray, draw: list[float], ranges: augment.Affine) -> np.ndarray:
    """The affine map when the random numbers, of rotation, shear, scale and the two moves, are those of `draw`."""
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "uniform", lambda *_, **__: jnp.asarray(draw))
        return np.asarray(augment.random_affine(jnp.asarray(images), jax.random.key(0), jnp.arange(len(images)), ranges))


def _bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Value at a point, pixels outside being 0."""
    total = np.zeros(image.shape[-1])
    for row, column in itertools.product((int(np.floor(y)), int(np.floor(y)) + 1), (int(np.floor(x)), int(np.floor(x)) + 1)):
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return total


def test_affine_map_of_range_0_is_identity(images: np.ndarray) -> None:
    moved = _affine(images, jax.random.key(0), np.arange(8), augment.Affine())
    assert moved.dtype == jnp.float32
    np.testing.assert_allclose(moved, images, atol=1e-3)


def test_quarter_turn(monkeypatch: pytest.MonkeyPatch, images: np.ndarray) -> None:
    square = images[:, :10]
    turned = _drawn(monkeypatch, square, [1, 0, 0, 0, 0], augment.Affine(rotate=90.0))
    np.testing.assert_allclose(turned, np.rot90(square, axes=(2, 1)), atol=1e-2)


def test_move_brings_in_0(monkeypatch: pytest.MonkeyPatch, images: np.ndarray) -> None:
    moved = _drawn(monkeypatch, images, [0, 0, 0, 1, -1], augment.Affine(translate=0.5))
    expected = np.zeros(images.shape)
    expected[:, :6, 5:] = images[:, 6:, :5]
    np.testing.assert_allclose(moved, expected, atol=1e-3)


def test_all_at_once_pixel_by_pixel(monkeypatch: pytest.MonkeyPatch, images: np.ndarray) -> None:
    ranges = augment.Affine(rotate=30.0, translate=0.1, scale=0.5, shear=20.0)
    moved = _drawn(monkeypatch, images[:2], [0.5, -0.7, 0.9, 0.3, -0.6], ranges)
    turn, shear, factor = np.deg2rad(15.0), np.deg2rad(-14.0), 2**0.45
    expected = np.zeros(moved.shape)
    for row, column in np.ndindex(12, 10):
        y, x = row - 5.5, column - 4.5  # from the centre
        x += np.tan(shear) * y
        y, x = factor * (np.cos(turn) * y - np.sin(turn) * x), factor * (np.sin(turn) * y + np.cos(turn) * x)
        for image, out in zip(images, expected, strict=False):
            out[row, column] = _bilinear(image, y + 5.5 + 0.3 * 0.1 * 12, x + 4.5 - 0.6 * 0.1 * 10)
    np.testing.assert_allclose(moved, expected, atol=0.05)
    assert (expected == 0).any()  # some of it came from outside


def test_amounts_fill_their_range() -> None:
    # A dot in the middle of a wide picture moves by at most a quarter of its sides, and by different amounts.
    dot = np.zeros((200, 16, 32, 1), np.float32)
    dot[:, 8, 16] = 1.0
    moved = np.asarray(_affine(dot, jax.random.key(1), np.arange(200), augment.Affine(translate=0.25)))[..., 0]
    rows, columns = (moved.sum(axis).dot(np.arange(n)) - n / 2 for axis, n in ((2, 16), (1, 32)))
    for shift, bound in ((rows, 4), (columns, 8)):
        assert np.abs(shift).max() <= bound + 1e-3
        np.testing.assert_allclose([shift.min(), shift.max()], [-bound, bound], atol=0.05 * bound)
        assert abs(shift.mean()) < 0.15 * bound
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.3


def test_draw_follows_from_key_and_index_alone(images: np.ndarray) -> None:
    ranges = augment.Affine(rotate=20.0, translate=0.1, scale=0.2, shear=10.0)
    index = np.array([4, 9, 2, 7, 100, 0, 1, 3])
    whole = _affine(images, jax.random.key(3), index, ranges)
    halves = [_affine(images[i], jax.random.key(3), index[i], ranges) for i in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-3)
    same = np.repeat(images[:1], 8, axis=0)
    by_index = np.asarray(_affine(same, jax.random.key(3), index, ranges))
    assert len(np.unique(by_index.reshape(8, -1), axis=0)) == 8
    assert np.abs(_affine(same, jax.random.key(4), index, ranges) - by_index).max() > 1


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.25,)), ((0.485, 0.456), (0.229, 0.224))])
def test_normalize(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    normal = augment.normalize(jnp.asarray(images), mean, std)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(normal, (images / 255.0 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-5)
