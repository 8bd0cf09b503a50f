"""Networks from Python: loaded from anywhere, with the logits of before; predictions; the zoo."""

import hashlib
import json
import logging
import pathlib

import fakes
import fixtures
import jax
import numpy as np
import pytest

import avit_jax
from avit_jax import config as config_lib
from avit_jax import networks, zoo
from avit_jax.data import augment, class_names, sources
from avit_jax.models import flops, pretrained
from avit_jax.training import build, restore
from avit_jax.utils import errors
from avit_jax.weights import locate, weight_files

_DATA = pathlib.Path(__file__).parent / "data/weights"
_PARENT = pathlib.Path(__file__).parents[1] / "experiments/pareto/parent.safetensors"


def _logits(model: avit_jax.AViT, params: object, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)({"params": params}, images)[0])


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_a_run(checkpoint: str, tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(**{"train.steps": 4, "train.eval_every": 2})
    fakes.real_run(config, tmp_path / "run")
    config.eval.checkpoint = checkpoint
    expected, _ = restore.params(config, build.model(config), tmp_path / "run")
    for case in ("new", "without config.json"):
        model, params = avit_jax.load(tmp_path / "run", checkpoint=checkpoint)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert model.mean == (0.3,) and model.label_names == tuple("0123456789"), case
        (tmp_path / "run/config.json").unlink(missing_ok=True)
    images = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    np.testing.assert_array_equal(
        _logits(model, params, images), _logits(build.model(config), expected, images)
    )


def test_a_file_of_timm_gives_the_logits_of_before(caplog: pytest.LogCaptureFixture) -> None:
    model, params = avit_jax.load(_DATA / "timm.safetensors", num_heads=3)
    assert "does not give mean and std" in caplog.text
    expected = np.load(_DATA / "expected.npz")
    images = expected["images"]
    np.testing.assert_allclose(_logits(model, params, images), expected["timm"], atol=1e-5)


def test_mean_and_std_from_the_files_beside_the_weights(tmp_path: pathlib.Path) -> None:
    model, params = avit_jax.load(_DATA / "timm.safetensors", num_heads=3)
    weight_files.write(tmp_path / "model.safetensors", params, model)
    for name, content in (
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}),
        ("config.json", {"pretrained_cfg": {"mean": [0.4] * 3, "std": [0.5] * 3, "crop_pct": 0.9}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        model, _ = avit_jax.load(tmp_path)
        found = (model.mean[0], model.std[0], model.crop_ratio)
        assert found == ((0.1, 1.0, 0.875) if name.startswith("pre") else (0.4, 0.5, 0.9))


def test_the_size_of_the_images(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="12 channels are not heads of 64"):
        avit_jax.load(_DATA / "timm.safetensors")
    assert avit_jax.load(_DATA / "timm.safetensors", num_heads=3)[0].pixels == (16, 16)
    model, _ = avit_jax.load(_DATA / "timm.safetensors", num_heads=3, image_size=(16, 32))
    assert model.pixels == (16, 32)


def test_names_that_are_paths(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for path in ("mine/run", "a/weights.pth", "runs/x", "gs://a/b", "a/b/c", "name", "../a"):
        assert locate.locate(path) == path
    assert locate.locate("owner/name") == "hf-hub:owner/name"
    (tmp_path / "digits").mkdir()
    assert locate.locate("digits") == "digits"  # a folder comes before the zoo
    with pytest.raises(errors.UserError, match=r"there is no runs/x: .* zoo \(digits, cifar10"):
        avit_jax.load("runs/x")


@pytest.mark.parametrize("name", sorted(zoo.NETWORKS))
def test_the_zoo(name: str) -> None:
    model, _ = avit_jax.load(name)
    known = zoo.NETWORKS[name]
    file = pathlib.Path(zoo.__file__).with_name(f"{name}.safetensors")
    card = file.with_suffix(".md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == known.sha256
    for part in (known.sha256, known.command, known.recipe, f'load("{name}")', known.about):
        assert part in card
    assert f"| `{name}` | {100 * known.top1:.2f}% |" in zoo.table()
    assert len(model.label_names) == model.num_classes == 10
    assert (known.macs_ratio == 1) == (model.halting is None)
    assert known.macs == pytest.approx(known.macs_ratio * flops.static_macs(model))


def test_the_zoo_gives_the_measured_accuracy() -> None:
    model, params = avit_jax.load("digits")
    source = sources.load("digits", split="test", data_dir="", image_size=model.pixels)
    images = np.stack([source.records[i]["image"] for i in range(360)])
    labels = np.array([source.records[i]["label"] for i in range(360)])
    logits, aux = jax.jit(model.apply)(
        {"params": params}, augment.normalize(images, model.mean, model.std)
    )
    known = zoo.NETWORKS["digits"]
    assert np.mean(np.argmax(logits, -1) == labels) == pytest.approx(known.top1, abs=1 / 360)
    assert np.mean(aux.macs) == pytest.approx(known.macs, rel=1e-3)


def test_the_zoos_static_network_has_the_weights_of_the_study() -> None:
    study = weight_files.read(_PARENT).tensors
    for name in ("cifar10", "cifar10_merging"):
        tensors = weight_files.read(zoo.file(name)).tensors
        assert tensors.keys() == study.keys()
        for key, array in tensors.items():
            np.testing.assert_array_equal(array, study[key])


def test_a_damaged_or_unknown_network_of_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.UserError, match="the zoo has no cats: name one of digits"):
        zoo.file("cats")
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: b"")
    with pytest.raises(errors.UserError, match="missing or damaged: install avit_jax again"):
        zoo.file("digits")


def test_predictions_of_arrays_and_files(tmp_path: pathlib.Path) -> None:
    model, params = avit_jax.load(_DATA / "timm.safetensors", num_heads=3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / f"{i}.png").write_bytes(fixtures.png(image))
    expected = avit_jax.predict(model, params, [str(tmp_path / f"{i}.png") for i in range(3)])
    for images in (tmp_path, pixels, list(pixels), [tmp_path / "0.png", pixels[1:]]):
        found = avit_jax.predict(model, params, images)
        assert [one.probabilities for one in found] == [one.probabilities for one in expected]
    (one,) = avit_jax.predict(model, params, expected[0].image)  # of the network's own size
    assert one.probabilities == expected[0].probabilities
    (grey,) = avit_jax.predict(model, params, pixels[0, ..., :1])
    assert grey.image.shape == (16, 16, 3) and np.ptp(grey.image, axis=-1).max() == 0


def test_the_second_prediction_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, params = avit_jax.load(_DATA / "timm.safetensors", num_heads=3, image_size=(8, 16))
    image = np.zeros((8, 16, 3), np.uint8)
    with caplog.at_level(logging.INFO, logger="avit_jax"):
        avit_jax.predict(model, params, image)
        avit_jax.predict(model, params, [image] * 20)
    assert caplog.text.count("compiling the network") == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 3)), r"uint8 array .* got float64 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"got uint8 \(4, 4\)"),
        (np.zeros((2, 4, 4, 3)), r"got float64 \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "name images"),
        ([], "name images"),
        ("nowhere.png", "there is no image nowhere.png"),
    ],
)
def test_what_is_no_image(images: object, message: str) -> None:
    model, params = avit_jax.load(_DATA / "timm.safetensors", num_heads=3)
    with pytest.raises(errors.UserError, match=message):
        avit_jax.predict(model, params, images)


def test_a_plain_model_of_1000_classes_has_imagenets_names() -> None:
    model = avit_jax.AViT(image_size=8, patch_size=8, width=8, depth=1, num_heads=1)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    (one,) = avit_jax.predict(model, params, image)
    assert set(one.top5) <= set(class_names.imagenet())
    assert one.words == [class_names.words(name) for name in one.top5]
    assert json.loads(one.to_json())["words"] == one.words


def test_pixels_of_other_channels_than_rgb_become_minus_one_to_one() -> None:
    grey = avit_jax.AViT(image_size=8, patch_size=8, width=8, depth=1, num_heads=1, channels=1)
    network = pretrained.of_model(grey)
    assert (network.mean, network.std) == ((0.5,), (0.5,))


def test_the_default_config_is_deit_tiny() -> None:
    model = build.model(config_lib.default())
    assert flops.static_macs(model) == flops.static_macs(avit_jax.deit_tiny())


def test_a_name_that_the_package_lacks() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        avit_jax.nothing  # noqa: B018


def test_names_at_the_top_have_docstrings() -> None:
    for name in (
        "load",
        "make_adaptive",
        "predict",
        "save",
        "push",
        "deit_tiny",
        "deit_small",
        "deit_base",
    ):
        value = getattr(avit_jax, name)
        assert callable(value) and value.__doc__ and value.__name__ == name
    assert avit_jax.predict is networks.predict
    assert avit_jax.deit_tiny(width=96).width == 96  # attributes win


def test_a_file_gives_the_names_of_its_classes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((_DATA / "timm.safetensors").read_bytes())
    names = [f"class {i}" for i in range(5)]
    (tmp_path / "config.json").write_text(json.dumps({"num_classes": 5, "label_names": names}))
    model, _ = avit_jax.load(tmp_path, num_heads=3)
    assert model.label_names == tuple(names)
