"""Compares augmentation on the device with NumPy, pixel by pixel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from avit_jax.data import augment

_affine = jax.jit(augment.random_affine, static_argnums=3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 12, 10, 2), dtype=np.uint8)


def _drawn(
    monkeypatch: pytest.MonkeyPatch, images: np.ndarray, draw: list[float], ranges: augment.Affine
) -> np.ndarray:
    """Applies the affine map with given random numbers: rotation, shear, scale and two moves."""
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "uniform", lambda *_, **__: jnp.asarray(draw, jnp.float32))
        return np.asarray(
            augment.random_affine(
                jnp.asarray(images), jax.random.key(0), jnp.arange(len(images)), ranges
            )
        )


def _bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Returns the value at a point; pixels from outside are 0."""
    total = np.zeros(image.shape[-1])
    for row, column in itertools.product(
        (int(np.floor(y)), int(np.floor(y)) + 1), (int(np.floor(x)), int(np.floor(x)) + 1)
    ):
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
        y, x = (
            factor * (np.cos(turn) * y - np.sin(turn) * x),
            factor * (np.sin(turn) * y + np.cos(turn) * x),
        )
        for image, out in zip(images, expected, strict=False):
            out[row, column] = _bilinear(image, y + 5.5 + 0.3 * 0.1 * 12, x + 4.5 - 0.6 * 0.1 * 10)
    np.testing.assert_allclose(moved, expected, atol=0.05)
    assert (expected == 0).any()  # some of it came from outside


def test_amounts_fill_their_range() -> None:
    # A dot in the middle of a wide picture moves by at most a quarter of its sides, and by
    # different amounts.
    dot = np.zeros((200, 16, 32, 1), np.float32)
    dot[:, 8, 16] = 1.0
    moved = np.asarray(
        _affine(dot, jax.random.key(1), np.arange(200), augment.Affine(translate=0.25))
    )[..., 0]
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
    halves = [
        _affine(images[i], jax.random.key(3), index[i], ranges) for i in (slice(0, 4), slice(4, 8))
    ]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-3)
    same = np.repeat(images[:1], 8, axis=0)
    by_index = np.asarray(_affine(same, jax.random.key(3), index, ranges))
    assert len(np.unique(by_index.reshape(8, -1), axis=0)) == 8
    assert np.abs(_affine(same, jax.random.key(4), index, ranges) - by_index).max() > 1


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.25,)), ((0.485, 0.456), (0.229, 0.224))])
def test_normalize(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    normal = augment.normalize(jnp.asarray(images), mean, std)
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(
        normal, (images / 255.0 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-5
    )


# Random erasing
# ---------------------------------------------------------------------------------------------------------

_erase = jax.jit(augment.random_erase, static_argnums=3)


def _boxes(erased: np.ndarray) -> np.ndarray:
    """Returns top, bottom, left and right of the pixels that are not 7 in each image; they form a box."""
    boxes = []
    for image in erased:
        changed = (image != 7).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        assert changed[box[0] : box[1], box[2] : box[3]].all()
        boxes.append(box)
    return np.array(boxes)


@pytest.mark.parametrize(("rows", "columns"), [(40, 30), (30, 40)])
def test_erasing_fills_boxes_of_the_right_size_and_place_with_normal_noise(
    rows: int, columns: int
) -> None:
    images = np.full((2000, rows, columns, 2), 7, np.float32)
    erased = np.asarray(_erase(images, jax.random.key(0), np.arange(2000), 1.0))
    top, bottom, left, right = _boxes(erased).T
    height, width = bottom - top, right - left
    area, ratio = height * width / 1200, height / width
    assert 0.01 < area.min() < 0.03 and 0.31 < area.max() < 0.36
    assert abs(np.median(area) - (0.02 + 1 / 3) / 2) < 0.015  # evenly
    assert 0.22 < ratio.min() < 0.4 and 2.5 < ratio.max() < 4.5
    assert abs(np.median(np.log(ratio))) < 0.1
    assert height.max() < rows and width.max() < columns
    for low, high, size in ((top, bottom, rows), (left, right, columns)):
        assert low.min() == 0 and high.max() == size
        free = (low / np.maximum(size - (high - low), 1))[high - low < size - 5]
        assert abs(free.mean() - 0.5) < 0.03  # evenly over all places it fits
    noise = erased[erased != 7]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_probability_of_erasing(probability: float) -> None:
    images = np.full((2000, 8, 8, 1), 7, np.float32)
    erased = np.asarray(_erase(images, jax.random.key(1), np.arange(2000), probability))
    assert (
        abs((erased != 7).any((1, 2, 3)).mean() - probability) < 0.03 * (0 < probability < 1) + 1e-9
    )


def test_erasing_follows_from_key_and_index_alone() -> None:
    images, index = np.full((8, 12, 12, 1), 7, np.float32), np.array([4, 9, 2, 7, 100, 0, 1, 3])
    whole = np.asarray(_erase(images, jax.random.key(3), index, 1.0))
    halves = [
        _erase(images[i], jax.random.key(3), index[i], 1.0) for i in (slice(0, 4), slice(4, 8))
    ]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    assert len(np.unique(whole.reshape(8, -1), axis=0)) == 8
    assert np.abs(_erase(images, jax.random.key(4), index, 1.0) - whole).max() > 1


# Mixup and cutmix
# -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Returns eight different images and their one-hot labels."""
    return np.random.default_rng(5).normal(size=(8, 9, 14, 3)).astype(np.float32), np.eye(
        10, dtype=np.float32
    )[[3, 1, 4, 9, 5, 2, 6, 0]]


def _mixed(
    pairs: tuple[np.ndarray, np.ndarray], count: int, ranges: augment.Mix
) -> list[tuple[np.ndarray, np.ndarray]]:
    mix = jax.jit(lambda key: augment.mix(*pairs, key, ranges))
    return [jax.device_get(mix(jax.random.key(seed))) for seed in range(count)]


def _own_share(images: np.ndarray, mixed: np.ndarray) -> np.ndarray:
    """Returns the weight of the image itself in the mixed one, per pixel; it is the same in all images."""
    own, partner = images, images[::-1]
    share = (mixed - partner) / (own - partner)
    np.testing.assert_allclose(share, np.broadcast_to(share[:1, ..., :1], share.shape), atol=2e-2)
    return np.median(share, axis=(0, 3))


@pytest.mark.parametrize("alpha", [0.8, 4.0])
def test_mixup_against_numpy(pairs: tuple[np.ndarray, np.ndarray], alpha: float) -> None:
    images, targets = pairs
    shares = []
    for mixed, soft in _mixed(pairs, 400, augment.Mix(mixup=alpha)):
        share = float(soft[0, 3])
        np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], atol=1e-5)
        np.testing.assert_allclose(soft, share * targets + (1 - share) * targets[::-1], atol=1e-6)
        np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 0.06
    assert abs(np.std(shares) - 1 / np.sqrt(4 * (2 * alpha + 1))) < 0.03  # of Beta(alpha, alpha)


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 4.0])
def test_mixing_weights_have_the_beta_distribution(alpha: float) -> None:
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = jax.device_get(jax.vmap(lambda key: augment._symmetric_beta(key, alpha))(keys))
    assert draws.min() >= 0 and draws.max() <= 1
    levels = np.linspace(0.02, 0.98, 25)
    below = (draws[:, None] < special.betaincinv(alpha, alpha, levels)).mean(axis=0)
    np.testing.assert_allclose(below, levels, atol=0.015)


def test_mixing_has_no_loop_on_a_gpu(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    ranges = augment.Mix(mixup=0.8, cutmix=1.0)
    mix = jax.jit(lambda key: augment.mix(*pairs, key, ranges))
    lowered = mix.trace(jax.random.key(0)).lower(lowering_platforms=("cuda",))
    assert "stablehlo.while" not in lowered.as_text()


def test_cutmix_against_numpy(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    images, targets = pairs
    areas, centres = [], []
    for mixed, soft in _mixed(pairs, 400, augment.Mix(cutmix=1.0)):
        cut = (mixed != images).all(axis=(0, 3))
        rows, columns = np.flatnonzero(cut.any(1)), np.flatnonzero(cut.any(0))
        box = np.zeros((9, 14), bool)
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            centres.append((rows.mean(), columns.mean()))
        np.testing.assert_array_equal(cut, box)
        np.testing.assert_allclose(mixed, np.where(box[..., None], images[::-1], images), atol=1e-6)
        share = 1 - box.mean()
        np.testing.assert_allclose(soft, share * targets + (1 - share) * targets[::-1], atol=1e-6)
        np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
        areas.append(box.mean())
    assert max(areas) > 0.7 and min(areas) == 0
    # By the same rule in NumPy: sides of sqrt(1 - share), halved downwards, centred anywhere, cut
    # off at the border.
    rng, expected = np.random.default_rng(0), []
    for side in np.sqrt(rng.random(4000)):
        y, x, h, w = rng.integers(9), rng.integers(14), int(9 * side) // 2, int(14 * side) // 2
        expected.append((min(y + h, 9) - max(y - h, 0)) * (min(x + w, 14) - max(x - w, 0)) / 126)
    assert abs(np.mean(areas) - np.mean(expected)) < 0.03
    assert abs(np.std(areas) - np.std(expected)) < 0.03
    np.testing.assert_allclose(np.mean(centres, axis=0), (4, 6.5), atol=0.6)


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_switching(pairs: tuple[np.ndarray, np.ndarray], switch: float) -> None:
    cuts = []
    for mixed, _ in _mixed(pairs, 300, augment.Mix(mixup=0.8, cutmix=1.0, switch=switch)):
        untouched = (mixed == pairs[0]).all(axis=(0, 3))
        partner = (mixed == pairs[0][::-1]).all(axis=(0, 3))
        cuts.append((untouched | partner).all())
    assert abs(np.mean(cuts) - switch) < 0.08


def test_partners_are_those_of_the_global_batch(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    ranges = augment.Mix(mixup=0.8, cutmix=1.0)
    spread = jax.pmap(
        lambda x, y, key: augment.mix(x, y, key, ranges, "devices"),
        axis_name="devices",
        in_axes=(0, 0, None),
    )
    for seed, one in enumerate(_mixed(pairs, 6, ranges)):
        for devices in (2, 8):
            parts = spread(
                *(x.reshape(devices, -1, *x.shape[1:]) for x in pairs), jax.random.key(seed)
            )
            for a, b in zip(one, parts, strict=True):
                np.testing.assert_allclose(a, b.reshape(a.shape), atol=1e-6)
