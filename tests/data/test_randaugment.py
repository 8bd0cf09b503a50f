"""RandAugment: each operation at its extremes, against Pillow or by counting pixels; random draws."""

import threading

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from avit_jax.data import randaugment

BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)  # ImageNet's mean 0.485, 0.456, 0.406 in steps of 1 / 255


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(20, 236, (40, 60, 3), dtype=np.uint8)).resize((60, 40))


def run(name: str, picture: Image.Image, strength: float, sign: int = 1) -> np.ndarray:
    before = np.asarray(picture).copy()
    result = randaugment.OPERATIONS[name](picture, strength, sign)
    np.testing.assert_array_equal(picture, before)  # the operation leaves its input alone
    assert (result.mode, result.size) == ("RGB", picture.size)
    return np.asarray(result)


def test_there_are_fifteen() -> None:
    assert len(randaugment.OPERATIONS) == 15


@pytest.mark.parametrize("strength", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("auto_contrast", ImageOps.autocontrast),
        ("equalize", ImageOps.equalize),
        ("invert", ImageChops.invert),
    ],
)
def test_without_a_strength(
    picture: Image.Image, name: str, function: object, strength: float
) -> None:
    np.testing.assert_array_equal(run(name, picture, strength), function(picture))


@pytest.mark.parametrize(("strength", "bits"), [(0.0, 4), (0.3, 3), (0.9, 1)])
def test_posterize(picture: Image.Image, strength: float, bits: int) -> None:
    np.testing.assert_array_equal(
        run("posterize", picture, strength), ImageOps.posterize(picture, bits)
    )


def test_posterize_to_no_bits_is_black(picture: Image.Image) -> None:
    assert not run("posterize", picture, 1.0).any()


@pytest.mark.parametrize(("strength", "threshold"), [(0.0, 256), (0.5, 128), (0.9, 26), (1.0, 0)])
def test_solarize(picture: Image.Image, strength: float, threshold: int) -> None:
    pixels = np.asarray(picture)
    np.testing.assert_array_equal(
        run("solarize", picture, strength), np.where(pixels < threshold, pixels, 255 - pixels)
    )


@pytest.mark.parametrize(("strength", "amount"), [(0.0, 0), (0.5, 55), (1.0, 110)])
def test_solarize_add(picture: Image.Image, strength: float, amount: int) -> None:
    pixels = np.asarray(picture)
    np.testing.assert_array_equal(
        run("solarize_add", picture, strength), np.where(pixels < 128, pixels + amount, pixels)
    )


@pytest.mark.parametrize(
    ("strength", "sign", "factor"), [(0.0, 1, 1.0), (0.5, 1, 1.45), (1.0, 1, 1.9), (1.0, -1, 0.1)]
)
@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancement(
    picture: Image.Image, name: str, strength: float, sign: int, factor: float
) -> None:
    expected = getattr(ImageEnhance, name)(picture).enhance(factor)
    np.testing.assert_allclose(
        run(name.lower(), picture, strength, sign), np.asarray(expected), atol=1
    )
    if strength == 0:
        np.testing.assert_array_equal(expected, picture)


@pytest.mark.parametrize(
    ("strength", "sign", "degrees"), [(0.0, 1, 0), (1.0, 1, 30), (1.0, -1, -30), (0.9, -1, -27)]
)
def test_rotate(picture: Image.Image, strength: float, sign: int, degrees: float) -> None:
    expected = picture.rotate(degrees, BICUBIC, fillcolor=FILL)
    np.testing.assert_array_equal(run("rotate", picture, strength, sign), expected)


@pytest.mark.parametrize(("strength", "sign"), [(0.0, 1), (1.0, 1), (1.0, -1)])
@pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
def test_translate(picture: Image.Image, name: str, axis: int, strength: float, sign: int) -> None:
    pixels = np.asarray(picture)
    shift = round(0.45 * strength * pixels.shape[axis])  # 27 columns or 18 rows: whole pixels
    expected = np.roll(pixels, -sign * shift, axis)
    outside = (
        np.arange(pixels.shape[axis])[:shift]
        if sign < 0
        else np.arange(pixels.shape[axis])[pixels.shape[axis] - shift :]
    )
    expected[outside if axis == 0 else (slice(None), outside)] = FILL
    np.testing.assert_array_equal(run(name, picture, strength, sign), expected)


@pytest.mark.parametrize(("strength", "sign"), [(0.0, 1), (1.0, 1), (1.0, -1)])
@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear(picture: Image.Image, name: str, strength: float, sign: int) -> None:
    # A line across the picture moves by 0.3 of its distance from the corner.
    lined = np.full((40, 60, 3), 30, np.uint8)
    if name == "shear_x":
        lined[:, 30] = 255
        places = np.argmax(run(name, Image.fromarray(lined), strength, sign)[..., 0], axis=1)
        expected = 30 - sign * strength * 0.3 * np.arange(40)
    else:
        lined[20] = 255
        places = np.argmax(run(name, Image.fromarray(lined), strength, sign)[..., 0], axis=0)
        expected = 20 - sign * strength * 0.3 * np.arange(60)
    inside = expected > 1
    assert inside.sum() > 20
    np.testing.assert_allclose(places[inside], expected[inside], atol=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Records the calls of the operations by `rand_augment` in this thread.

    Threads of a loader that another test has left may still call them.
    """
    log: list[tuple] = []
    here = threading.get_ident()

    def spy(name: str) -> randaugment.Operation:
        def operation(picture: Image.Image, strength: float, sign: int) -> Image.Image:
            if threading.get_ident() == here:
                log.append((name, strength, sign))
            return picture

        return operation

    monkeypatch.setattr(
        randaugment, "_OPERATIONS", tuple(spy(name) for name in randaugment.OPERATIONS)
    )
    return log


def test_draws(picture: Image.Image, calls: list[tuple]) -> None:
    counts = []
    for seed in range(3000):
        before = len(calls)
        randaugment.rand_augment(picture, np.random.default_rng(seed), magnitude=9.0, deviation=0.5)
        counts.append(len(calls) - before)
    np.testing.assert_allclose(np.bincount(counts) / 3000, [0.25, 0.5, 0.25], atol=0.03)
    names, strengths, signs = zip(*calls, strict=True)
    shares = np.array([names.count(name) for name in randaugment.OPERATIONS]) / len(names)
    np.testing.assert_allclose(shares, 1 / 15, atol=0.02)
    # A normal distribution around 0.9 of deviation 0.05, cut at 1: its upper 2.3% lie on the cut.
    assert max(strengths) == 1.0
    assert 0.01 < np.mean(np.array(strengths) == 1.0) < 0.04
    assert abs(np.median(strengths) - 0.9) < 0.005
    assert abs(np.percentile(strengths, 16) - 0.85) < 0.007
    assert abs(np.mean(signs)) < 0.06 and set(signs) == {-1, 1}


def test_magnitude_is_cut_at_0(picture: Image.Image, calls: list[tuple]) -> None:
    for seed in range(50):
        randaugment.rand_augment(
            picture, np.random.default_rng(seed), magnitude=-3.0, deviation=0.5
        )
    assert {strength for _, strength, *_ in calls} == {0.0}


def test_same_generator_same_picture(picture: Image.Image) -> None:
    runs = [
        [
            randaugment.rand_augment(
                picture, np.random.default_rng(seed), magnitude=9.0, deviation=0.5
            ).tobytes()
            for seed in range(40)
        ]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 20
