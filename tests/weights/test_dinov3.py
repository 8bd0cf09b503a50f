"""DINOv3: its files of timm, Hugging Face and Meta, and rotary position embeddings of others."""

import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import variants

import avit_jax
from avit_jax.models import vit
from avit_jax.models.rotary import Rotation
from avit_jax.utils import errors
from avit_jax.weights import timm_names, weight_files

_DATA = np.load(pathlib.Path(__file__).parents[1] / "data/weights/dinov3.npz")  # make_variants.py


def _tensors(name: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(_DATA[f"{name}/shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    arrays = np.split(_DATA[f"{name}/data"], ends[:-1])
    return {key: x.reshape(shapes[key]) for key, x in zip(shapes, arrays, strict=True)}


def _config(name: str) -> dict[str, Any]:
    return json.loads(str(_DATA[f"{name}/config"]))


def _write(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict | None = None
) -> pathlib.Path:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def _infer(path: pathlib.Path, size: tuple[int, int]) -> tuple[vit.AViT, Any]:
    return weight_files.infer(weight_files.read(path), image_size=size, name="it")


def _check_outputs(path: pathlib.Path, name: str) -> None:
    images = _DATA[f"{name}/images"]
    model, params = _infer(path, images.shape[1:3])
    output, _ = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(output, _DATA[f"{name}/expected"], rtol=1e-5, atol=1e-5)


def test_angles_of_a_small_grid() -> None:
    rotation = Rotation(theta=100.0, grid=(1, 2), num_prefix_tokens=1)
    # Two periods, 1 and 10. The row is in the middle, the columns are at -1/2 and 1/2.
    expected = [[0, 0, 0, 0], [0, 0, -np.pi, -np.pi / 10], [0, 0, np.pi, np.pi / 10]]
    np.testing.assert_allclose(rotation.angles(8), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "architecture", "arguments"),
    [
        ("dinov3", "vit_small_patch16_dinov3.lvd1689m", {"global_pool": "token"}),
        ("dinov3", "vit_small_patch16_lingbot", {"global_pool": None}),
        ("dinov3_wide", "vit_base_patch16_dinov3_qkvb", {"global_pool": None}),
        ("dinov3_gated", "vit_huge_plus_patch16_dinov3_qkvb", {"rope_temperature": 30.0}),
    ],
)
def test_the_name_of_a_network_of_timm_tells_how_it_rotates(
    tmp_path: pathlib.Path, name: str, architecture: str, arguments: dict[str, Any]
) -> None:
    config = {"architecture": architecture, "model_args": {"num_heads": 2, **arguments}}
    config |= {} if "global_pool" in arguments else {"global_pool": _config(name)["global_pool"]}
    path = _write(tmp_path, _tensors(name), config)
    assert weight_files.read(path).norm_eps == 1e-5
    _check_outputs(path, name)


@pytest.mark.parametrize(
    ("architecture", "width", "heads"),
    [("vit_huge_plus_patch16_dinov3.lvd1689m", 1280, 20), ("vit_7b_patch16_dinov3", 4096, 32)]
    + [("vit_giant_patch16_lingbot", 1536, 24), ("vit_small_patch16_dinov3", 64, None)],
)
def test_number_of_heads(architecture: str, width: int, heads: int | None) -> None:
    assert timm_names.num_heads(architecture, width) == heads


def test_a_file_of_timm_without_a_config_is_refused(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path, _tensors("dinov3"))
    with pytest.raises(errors.UserError, match=r"no position embeddings: .* put the config\.json"):
        weight_files.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_type": "cat"}, "its rope_type is cat, and rotary position embeddings must be"),
        ({"rope_type": None}, "its rope_type is cat"),  # timm's default
        ({"rope_type": "mixed"}, "its rope_type is mixed"),
        ({"rope_rotate_half": False}, "its rope_rotate_half is False"),
        ({"rope_grid_indexing": "xy"}, "its rope_grid_indexing is xy"),
        ({"rope_grid_offset": 1.0}, "its rope_grid_offset is 1.0"),
        ({"use_abs_pos_emb": True}, "its use_abs_pos_emb is True"),
        ({"use_rot_pos_emb": False}, "no position embeddings"),
        ({"use_rot_pos_emb": None}, "no position embeddings"),
        ({"swiglu_mlp": True}, "its swiglu_mlp is True, and the tensors have no gate"),
        ({"attn_type": "other"}, "its attn_type is other"),
        ({"use_post_norm": True}, "its use_post_norm is True"),
        ({"scale_mlp": True}, "its scale_mlp is True"),
        ({"scale_attn_inner": True}, "its scale_attn_inner is True"),
        ({"attn_only_layer_scale": True}, "its attn_only_layer_scale is True"),
        ({"qkv_fused": False}, "its qkv_fused is False"),
        ({"num_kv_heads": 1}, "its num_kv_heads is 1"),
        ({"num_reg_tokens": 3}, "num_registers=3, and the tensors have 4"),
        ({"use_fc_norm": True}, "fc_norm=True, and the tensors have False"),
        ({"use_pre_transformer_norm": True}, "pre_norm=True, and the tensors have False"),
        ({"norm_layer": "rmsnorm"}, "its norm_layer is rmsnorm"),
    ],
)
def test_other_networks_of_timms_class_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    config = _config("dinov3")
    config["model_args"] |= changes
    path = _write(tmp_path, _tensors("dinov3"), config)
    with pytest.raises(errors.UserError, match=message):
        weight_files.read(path)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_rope_224",
        "vit_base_patch16_rope_mixed_ape_224",
        "vit_base_patch16_sapiens2",
    ]
    + ["vit_base_patch16_rope_reg1_gap_256.sbb_in1k", "vit_pe_core_base_patch16_224.fb"],
)
@pytest.mark.parametrize("learned", [False, True])
def test_other_rotary_networks_are_refused_by_name(
    tmp_path: pathlib.Path, name: str, learned: bool
) -> None:
    tensors = _tensors("dinov3")
    if learned:
        tensors["pos_embed"] = np.zeros((1, 9, 16), np.float32)
    path = _write(tmp_path, tensors, {"architecture": name, "model_args": {"num_heads": 2}})
    with pytest.raises(errors.UserError, match=f"not supported: its architecture is {name}"):
        weight_files.read(path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DINOv3_wide", {"key_bias": False}, "key_bias=False, and the tensors have such a bias"),
        ("DINOv3_wide", {"key_bias": None}, "key_bias=False, and the tensors have such a bias"),
        ("DINOv3", {"query_bias": False}, "query_bias=False, and the tensors have such a bias"),
        (
            "DINOv3",
            {"use_gated_mlp": True, "hidden_act": "silu"},
            "True, and the tensors have no gate",
        ),
        (
            "DINOv3_gated",
            {"use_gated_mlp": False},
            "its use_gated_mlp is False, and .* have a gate",
        ),
        ("DINOv3_gated", {"use_gated_mlp": None}, "its use_gated_mlp is False, and .* have a gate"),
        ("DINOv3_gated", {"hidden_act": "gelu"}, "its hidden_act is gelu, and its use_gated_mlp"),
        ("DINOv3_gated", {"hidden_act": None}, "its hidden_act is gelu, and its use_gated_mlp"),
        ("DINOv3", {"hidden_act": "relu"}, "its hidden_act is relu"),
        ("DINOv3", {"mlp_bias": False}, "its mlp_bias is False"),
        ("DINOv3", {"proj_bias": False}, "its proj_bias is False"),
        ("DINOv3", {"num_register_tokens": 3}, "num_registers=3, and the tensors have 4"),
        ("DINOv3_wide", {"num_register_tokens": 1}, "num_registers=1, and the tensors have 0"),
        ("DINOv3", {"rope_theta": "many"}, "config.json"),
        ("DINOv3", {"rope_theta": 0}, "no position embeddings"),
        ("DINOv3", {"rope_parameters": {"rope_theta": 7.0}}, "its rope_parameters is"),
        ("DINOv3", {"model_type": "dinov2"}, "no position embeddings"),
    ],
)
def test_a_config_of_hugging_face_that_does_not_fit_is_refused(
    tmp_path: pathlib.Path, name: str, changes: dict[str, Any], message: str
) -> None:
    config = {key: x for key, x in (_config(name) | changes).items() if x is not None}
    path = _write(tmp_path, _tensors(name), config)
    with pytest.raises(errors.UserError, match=message):
        weight_files.read(path)


def test_the_base_of_the_periods_is_followed(tmp_path: pathlib.Path) -> None:
    config = _config("DINOv3")
    del config["rope_theta"]
    path = _write(tmp_path, _tensors("DINOv3"), config)
    _check_outputs(path, "DINOv3")  # Hugging Face's default
    _write(tmp_path, _tensors("DINOv3"), config | {"rope_theta": 101.0})
    assert weight_files.read(path).attributes["rope_theta"] == 101.0
    with pytest.raises(AssertionError, match="Not equal"):
        _check_outputs(path, "DINOv3")


def test_a_model_with_another_base_is_refused(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path, _tensors("DINOv3"), _config("DINOv3"))
    model, _ = _infer(path, (8, 8))
    with pytest.raises(errors.UserError, match=r"set --config\.model\.rope_theta=100\.0"):
        weight_files.load(path, model.clone(rope_theta=50.0))
    with pytest.raises(errors.UserError, match=r"set --config\.model\.rope_theta=100\.0"):
        weight_files.load(path, model.clone(rope_theta=0.0))


@pytest.mark.parametrize("changes", [{"pre_norm": True}, {"position_class": False}])
def test_a_rotary_network_is_loaded_as_it_was_saved(
    tmp_path: pathlib.Path, changes: dict[str, Any]
) -> None:
    model = variants.network("dinov3", **changes)
    params = variants.params(model)
    avit_jax.save(tmp_path / "it", model, params)
    loaded, loaded_params = avit_jax.load(tmp_path / "it")
    assert loaded.pre_norm == model.pre_norm and loaded.halting == model.halting
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)


def test_biases_of_zero_stay_in_hugging_faces_names(tmp_path: pathlib.Path) -> None:
    model = variants.network("dinov3", num_classes=0, halting=None)
    params = jax.tree.map(np.copy, variants.params(model))
    params["layers"]["qkv"]["bias"][:] = 0
    weight_files.write(tmp_path / "model.safetensors", params, model, names="huggingface")
    loaded = weight_files.load(tmp_path / "model.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_any_image_size_fits(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path, _tensors("DINOv3"), _config("DINOv3"))
    _, params = _infer(path, (8, 8))
    model, larger = avit_jax.load(path, image_size=(12, 20))
    assert model.grid == (3, 5)
    jax.tree.map(np.testing.assert_array_equal, larger, params)


def test_the_size_of_the_images_is_asked_for(tmp_path: pathlib.Path) -> None:
    config = {"architecture": "vit_small_patch16_dinov3", "model_args": {"num_heads": 2}}
    path = _write(tmp_path, _tensors("dinov3"), config)
    with pytest.raises(errors.UserError, match=r"call load\(..., image_size=\(height, width\)\)"):
        avit_jax.load(path)
    _write(tmp_path, _tensors("dinov3"), config | {"image_size": [8, 12]})
    assert avit_jax.load(path)[0].image_size == (8, 12)


def _own_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors of timm's class under the names of Meta's files, with what else is in them."""
    periods = np.array([1, 30**0.5]).astype(ml_dtypes.bfloat16).astype(np.float32)
    own = {"rope_embed.periods": periods, "mask_token": np.zeros((1, 16), np.float32)}
    own["local_cls_norm.weight"] = np.ones(16, np.float32)
    renames = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    renames |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    for name, array in tensors.items():
        if name.endswith("q_bias"):
            parts = [array, np.ones(16, np.float32), tensors[name.replace("q_bias", "v_bias")]]
            own[name.replace("q_bias", "qkv.bias")] = np.concatenate(parts)
            mask = np.repeat([1, 0, 1], 16).astype(np.float32)
            own[name.replace("q_bias", "qkv.bias_mask")] = mask
        elif not name.endswith("v_bias"):
            for theirs, ours in renames.items():
                name = name.replace(theirs, ours)
            own[name] = array
    return own


def test_metas_own_names(tmp_path: pathlib.Path) -> None:
    tensors = _tensors("dinov3_gated")
    expected, params = _infer(_write(tmp_path, tensors, _config("dinov3_gated")), (8, 8))
    (tmp_path / "config.json").unlink()
    model, own_params = _infer(_write(tmp_path, _own_names(tensors)), (8, 8))
    assert model == expected.clone(pool="token")
    jax.tree.map(np.testing.assert_array_equal, own_params, params)


def test_other_periods_are_refused(tmp_path: pathlib.Path) -> None:
    own = _own_names(_tensors("dinov3_gated"))
    own["rope_embed.periods"] = np.array([2, 7], np.float32)
    with pytest.raises(errors.UserError, match=r"rope_embed\.periods are not the powers"):
        weight_files.read(_write(tmp_path, own))


def test_hugging_faces_network_in_timms_names(tmp_path: pathlib.Path) -> None:
    for name in ("DINOv3_wide", "DINOv3_gated"):
        path = _write(tmp_path, _tensors(name), _config(name))
        model, params = _infer(path, (8, 8))
        path = tmp_path / name / "model.safetensors"
        weight_files.write(path, params, model)
        again, params_again = _infer(path, (8, 8))
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize("name", ["dinov3", "dinov3_gated"])
def test_what_hugging_face_lacks_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    path = _write(tmp_path, _tensors(name), _config(name))
    model, params = _infer(path, (8, 8))
    part = "'num_classes': 3" if name == "dinov3" else "'pool': 'avg'"
    with pytest.raises(errors.UserError, match=f"no network of these parts: .*{part}"):
        weight_files.write(path, params, model, names="huggingface")
