"""A network as a folder for the hub, and its upload."""

import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

import avit_jax
from avit_jax import run_config
from avit_jax.core.halting import HaltingConfig
from avit_jax.models import pretrained
from avit_jax.training import evaluate
from avit_jax.utils import errors

_WEIGHTS = pathlib.Path(__file__).parent / "data/weights/timm.safetensors"
_GATE = HaltingConfig(gamma=1.0, beta=-3.0, merge=True, redundancy=2.0)


@pytest.fixture
def network() -> tuple[avit_jax.AViT, dict]:
    model, params = avit_jax.load(_WEIGHTS, num_heads=3)
    how = {"mean": (0.1, 0.2, 0.3), "std": (0.5,), "crop_ratio": 0.9, "label_names": tuple("abcde")}
    return model.clone(halting=_GATE, **how), params


def test_a_saved_network_is_loaded_as_it_was(
    network: tuple[avit_jax.AViT, dict], tmp_path: pathlib.Path
) -> None:
    model, params = network
    results = {"top-1": "12.34%"}
    avit_jax.save(tmp_path / "mine", model, params, about="It sees letters.", results=results)
    loaded, loaded_params = avit_jax.load(tmp_path / "mine")
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
    assert run_config.read(tmp_path / "mine").config.halting.redundancy == 2
    config = json.loads((tmp_path / "mine/config.json").read_text())
    assert config["num_heads"] == 3 and config["label_names"] == list("abcde")
    card = (tmp_path / "mine/README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert "library_name: avit_jax" in front and "license: apache-2.0" in front
    for part in ("# mine", "It sees letters.", "12.34%", "merging", "hf-hub:owner/mine"):
        assert part in body
    assert str(tmp_path) not in card


def test_a_plain_static_network(tmp_path: pathlib.Path) -> None:
    model, params = avit_jax.load(_WEIGHTS, num_heads=3)
    sizes = {"image_size": 16, "patch_size": 8, "width": 12, "depth": 2, "num_heads": 3}
    plain = avit_jax.AViT(**sizes, num_classes=5, halting=None)
    avit_jax.save(tmp_path, plain, params)
    loaded, _ = avit_jax.load(tmp_path)
    assert loaded.halting is None and loaded.mean == model.mean


def test_a_saved_network_is_evaluated_on_data_that_the_user_names(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "width": 12, "depth": 2, "num_heads": 3}
    model = avit_jax.AViT(**sizes, num_classes=10, halting=_GATE)
    params = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    named = pretrained.of_model(model, label_names=tuple("abcdefghij"))
    avit_jax.save(tmp_path / "mine", named, params)
    config = run_config.get_config(str(tmp_path / "mine"))
    config.init, config.eval.checkpoint = str(tmp_path / "mine/model.safetensors"), "init"
    with pytest.raises(errors.UserError, match=r"names no data set: set --config\.data\.name"):
        evaluate.evaluate_checkpoint(config, tmp_path / "eval")
    config.data.name, config.eval.batch_size = "digits", 360
    evaluate.evaluate_checkpoint(config, tmp_path / "eval")
    assert 'class 0 of the data set is "0", and was "a" in training' in caplog.text
    assert "meaningless" in caplog.text


def test_what_cannot_be_saved_or_pushed(
    network: tuple[avit_jax.AViT, dict], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.UserError, match=r"holds no network: write one with avit_jax\.save"):
        avit_jax.push(tmp_path, "owner/name")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(errors.UserError, match="is the workdir of a run: name another folder"):
        avit_jax.save(tmp_path / "run", *network)
    avit_jax.save(tmp_path, *network)
    with pytest.raises(errors.UserError, match="a name on the hub is owner/name; got 'name'"):
        avit_jax.push(tmp_path, "name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.UserError, match="run `pip install huggingface_hub`"):
        avit_jax.push(tmp_path, "owner/name")


def test_an_upload(
    network: tuple[avit_jax.AViT, dict], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Api:
        def create_repo(self, name: str, **how: object) -> None:
            calls.append((name, how))

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            if repo_id == "other/name":
                raise ValueError("401 Unauthorized")
            calls.append(
                (repo_id, sorted(path.name for path in pathlib.Path(folder_path).iterdir()))
            )

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    folder = tmp_path / "mine"
    avit_jax.save(folder, *network)
    assert avit_jax.push(folder, "hf-hub:me/net", private=True) == "hf-hub:me/net"
    assert calls == [
        ("me/net", {"private": True, "exist_ok": True}),
        ("me/net", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert 'avit_jax.load("hf-hub:me/net")' in (folder / "README.md").read_text()
    with pytest.raises(errors.UserError, match=r"cannot be uploaded \(401 Unauthorized\): log in"):
        avit_jax.push(folder, "other/name")


def test_networks_without_classes_and_of_grey_images(tmp_path: pathlib.Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "width": 12, "depth": 2, "num_heads": 3}
    model = avit_jax.AViT(**sizes, num_classes=0, channels=1, halting=None)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32))["params"]
    avit_jax.save(tmp_path, model, params)
    loaded, loaded_params = avit_jax.load(tmp_path)
    assert (loaded.num_classes, loaded.channels, loaded.mean) == (0, 1, (0.5,))
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
    with pytest.raises(errors.UserError, match="no classes to predict"):
        avit_jax.predict(loaded, params, np.zeros((16, 16, 1), np.uint8))
