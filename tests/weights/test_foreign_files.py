"""Files that others may bring: what loads, what is refused by name, what is announced."""

import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import variants

import avit_jax
from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import name_maps, timm_names, weight_files


def _network(kind: str = "plain", **changes: Any) -> vit.AViT:
    attributes = variants.SIZES | variants.KINDS.get(kind, {}) | {"halting": None} | changes
    return vit.AViT(**({"image_size": 2 * attributes["patch_size"]} | attributes))


def _tensors(model: vit.AViT) -> dict[str, np.ndarray]:
    return weight_files.to_file(variants.params(model), model).tensors


def _load(
    folder: pathlib.Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any] | None,
    **arguments: Any,
) -> tuple[vit.AViT, Any]:
    contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return avit_jax.load(folder, **arguments)


def _timm(**args: Any) -> dict[str, Any]:
    known = {"num_heads": 2, "act_layer": "gelu", "img_size": 8, "norm_eps": 1e-6}
    return {"model_args": known | args}


def _check_outputs(model: vit.AViT, params: Any, expected: vit.AViT) -> None:
    images = variants.images(expected, 2)
    ours = model.apply({"params": params}, images)[0]
    theirs = expected.apply({"params": variants.params(expected)}, images)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# Pooling
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "config", "message"),
    [
        ({"pool": "avg", "fc_norm": True}, _timm(global_pool="token"), "norm after an average"),
        (
            {"pool": "avg", "fc_norm": True},
            {"architecture": "vit_tiny_patch4_8", **_timm()},
            "its global_pool is token, and the tensors have a norm after an average",
        ),
        ({}, _timm(global_pool="avg"), r"norm after the pooling .* write \"fc_norm\": false"),
        ({}, _timm(global_pool="max"), "its global_pool is max, with which timm has a norm after"),
        ({"pool": "map"}, _timm(global_pool="token"), "tensors have an attention pooling"),
        ({}, _timm(global_pool="map"), "pool=map, and the tensors have no attention pooling"),
        (
            {},
            {"architecture": "vit_tiny_patch4_8", "global_pool": "avg", **_timm()},
            "its global_pool is avg, and its architecture has token; if avg is right",
        ),
        (
            {},
            {"architecture": "vit_base_patch16_gap_224", "global_pool": "token", **_timm()},
            "its global_pool is token, and its architecture has avg",
        ),
        (
            {"pool": "avg", "class_token": False},
            {"architecture": "vit_base_patch16_siglip_224", **_timm()},
            "architecture=vit_base_patch16_siglip_224, and the tensors have no attention pooling",
        ),
        (
            {},
            _timm(global_pool="avg", use_rot_pos_emb=False),
            r"norm after the pooling .* write \"use_fc_norm\": false",
        ),
    ],
)
def test_a_pooling_that_contradicts_the_tensors_is_refused(
    tmp_path: pathlib.Path, parts: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.UserError, match=message):
        _load(tmp_path, _tensors(_network(**parts)), config)


@pytest.mark.parametrize(
    ("parts", "config"),
    [
        ({"pool": "avg"}, _timm(global_pool="avg", fc_norm=False)),
        ({"pool": "avg"}, {"architecture": "vit_base_patch16_gap_224", **_timm()}),
        (
            {"pool": "avg", "fc_norm": True},
            {"architecture": "vit_tiny_patch4_8", "global_pool": "avg", **_timm()},
        ),
        ({"fc_norm": True}, _timm(global_pool="token", fc_norm=True)),
        ({"pool": "max"}, _timm(global_pool="max", use_rot_pos_emb=False)),
        ({"pool": "map", "num_registers": 2}, _timm(global_pool="map")),
        ({"pool": "map", "class_token": False, "num_registers": 1}, _timm(global_pool="map")),
    ],
)
def test_the_pooling_that_timm_builds(
    tmp_path: pathlib.Path, parts: dict[str, Any], config: dict[str, Any]
) -> None:
    expected = _network(**parts)
    model, params = _load(tmp_path, _tensors(expected), config)
    _check_outputs(model, params, expected)


@pytest.mark.parametrize("more", [{"model_args": {}}, {"architecture": "eva_giant_patch14_224"}])
def test_the_pooling_of_eva_reads_the_class_token_too(
    tmp_path: pathlib.Path, more: dict[str, Any]
) -> None:
    key = {} if "architecture" in more else {"use_rot_pos_emb": False}
    config = more | _timm(global_pool="map", **key)
    with pytest.raises(errors.UserError, match="timm's class Eva pools the class token"):
        _load(tmp_path, _tensors(_network(pool="map")), config)
    expected = _network(pool="map", class_token=False)
    _check_outputs(*_load(tmp_path, _tensors(expected), config), expected)


def test_the_pooling_of_timms_architectures() -> None:
    pools = {
        "vit_base_patch16_siglip_224": "map",
        "vit_so150m_patch16_reg4_map_256": "map",
        "vit_base_patch16_siglip_gap_224": "avg",
        "test_vit2": "avg",
        "eva_giant_patch14_224": "avg",
        "eva_giant_patch14_clip_224": "token",
    }
    assert {name: timm_names.attributes(name)["pool"] for name in pools} == pools


# Names of others
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_serves_training_only_is_left_out(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    caplog.set_level(logging.INFO)
    expected, one = _network(num_classes=0), np.ones((2, 2), np.float32)
    more = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "criterion.weight")
    more += ("decoder_pred.bias", "head.mlp.0.weight", "head.last_layer.weight_v")
    more += ("head.last_layer2.weight_g", "head.last_layer.parametrizations.weight.original0")
    tensors = _tensors(expected) | dict.fromkeys(more, one)
    tensors = {prefix + name: x for name, x in tensors.items()}
    model, params = _load(tmp_path, tensors, _timm(global_pool="token"))
    _check_outputs(model, params, expected)
    assert "left out: criterion.weight, decoder_blocks.0.norm1.weight, " in caplog.text


def test_the_encoder_of_mae_in_hugging_faces_names(tmp_path: pathlib.Path) -> None:
    expected = _network(num_classes=0, norm_eps=1e-12)
    weight_files.write(
        tmp_path / "model.safetensors", variants.params(expected), expected, names="huggingface"
    )
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors = {f"vit.{name}": x for name, x in tensors.items()}
    more = ("decoder.mask_token", "decoder.decoder_pos_embed", "decoder.decoder_pred.weight")
    tensors |= dict.fromkeys(more, np.ones((2, 2), np.float32))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "vit_mae", "decoder_hidden_size": 2, "mask_ratio": 0.75}
    model, params = _load(tmp_path, tensors, config)
    _check_outputs(model, params, expected)


def _eva_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if name.endswith("qkv.bias"):
            query, _, value = np.split(array, 3)
            start = module.removesuffix(".qkv")
            result |= {f"{start}.q_bias": query, f"{start}.v_bias": value}
        elif kind == "gamma":
            result[f"{module[:-4]}.gamma_{module[-1]}"] = array
        else:
            result[name] = array
    return result


def test_eva_without_rotation_loads_if_its_config_says_so(tmp_path: pathlib.Path) -> None:
    model = _network("deit3", pool="avg", fc_norm=True)
    tensors = _eva_names(_tensors(model))
    config = {"architecture": "eva_giant_patch14_224", **_timm(no_embed_class=True)}
    ours, params = _load(tmp_path, tensors, config)
    bias = np.array(params["layers"]["qkv"]["bias"])
    width = model.width
    assert not bias[:, width : 2 * width].any()  # EVA's keys have none
    whole = np.array(variants.params(model)["layers"]["qkv"]["bias"])
    np.testing.assert_array_equal(bias[:, :width], whole[:, :width])
    np.testing.assert_array_equal(bias[:, 2 * width :], whole[:, 2 * width :])
    assert (ours.pool, ours.layer_scale, ours.position_class) == ("avg", True, False)
    (tmp_path / "config.json").unlink()
    for silent in (None, {"model_args": {"num_heads": 2}}):  # about rotation
        with pytest.raises(errors.UserError, match=r"names of EVA, .* may rotate .* config\.json"):
            _load(tmp_path, tensors, silent)
    for name in ("eva02_tiny_patch14_224", "vit_base_patch16_rope_ape_224"):
        with pytest.raises(errors.UserError, match=f"its architecture is {name}"):
            _load(tmp_path, tensors, config | {"architecture": name})


def test_names_of_deit_3_itself(tmp_path: pathlib.Path) -> None:
    expected = _network("deit3")
    tensors = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): x
        for name, x in _tensors(expected).items()
    }
    _check_outputs(*_load(tmp_path, tensors, None, num_heads=2), expected)


def test_a_head_beside_a_wrapped_backbone(tmp_path: pathlib.Path) -> None:
    expected = _network()
    tensors = {
        ("module." if name.startswith("head") else "module.backbone.") + name: x
        for name, x in _tensors(expected).items()
    }
    _check_outputs(*_load(tmp_path, tensors, _timm(global_pool="token")), expected)


def test_a_config_of_timm_that_transformers_wrote(tmp_path: pathlib.Path) -> None:
    expected = _network()
    tensors = {f"timm_model.{name}": x for name, x in _tensors(expected).items()}
    config = _timm() | {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch4_8"}
    _check_outputs(*_load(tmp_path, tensors, config), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.attn.norm.weight": (16,)}, "belongs to a norm inside the attention"),
        ({"blocks.0.attn.relative_position_bias_table": (4,)}, "relative position biases"),
        ({"blocks.0.attn.q_proj.weight": (16, 16)}, "belongs to separate queries"),
        ({"patch_embed.backbone.conv.weight": (4,)}, "more than one convolution"),
        ({"stages.0.conv.weight": (4,)}, "belongs to stages of layers"),
        ({"extra.weight": (4,)}, "its extra.weight has no place"),
        ({"blocks.0.norm1.bias": None}, "its blocks.0.norm1 has no bias, as in RMSNorm"),
        ({"norm.weight": None, "norm.bias": None}, "it has no norm after the last layer"),
        ({"patch_embed.proj.weight": (16, 3, 2, 4, 4)}, r"is \(16, 3, 2, 4, 4\), and not"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_parts_that_are_not_supported_are_named(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str, has_config: bool
) -> None:
    tensors = _tensors(_network())
    for name, shape in changes.items():
        tensors.pop(name, None)
        tensors |= {} if shape is None else {name: np.ones(shape, np.float32)}
    with pytest.raises(errors.UserError, match=message):
        _load(tmp_path, tensors, _timm() if has_config else None)


def test_a_kind_of_hugging_face_is_refused_before_its_names(tmp_path: pathlib.Path) -> None:
    tensors = {"encoder.layer.0.attention.attention.query.weight": np.ones(1, np.float32)}
    with pytest.raises(errors.UserError, match="its model_type is beit"):
        _load(tmp_path, tensors, {"model_type": "beit"})


def test_a_gate_with_another_activation(tmp_path: pathlib.Path) -> None:
    tensors = _tensors(_network("dinov2_giant"))
    with pytest.raises(
        errors.UserError, match="its act_layer is gelu, and the tensors have a gate"
    ):
        _load(tmp_path, tensors, _timm())


# What is announced
# ----------------------------------------------------------------------------------------------------------------


def test_a_warning_says_what_is_assumed_and_how_to_change_it(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = _tensors(_network(num_heads=4, width=256, mlp="quick_gelu"))
    _load(tmp_path, tensors, None)
    assumed = "assumed: num_heads=4, norm_eps=1e-06, pool=token, mlp=gelu, position_class=True. "
    assert assumed in caplog.text
    assert "8 x 8 pixels are assumed, since its 4 patches may form a square" in caplog.text
    text = caplog.text.partition("correct it in ")[2].partition(", and save")[0]
    config = json.loads(text)
    assert config["model_args"]["no_embed_class"] is False
    config["model_args"] |= {"act_layer": "quick_gelu", "num_heads": 2, "norm_eps": 1e-5}
    caplog.clear()
    model, _ = _load(tmp_path, tensors, config)
    assert (model.mlp, model.num_heads, model.norm_eps) == ("quick_gelu", 2, 1e-5)
    assert "assumed" not in caplog.text.replace("pixels are assumed", "").replace(
        "usual ones are assumed", ""
    )


def test_heads_alone_that_nothing_gives_are_announced(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _timm(num_heads=None, global_pool="avg", fc_norm=False)
    _load(tmp_path, _tensors(_network(num_heads=1, width=64, pool="avg")), config)
    assert "which are assumed: num_heads=1. " in caplog.text


def test_an_assumed_average_gives_a_config_that_loads(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _network(class_token=False, pool="avg")
    _load(tmp_path, _tensors(expected), None, num_heads=2)
    text = caplog.text.partition("correct it in ")[2].partition(", and save")[0]
    model, params = _load(tmp_path, _tensors(expected), json.loads(text), num_heads=2)
    _check_outputs(model, params, expected)


def test_the_size_of_the_images_if_the_class_token_has_no_position(tmp_path: pathlib.Path) -> None:
    expected = _network("deit3", image_size=12)
    config = _timm(img_size=None, no_embed_class=True, global_pool="token")
    model, params = _load(tmp_path, _tensors(expected), config)
    assert model.pixels == (12, 12)
    _check_outputs(model, params, expected)


def test_heads_that_contradict_the_file_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        errors.UserError, match="gives num_heads=2, and load got num_heads=4: leave"
    ):
        _load(tmp_path, _tensors(_network()), _timm(), num_heads=4)


def test_only_the_layers_of_a_network_are_its_names() -> None:
    names = _tensors(_network())
    assert name_maps.mismatches(names) == ([], [])
    assert name_maps.mismatches({})[0][-1] == "blocks.*"
    assert jax.tree.leaves(name_maps.from_torch(names))


def test_a_config_that_contradicts_itself_makes_no_sense(tmp_path: pathlib.Path) -> None:
    tensors = _tensors(_network(pool="avg", fc_norm=True))
    with pytest.raises(errors.UserError, match=r"makes no sense .*contradicts itself"):
        _load(tmp_path, tensors, _timm(global_pool="avg") | {"global_pool": "token"})


def test_the_epsilon_of_eva_giant_is_that_of_timm() -> None:
    assert timm_names.norm_eps("eva_giant_patch14_clip_224") is None
    assert timm_names.norm_eps("vit_base_patch16_clip_224") == 1e-5


def test_a_file_without_a_network_and_an_image_without_pixels(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"it has no layers named blocks\.\*"):
        _load(tmp_path, {"norm.weight": np.ones(16, np.float32)}, None)
    for size in (0, (8, -8)):
        with pytest.raises(errors.UserError, match="image_size must be at least 1; got"):
            _load(tmp_path, _tensors(_network()), _timm(), image_size=size)
