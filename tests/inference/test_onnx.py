"""Networks as .onnx files: onnxruntime gives the logits and depths of `model.apply`."""

import json
import pathlib
import sys
from typing import Any

import fakes
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants

from avit_jax.data import augment
from avit_jax.inference import export, export_onnx
from avit_jax.models import flops, vit
from avit_jax.training import build
from avit_jax.utils import errors

_COLORS: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
_HALTING = variants.static("plain").clone(halting=variants.GATE)
_MODELS = {
    "static": variants.static("plain"),
    "halting": _HALTING,
    "merging": _HALTING.clone(halting=variants.MERGING),
    "distilled": _HALTING.clone(distilled=True),
    "one_channel": _HALTING.clone(channels=1),
    "bfloat16": _HALTING.clone(dtype=jnp.bfloat16),
    **{kind: variants.network(kind) for kind in variants.KINDS},
}


def _session(path: pathlib.Path) -> Any:
    pytest.importorskip("jax2onnx", reason="needs jax2onnx, see CONTRIBUTING.md")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, see CONTRIBUTING.md")
    return lambda: runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _images(model: vit.AViT, count: int) -> np.ndarray:
    shape = (count, *model.pixels, model.channels)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


def _colors(model: vit.AViT) -> dict[str, Any]:
    return {name: values[: model.channels] for name, values in _COLORS.items()}


@pytest.mark.parametrize("kind", _MODELS)
def test_logits_and_depths_of_any_batch(kind: str, tmp_path: pathlib.Path) -> None:
    model = _MODELS[kind]
    params, path = variants.params(model), tmp_path / "network.onnx"
    session = _session(path)
    export.write(path, params, model, **_colors(model))
    network = session()
    exact = model.clone(dtype=None)
    for batch in (1, 7):
        images = _images(model, batch)
        logits, depth = network.run(["logits", "depth"], {"images": images})
        expected, aux = exact.apply({"params": params}, augment.normalize(images, **_colors(model)))
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        np.testing.assert_array_equal(depth, flops.patch_depth(model, aux.active))
    assert depth.dtype == np.int32
    assert (len(np.unique(depth)) > 1) == (model.halting is not None)


def test_a_fixed_batch_and_the_metadata(
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "network.onnx"
    session = _session(path)
    names = ["a", "b", "c", "d", "é"]
    more = {"label_names": names, "sigmoid": True, "value_range": (0, 4095), "crop_ratio": 0.9}
    export.write(path, variants.params(_HALTING), _HALTING, batch=4, **more, **_COLORS)
    network = session()
    # Neither the converter nor the runtime warns.
    assert not [x for x in caplog.records if x.name.startswith(("jax2onnx", "onnx_ir"))]
    assert "Removing initializer" not in capfd.readouterr().err
    assert [(x.name, x.type) for x in network.get_inputs()] == [("images", "tensor(uint8)")]
    assert network.get_inputs()[0].shape == [4, 16, 16, 3]
    with pytest.raises(Exception, match="Got: 3 Expected: 4"):
        network.run(None, {"images": _images(_HALTING, 3)})
    metadata = network.get_modelmeta().custom_metadata_map
    values = {key: json.loads(text) for key, text in metadata.items()}
    assert values["jax"] == jax.__version__
    assert values["sigmoid"] is True and values["value_range"] == [0, 4095]
    assert values["crop_ratio"] == 0.9
    assert values["label_names"] == names and values["halting"]["gamma"] == 1.5
    assert values["image_size"] == [16, 16] and values["mean"] == [0.4, 0.5, 0.6]


def test_a_run_as_onnx(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "network.onnx"
    session = _session(path)
    config = fixtures.small_config(**{"train.steps": 2})
    fakes.real_run(config, tmp_path / "run")
    export.from_checkpoint(path, config, tmp_path / "run")
    params = fixtures.restored_state(config, tmp_path / "run").ema_params
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    expected = build.model(config).apply(
        {"params": params}, augment.normalize(images, config.data.mean, config.data.std)
    )[0]
    np.testing.assert_allclose(
        session().run(["logits"], {"images": images})[0], expected, atol=1e-5
    )


def test_networks_that_are_too_large(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _session(tmp_path)
    monkeypatch.setattr(export_onnx, "_LARGEST", 1000)
    with pytest.raises(errors.UserError, match=r"at most 2 GiB.*write name\.avit instead"):
        export.write(tmp_path / "a.onnx", variants.params(_HALTING), _HALTING, **_COLORS)


@pytest.mark.parametrize("missing", ["jax2onnx", "onnx_ir"])
def test_without_the_converter(
    missing: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", type(sys)("jax2onnx"))
    monkeypatch.setitem(sys.modules, "onnx_ir", type(sys)("onnx_ir"))
    monkeypatch.setitem(sys.modules, missing, None)
    expected = rf"{missing}.*run `pip install .* pip install --no-deps 'jax2onnx>=0\.17\.1'`"
    with pytest.raises(errors.UserError, match=expected):
        # It is missed before the run is.
        export.from_checkpoint(tmp_path / "a.onnx", fixtures.small_config(), tmp_path / "nowhere")
    with pytest.raises(errors.UserError, match=expected):
        export.write(tmp_path / "a.onnx", variants.params(_HALTING), _HALTING, **_COLORS)
