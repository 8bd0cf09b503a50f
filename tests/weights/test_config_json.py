"""`config.json`: its extra sizes are used; sizes that contradict the tensors are refused or reported."""

import json
import pathlib
import re
import shutil

import fixtures
import pytest
import safetensors.numpy

from avit_jax.utils import errors
from avit_jax.weights import timm_names, weight_files

_DATA = pathlib.Path(__file__).parents[1] / "data/weights"
_HUGGING_FACE = json.loads((_DATA / "vit/config.json").read_text())
_TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "num_features": 12,
    "global_pool": "token",
    "model_args": {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    },
    "pretrained_cfg": {
        "input_size": [3, 16, 16],
        "num_classes": 5,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    },
}


def _read(folder: pathlib.Path, name: str, config: object) -> weight_files.WeightFile:
    shutil.copy(_DATA / name, folder)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return weight_files.read(folder / pathlib.Path(name).name)


def _timm(section: str = "", **changes: object) -> dict[str, object]:
    return _TIMM | {section: _TIMM[section] | changes} if section else _TIMM | changes


@pytest.mark.parametrize("name", ["timm.safetensors", "legacy.pth"])
def test_what_timm_tells_is_used(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = _read(tmp_path, name, _TIMM)
    assert (file.num_heads, file.grid, file.norm_eps) == (3, (2, 2), None)
    file = _read(
        tmp_path,
        name,
        _timm("model_args", img_size=[8, 32], norm_eps=1e-5, act_layer=None, qkv_bias=True),
    )
    assert (file.num_heads, file.grid, file.norm_eps) == (3, (1, 4), 1e-5)
    assert not fixtures.messages(caplog, "avit_jax.weights")


def test_what_hugging_face_tells_is_used(tmp_path: pathlib.Path) -> None:
    for image_size in ([8, 32], {"height": 8, "width": 32}):
        file = _read(tmp_path, "vit/model.safetensors", _HUGGING_FACE | {"image_size": image_size})
        assert (file.num_heads, file.grid, file.norm_eps) == (3, (1, 4), 1e-12)
    assert _read(
        tmp_path, "deit/model.safetensors", json.loads((_DATA / "deit/config.json").read_text())
    ).grid == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 999}, "width=999, and the tensors have 12"),
        ({"num_hidden_layers": 99}, "depth=99, and the tensors have 2"),
        ({"intermediate_size": 47}, "mlp_width=47, and the tensors have 48"),
        ({"num_channels": 1}, "channels=1, and the tensors have 3"),
        ({"patch_size": 16}, "patch_size=16, and the tensors have 8"),
        ({"patch_size": [8, 16]}, r"patch_size is \[8, 16\], and must be a whole number"),
        ({"image_size": 32}, r"grid=\(4, 4\), and the tensors have 5 position embeddings"),
        ({"image_size": [16, 16, 16]}, r"image_size is \[16, 16, 16\]"),
        ({"id2label": {"0": "a"}}, "num_classes=1, and the tensors have 5"),
        ({"num_attention_heads": 3.5}, "num_attention_heads is 3.5, and must be a whole number"),
        ({"num_attention_heads": "3"}, "must be a whole number"),
        ({"num_attention_heads": True}, "must be a whole number"),
        ({"num_attention_heads": None}, "does not give layer_norm_eps"),
        ({"model_type": "bert"}, "its model_type is bert"),
        ({"model_type": "deit"}, "distilled=True, and the tensors have False"),
        ({"qkv_bias": False}, "qkv_bias=False, and the tensors have True"),
        ({"use_swiglu_ffn": True}, "its use_swiglu_ffn is True, and the tensors"),
        ({"hidden_act": ["gelu"]}, "its hidden_act is"),
        ({"hidden_act": "relu"}, "its hidden_act is relu"),
        ({"layer_norm_eps": 2.0}, "makes no sense"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"norm_eps": 1e-3}, "contradicts itself: norm_eps=1e-12 and norm_eps=0.001"),
        ({"mlp_ratio": 2.0}, "contradicts itself: mlp_width=48 and mlp_width=24"),
        (
            {"num_labels": 5, "id2label": {"0": "a"}},
            "contradicts itself: num_classes=5 and num_classes=1",
        ),
        ({"embed_dim": 13}, "contradicts itself: width=12 and width=13"),
        ({"img_size": 32}, "contradicts itself: images of 16 and 32 pixels"),
    ],
)
def test_a_config_of_hugging_face_that_contradicts_the_tensors(
    tmp_path: pathlib.Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(errors.UserError, match=message):
        _read(tmp_path, "vit/model.safetensors", _HUGGING_FACE | changes)


@pytest.mark.parametrize("section", ["", "model_args"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_pool": "avgmax"}, "its global_pool is avgmax"),
        (
            {"global_pool": "map"},
            "and the tensors have no attention pooling|pool=token and pool=map",
        ),
        ({"global_pool": ""}, "its global_pool is "),
        ({"global_pool": "\x1b[2J\ud800"}, r"its global_pool is \\x1b\[2J\\ud800"),
        ({"img_size": ["\x1b[2J", 8]}, r"image_size is \\x1b\[2J"),
        ({"act_layer": "silu"}, "its act_layer is silu"),
        ({"norm_layer": "rmsnorm"}, "its norm_layer is rmsnorm"),
        ({"class_token": False}, "class_token=False, and the tensors have True"),
        ({"pre_norm": True}, "pre_norm=True, and the tensors have False"),
        ({"init_values": 1e-5}, "layer_scale=True, and the tensors have False"),
        ({"qkv_bias": False}, "qkv_bias=False, and the tensors have True"),
        ({"qk_norm": True}, "qk_norm=True, and the tensors have False"),
        ({"reg_tokens": 4}, "num_registers=4, and the tensors have 0"),
        ({"pos_embed": "none"}, "its pos_embed is none"),
        ({"embed_dim": 192}, "contradict.* width=.*12"),
        ({"depth": 12}, "contradict.* depth="),
        ({"mlp_ratio": 3}, "contradict.* mlp_width=36"),
        ({"in_chans": 1}, "contradict.* channels="),
        ({"num_classes": 6}, "contradict.* num_classes="),
        ({"patch_size": 16}, "contradict.* patch_size="),
        ({"img_size": 32}, "contradict.* grid="),
        (
            {"no_embed_class": True},
            r"contradict.* grid=\(2, 2\), and the tensors have 5 position embeddings",
        ),
        ({"num_heads": 3.5}, "must be a whole number"),
    ],
)
def test_a_config_of_timm_that_contradicts_the_tensors(
    tmp_path: pathlib.Path, section: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(errors.UserError, match=message):
        _read(tmp_path, "timm.safetensors", _timm(section, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            _timm("pretrained_cfg", input_size=[3, 224, 224], num_classes=1000),
            "",
        ),  # model_args and top level count
        (
            {"pretrained_cfg": {"input_size": [3, 224, 224]}},
            r"pretrained_cfg or architecture gives grid=\(28, 28\)",
        ),
        ({"pretrained_cfg": {"input_size": [1, 16, 16]}}, "channels=1"),
        ({"pretrained_cfg": {"num_classes": 1000}}, "num_classes=1000"),
        ({"architecture": "vit_base_patch16_224"}, "width=768"),
        ({"architecture": "deit_tiny_distilled_patch16_224.fb_in1k"}, "distilled=True"),
        ({"architecture": "resnet50\x1b[2J"}, r"the architecture resnet50\\x1b\[2J"),
    ],
)
def test_where_a_network_comes_from_is_only_reported(
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    config: dict[str, object],
    message: str,
) -> None:
    file = _read(tmp_path, "timm.safetensors", config)
    assert bool(caplog.records) == bool(message)
    assert re.search(message, caplog.text)
    assert file.num_heads in (None, 3)


def test_heads_that_the_architecture_tells(tmp_path: pathlib.Path) -> None:
    config = {
        "architecture": "vit_huge_patch14_224",
        "model_args": {"embed_dim": 12, "depth": 2, "patch_size": 8, "img_size": 16},
    }
    assert _read(tmp_path, "timm.safetensors", config).num_heads == 16


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[1]",
        "{",
        '"x"',
        '{"model_args": [1]}',
        '{"model_args": {"depth": 1e999}}',
        "\udcff",
    ],
)
@pytest.mark.parametrize("name", ["timm.safetensors", "vit/model.safetensors"])
def test_a_config_that_makes_no_sense(tmp_path: pathlib.Path, name: str, text: str) -> None:
    shutil.copy(_DATA / name, tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        errors.UserError, match=r"config\.json (beside .* makes no sense|does not give)"
    ) as refused:
        weight_files.read(tmp_path / pathlib.Path(name).name)
    assert "\n" not in str(refused.value)


def test_a_config_of_something_else_says_nothing(tmp_path: pathlib.Path) -> None:
    file = _read(tmp_path, "timm.safetensors", {"name": "x", "model": {"width": 3}})
    assert (file.num_heads, file.grid, file.norm_eps) == (None, None, None)


def test_metadata_and_config_that_contradict_each_other(tmp_path: pathlib.Path) -> None:
    tensors = safetensors.numpy.load_file(_DATA / "timm.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"num_heads": "2"})
    (tmp_path / "config.json").write_text(json.dumps(_TIMM))
    with pytest.raises(errors.UserError, match="num_heads=2 and num_heads=3"):
        weight_files.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("architecture", "num_heads", "norm_eps", "mlp"),
    [
        ("vit_so400m_patch14_siglip_gap_224.webli", 16, None, "gelu"),
        ("vit_so400m_patch16_siglip_gap_256.v2_webli", 16, None, "gelu_tanh"),
        ("vit_base_patch16_plus_clip_240.laion400m", 14, 1e-5, "gelu"),
        ("vit_base_patch32_clip_quickgelu_224.openai", 12, 1e-5, "quick_gelu"),
        ("vit_base_patch16_gap_224", 16, None, "gelu"),
        ("vit_giant_patch14_reg4_dinov2.lvd142m", 24, None, "gelu"),
        ("vit_unheard_patch16_of_224", None, None, "gelu"),
    ],
)
def test_what_timm_s_names_of_architectures_tell(
    architecture: str, num_heads: int | None, norm_eps: float | None, mlp: str
) -> None:
    width = {"so400m": 1152, "giant": 1536}.get(architecture.split("_")[1], 768)
    width = 896 if "plus" in architecture else width
    assert timm_names.num_heads(architecture, width) == num_heads
    assert timm_names.num_heads(architecture, 12) is None
    assert timm_names.norm_eps(architecture) == norm_eps
    assert timm_names.attributes(architecture)["mlp"] == mlp
    pool = "avg" if "_gap_" in architecture else "token"
    assert timm_names.attributes(architecture)["pool"] == pool


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224.sw_in1k", "test_vit3.r160_in1k"])
def test_an_architecture_of_other_layers_or_pooling(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(errors.UserError, match=f"its architecture is {name}"):
        _read(tmp_path, "timm.safetensors", {"architecture": name})


def test_names_of_the_classes(tmp_path: pathlib.Path) -> None:
    config = _timm("pretrained_cfg") | {"label_names": ["a", "b", "c", "d", "e"]}
    assert _read(tmp_path, "timm.safetensors", config).label_names == ("a", "b", "c", "d", "e")
    named = _HUGGING_FACE | {"id2label": {str(i): f"class {i}" for i in range(5)}}
    file = _read(tmp_path, "vit/model.safetensors", named)
    assert file.label_names == tuple(f"class {i}" for i in range(5))


def test_the_part_of_a_config_about_images(tmp_path: pathlib.Path) -> None:
    config = {"model_type": "siglip", "vision_config": _HUGGING_FACE | {"model_type": "vit"}}
    assert _read(tmp_path, "vit/model.safetensors", config).num_heads == 3
    del config["vision_config"]["num_attention_heads"], config["vision_config"]["layer_norm_eps"]
    file = _read(tmp_path, "vit/model.safetensors", config)
    assert (file.num_heads, file.norm_eps) == (12, 1e-6)  # what Hugging Face leaves out


def test_two_labels_in_an_old_config_of_clip_mean_nothing(tmp_path: pathlib.Path) -> None:
    labels = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    part = _HUGGING_FACE | {"model_type": "vit"} | labels
    file = _read(tmp_path, "vit/model.safetensors", {"model_type": "siglip", "vision_config": part})
    assert file.label_names is None


def test_the_heads_of_timms_test_networks() -> None:
    for name in ("test_vit.r160_in1k", "test_vit2.r160_in1k"):
        assert timm_names.num_heads(name, 64) == 2
