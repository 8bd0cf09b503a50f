"""Networks of timm and transformers besides DeiT: what their files tell, outputs, and the way back."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import avit_jax
from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import architecture, weight_files

# See make_variants.py there.
_DATA = pathlib.Path(__file__).parents[1] / "data/weights"
_VARIANTS = dict(np.load(_DATA / "variants.npz")) | dict(np.load(_DATA / "dinov3.npz"))
_NAMES = sorted({name.partition("/")[0] for name in _VARIANTS})
_GAP = {"class_token": False, "pool": "avg"}
_MAP = {"class_token": False, "pool": "map"}
_DINOV2 = {"layer_scale": True}
_DINOV2_REGISTERS = {"layer_scale": True, "num_registers": 4, "position_class": False}
_DINOV3 = {"layer_scale": True, "rope_theta": 100.0}
_DINOV3_WIDE = _DINOV3 | {"rope_theta": 30.0}
_DINOV3_GATED = _DINOV3 | {"num_registers": 1, "mlp": "swiglu", "qkv_bias": False}
_CLIP = {"pre_norm": True, "mlp": "quick_gelu"}
# What differs from DeiT.
_CHANGED: dict[str, dict[str, Any]] = {
    "deit3": {"layer_scale": True, "position_class": False},
    "dinov2": _DINOV2,
    "dinov2_registers": _DINOV2_REGISTERS,
    "registers_with_positions": {"num_registers": 2},
    "gated": {"layer_scale": True, "mlp": "swiglu"},
    "clip": {"pre_norm": True},
    "quick_gelu": {"mlp": "quick_gelu"},
    "siglip": _MAP | {"mlp": "gelu_tanh"},
    "siglip_features": _MAP,
    "siglip_gap": _GAP | {"mlp": "gelu_tanh"},
    "fc_norm": _GAP | {"fc_norm": True},
    "class_and_max": {"pool": "max"},
    "registers_gap": _GAP
    | {"fc_norm": True, "layer_scale": True, "num_registers": 4, "position_class": False},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "wide": {"position_class": False},
    "Dinov2": _DINOV2,
    "Dinov2_memory": _DINOV2,
    "Dinov2_gated": _DINOV2 | {"mlp": "swiglu"},
    "Dinov2_gated_memory": _DINOV2 | {"mlp": "swiglu"},
    "Dinov2WithRegisters": _DINOV2_REGISTERS,
    "Dinov2WithRegisters_memory": _DINOV2_REGISTERS,
    "CLIPVision": _CLIP,
    "CLIPVision_memory": _CLIP,
    "CLIPVisionWithProjection": _CLIP,
    "SigLIPVision": _MAP | {"mlp": "gelu_tanh"},
    "SigLIPVision_memory": _MAP | {"mlp": "gelu_tanh"},
    "SigLIPClassifier": _GAP | {"mlp": "gelu_tanh"},
    "DeiTWithoutTeacher": {"num_registers": 1},
    "IJepa": _GAP,
    "dinov3": _DINOV3 | {"num_registers": 4, "qkv_bias": False},
    "dinov3_wide": _DINOV3 | {"pool": "avg"},
    "dinov3_gated": _DINOV3_WIDE | {"num_registers": 1, "mlp": "swiglu", "pool": "avg"},
    "DINOv3": _DINOV3 | {"num_registers": 4},
    "DINOv3_memory": _DINOV3 | {"num_registers": 4},
    "DINOv3_wide": _DINOV3_WIDE,
    "DINOv3_wide_memory": _DINOV3_WIDE,
    "DINOv3_gated": _DINOV3_GATED,
    "DINOv3_gated_memory": _DINOV3_GATED,
}


def _tensors(name: str) -> dict[str, np.ndarray]:
    tensors, data = {}, _VARIANTS[f"{name}/data"]
    for key, shape in json.loads(str(_VARIANTS[f"{name}/shapes"])).items():
        array, data = np.split(data, [int(np.prod(shape))])
        tensors[key] = array.reshape(shape)
    return tensors


def _write(folder: pathlib.Path, name: str, *, config: bool = True) -> pathlib.Path:
    safetensors.numpy.save_file(_tensors(name), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(str(_VARIANTS[f"{name}/config"]))
    return folder / "model.safetensors"


def test_all_networks_are_known() -> None:
    assert sorted(_CHANGED) == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_what_a_file_tells(tmp_path: pathlib.Path, name: str) -> None:
    file = weight_files.read(_write(tmp_path, name))
    assert architecture.changed(file.attributes) == _CHANGED[name]
    assert file.num_heads == 2
    is_large = "clip" in name.lower() or "dinov3" in name.lower()
    is_vit = name in ("DeiTWithoutTeacher", "IJepa")
    assert (file.norm_eps or 1e-6) == (1e-5 if is_large else 1e-12 if is_vit else 1e-6)


def _infer(folder: pathlib.Path, images: np.ndarray) -> tuple[vit.AViT, Any]:
    file = weight_files.read(folder)
    return weight_files.infer(file, image_size=images.shape[1:3], name="it")


@pytest.mark.parametrize("name", _NAMES)
def test_outputs_are_those_of_the_library(tmp_path: pathlib.Path, name: str) -> None:
    _write(tmp_path, name)
    images = _VARIANTS[f"{name}/images"]
    model, params = _infer(tmp_path, images)
    output, _ = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(output, _VARIANTS[f"{name}/expected"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("name", _NAMES)
def test_load_finds_the_size_of_the_images(
    tmp_path: pathlib.Path, name: str, has_config: bool
) -> None:
    path = _write(tmp_path, name, config=has_config or name[0].isupper() or "dinov3" in name)
    size = (8, 16) if name == "wide" else None  # its config has no size
    model, _ = avit_jax.load(path, num_heads=2, image_size=size)
    assert model.pixels == _VARIANTS[f"{name}/images"].shape[1:3]


@pytest.mark.parametrize("name", [name for name in _NAMES if "memory" not in name])
def test_what_is_written_equals_what_was_read(tmp_path: pathlib.Path, name: str) -> None:
    path = _write(tmp_path, name)
    images, theirs = _VARIANTS[f"{name}/images"], _tensors(name)
    model, params = _infer(tmp_path, images)
    is_timm = name[0].islower()
    names = "timm" if is_timm or name in ("DeiTWithoutTeacher", "IJepa") else "huggingface"
    weight_files.write(path, params, model, names=names)
    ours = safetensors.numpy.load_file(path)
    if is_timm:
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            np.testing.assert_array_equal(ours[key], array, err_msg=key)
    if is_timm or names == "timm":
        (tmp_path / "config.json").unlink()  # the metadata tells the same
    again, params_again = _infer(tmp_path, images)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("name", ["clip", "siglip_gap", "fc_norm", "dinov2_registers"])
def test_what_a_file_without_a_config_leaves_open_is_reported(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = weight_files.read(_write(tmp_path, name, config=False))
    assert file.num_heads is None and not {"pool", "mlp"} & file.attributes.keys()
    with pytest.raises(errors.UserError, match="gives num_heads, and 8 channels are not heads"):
        weight_files.infer(file, image_size=(8, 8), name="it")
    weight_files.infer(
        weight_files.WeightFile(tensors=file.tensors, num_heads=2), image_size=(8, 8), name="it"
    )
    pool = "token" if name in ("clip", "dinov2_registers") else "avg"
    place = f", position_class={name != 'dinov2_registers'}" if pool == "token" else ""
    assumed = f"norm_eps=1e-06, pool={pool}, mlp=gelu{place}. It is also"
    expected = f"it does not give these values, which are assumed: {assumed}"
    assert [text for text in caplog.messages if text.startswith(expected)]


@pytest.mark.parametrize("has_config", [True, False])
def test_the_activation_of_a_gated_layer_is_reported_if_nothing_gives_it(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, has_config: bool
) -> None:
    weight_files.read(_write(tmp_path, "gated", config=has_config))
    assert has_config != ("activation of its gated MLP: silu of its first half" in caplog.text)


@pytest.mark.parametrize("part", ["pool", "mlp"])
def test_a_pooling_or_activation_that_the_model_lacks(tmp_path: pathlib.Path, part: str) -> None:
    name = {"pool": "class_and_max", "mlp": "quick_gelu"}[part]
    file = weight_files.read(_write(tmp_path, name))
    sizes = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "depth": 2}
    model = vit.AViT(**sizes, num_heads=2, mlp_ratio=2.0, num_classes=3, halting=None)
    value = _CHANGED[name][part]
    with pytest.raises(errors.UserError, match=f"set --config.model.{part}={value}"):
        weight_files.to_params(file, model, name="it")


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("CLIPVisionWithProjection", {"classifier.bias": (5,)}, "averages tokens without their"),
        ("siglip", {"attn_pool.q_norm.weight": (4,)}, "its attn_pool.q_norm.weight has no place"),
        ("dinov2", {"rope.freqs": (4,)}, "its rope.freqs belongs to rotary"),
        ("dinov2", {"blocks.0.mlp.norm.weight": (16,)}, "belongs to a norm inside the MLP"),
        ("deit3", {"blocks.1.attn.relative_position_bias_table": (4,)}, "position biases"),
    ],
)
def test_what_has_no_place_is_refused(
    tmp_path: pathlib.Path,
    name: str,
    extra: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    path = _write(tmp_path, name)
    more = {key: np.ones(shape, np.float32) for key, shape in extra.items()}
    safetensors.numpy.save_file(_tensors(name) | more, path)
    with pytest.raises(errors.UserError, match=message):
        weight_files.read(path)


@pytest.mark.parametrize("name", ["Dinov2", "qk_norm"])
def test_networks_without_position_embeddings_are_refused(
    tmp_path: pathlib.Path, name: str
) -> None:
    path = _write(tmp_path, name)
    tensors = {
        key: x
        for key, x in _tensors(name).items()
        if not key.endswith(("pos_embed", "position_embeddings"))
    }
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(errors.UserError, match=r"no position embeddings: .* rotary ones"):
        weight_files.read(path)


def test_an_attention_pooling_that_the_network_does_not_use(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    weight_files.read(_write(tmp_path, "SigLIPClassifier"))  # whose classifier averages
    assert "left out: vision_model.head.attention.in_proj_bias, " in caplog.text
    path = _write(tmp_path, "siglip_gap")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architecture": "vit_base_patch16_siglip_gap_224"}  # which timm fills from SigLIP
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, expected = _tensors("siglip_gap"), weight_files.read(path)
    more = {key: x for key, x in _tensors("siglip").items() if key.startswith("attn_pool.")}
    safetensors.numpy.save_file(tensors | more, path)
    caplog.clear()
    file = weight_files.read(path)  # its config says that it averages
    assert file.tensors.keys() == tensors.keys() and file.attributes == expected.attributes
    assert "left out: attn_pool.kv.bias, " in caplog.text


def test_layers_whose_norms_follow_are_refused_by_the_order_of_tensors(
    tmp_path: pathlib.Path,
) -> None:
    parts = ("attn", "norm1", "mlp", "norm2")  # as timm's ResPostBlock creates them
    tensors = _tensors("class_and_max")
    layers = {key: x for key, x in tensors.items() if key.startswith("blocks.")}
    usual = {key: x for key, x in tensors.items() if key not in layers}
    later = dict(sorted(layers.items(), key=lambda item: parts.index(item[0].split(".")[2])))
    orders = {"usual": tensors, "sorted": usual | dict(sorted(layers.items()))}
    for name, ordered in orders.items():
        np.savez(tmp_path / f"{name}.npz", **ordered)
        assert weight_files.read(tmp_path / f"{name}.npz").tensors.keys() == tensors.keys()
    np.savez(tmp_path / "x.npz", **usual, **later)
    with pytest.raises(errors.UserError, match="the norms of a layer follow its branches"):
        weight_files.read(tmp_path / "x.npz")


def test_a_file_without_a_config_shows_its_attention_pooling(tmp_path: pathlib.Path) -> None:
    file = weight_files.read(_write(tmp_path, "siglip", config=False))
    assert file.attributes["pool"] == "map"


def test_a_config_with_an_attention_pooling_that_the_tensors_lack(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path, "siglip")
    tensors = {key: x for key, x in _tensors("siglip").items() if not key.startswith("attn_pool.")}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(
        errors.UserError, match="gives global_pool=map, and the tensors have no attention"
    ):
        weight_files.read(path)


def test_a_new_head_may_average_instead(tmp_path: pathlib.Path) -> None:
    file = weight_files.read(_write(tmp_path, "siglip"))
    model, _ = weight_files.infer(file, image_size=(8, 8), name="it")
    averaging = model.clone(pool="avg")
    with pytest.raises(errors.UserError, match=r"set --config\.model\.pool=map"):
        weight_files.to_params(file, averaging, name="it")
    params = weight_files.to_params(file, averaging, name="it", new_head=True)
    assert "attn_pool" not in params


@pytest.mark.parametrize(
    ("name", "mlp"), [("CLIPVision", "quick_gelu"), ("SigLIPVision", "gelu_tanh")]
)
def test_the_activation_of_a_config_that_leaves_it_out(
    tmp_path: pathlib.Path, name: str, mlp: str
) -> None:
    path = _write(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weight_files.read(path).attributes["mlp"] == mlp


@pytest.mark.parametrize(
    ("name", "message"),
    [("qk_norm", "no network of these parts"), ("clip", "no classifier with a bias")]
    + [("siglip", "no network of these parts: .*'num_classes': 3")],
)
def test_networks_that_hugging_face_does_not_have(
    tmp_path: pathlib.Path, name: str, message: str
) -> None:
    path = _write(tmp_path, name)
    model, params = _infer(tmp_path, _VARIANTS[f"{name}/images"])
    with pytest.raises(errors.UserError, match=message):
        weight_files.write(path, params, model, names="huggingface")


def test_hugging_faces_names_for_positions_of_patches_only(tmp_path: pathlib.Path) -> None:
    images = _VARIANTS["wide/images"]
    model, params = _infer(_write(tmp_path, "wide"), images)
    assert not model.position_class
    path = tmp_path / "new/model.safetensors"
    weight_files.write(path, params, model, names="huggingface")
    again, again_params = _infer(path, images)
    output, _ = again.apply({"params": again_params}, images)
    np.testing.assert_allclose(output, _VARIANTS["wide/expected"], rtol=1e-5, atol=1e-5)
