"""Any network becomes adaptive in one call: `make_adaptive`."""

import math
import pathlib
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
import variants

import avit_jax
from avit_jax.inference import adapt
from avit_jax.models import vit
from avit_jax.tools import predict as tool
from avit_jax.utils import errors


def _pixels(model: vit.AViT, count: int) -> np.ndarray:
    shape = (count, *model.pixels, model.channels)
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["plain", "siglip_average", "dinov2_registers"])
def test_any_network_becomes_adaptive(
    kind: str,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapt, "RATIO_TOLERANCE", 0.0)
    static = variants.static(kind)
    path, pixels = variants.write(tmp_path, static), _pixels(static, 12)
    loaded, params = avit_jax.load(path)
    found = avit_jax.make_adaptive(path, pixels, budget=0.8)
    assert "the cost jumps" in caplog.text
    assert found.model.clone(halting=None) == loaded
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    predictions = avit_jax.predict(found.model, found.params, pixels)
    expected = avit_jax.predict(loaded, params, pixels)
    assert found.macs_ratio == pytest.approx(np.mean([one.macs_ratio for one in predictions]))
    assert 0.79 < found.macs_ratio < 0.88  # the cost of 12 small images jumps
    agrees = [a.top5[0] == b.top5[0] for a, b in zip(predictions, expected, strict=True)]
    assert found.agreement == pytest.approx(np.mean(agrees))
    avit_jax.save(tmp_path / "mine", found.model, found.params)
    assert avit_jax.load(tmp_path / "mine")[0].halting == found.model.halting


def test_a_network_of_the_zoo_and_files_of_images(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    static, params = avit_jax.load("cifar10")
    pixels = _pixels(static, 3)
    for i, image in enumerate(pixels):
        (tmp_path / f"{i}.png").write_bytes(fixtures.png(image))
    (tmp_path / "3.png").write_bytes(b"no image")
    found = avit_jax.make_adaptive("cifar10", tmp_path, budget=0.6)
    assert "cannot read" in caplog.text
    missed = abs(found.macs_ratio - 0.6) > adapt.RATIO_TOLERANCE
    assert ("the cost jumps" in caplog.text) is missed
    predictions = avit_jax.predict(found.model, params, tmp_path)
    ratios = [one.macs_ratio for one in predictions]
    assert found.macs_ratio == pytest.approx(np.mean(ratios), rel=1e-5)
    assert found.model.label_names == static.label_names


def test_every_nth_of_many_images(tmp_path: pathlib.Path) -> None:
    model, _ = avit_jax.load("cifar10")
    pixels = _pixels(model, 10)
    for most, step in ((64, 1), (10, 1), (9, 2), (4, 3), (1, 10)):
        read = tool.read_images(model, pixels, most=most)
        np.testing.assert_array_equal(read, pixels[::step])
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(errors.UserError, match="none of the images can be read"):
        tool.read_images(model, tmp_path, most=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"where": "digits"}, r"digits has a gate already: use avit_jax.load, and --mode=calib"),
        ({"where": "nothing"}, "there is no nothing: name the workdir"),
        ({"images": ()}, "name images"),
        ({"images": "nowhere.png"}, "there is no image nowhere.png"),
        ({"budget": 0.0}, "budget must be above 0 and at most 1; got 0.0"),
        ({"budget": math.nan}, "budget must be above 0 and at most 1; got nan"),
        ({"budget": 0.01}, r"no gate bias brings the MACs ratio to 0.01.*: set another budget"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    static, _ = avit_jax.load("cifar10")
    with pytest.raises(errors.UserError, match=message) as caught:
        avit_jax.make_adaptive(**{"where": "cifar10", "images": _pixels(static, 1)} | arguments)
    assert "\n" not in str(caught.value)
