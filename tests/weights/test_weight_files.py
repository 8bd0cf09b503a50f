"""Weights of timm, DeiT, Hugging Face and AugReg: logits of their libraries, round trips, mismatches."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import weight_files

_DATA = pathlib.Path(__file__).parents[1] / "data/weights"  # see make_weights.py there
_EXPECTED = np.load(_DATA / "expected.npz")
_SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "width": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
    "halting": None,
}


def _model(**changes: object) -> vit.AViT:
    return vit.AViT(**_SIZES | changes)


def _logits(
    file: weight_files.WeightFile, model: vit.AViT, images: np.ndarray = _EXPECTED["images"]
) -> np.ndarray:
    if file.norm_eps is not None:
        model = model.clone(norm_eps=file.norm_eps)
    return np.asarray(model.apply({"params": weight_files.fit(file.tensors, model)}, images)[0])


@pytest.mark.parametrize(
    ("name", "expected", "changes"),
    [
        ("tiny-10-30.pth", "timm", {}),
        ("legacy.pth", "timm", {}),
        ("timm.safetensors", "timm", {}),
        ("distilled.pth", "distilled", {"distilled": True}),
        ("vit/model.safetensors", "vit", {}),
        ("deit/model.safetensors", "deit", {"distilled": True}),
    ],
)
def test_logits_are_those_of_the_library_that_wrote_the_file(
    name: str, expected: str, changes: dict[str, object]
) -> None:
    np.testing.assert_allclose(
        _logits(weight_files.read(_DATA / name), _model(**changes)), _EXPECTED[expected], atol=1e-5
    )


def test_bfloat16_is_read() -> None:
    file = weight_files.read(_DATA / "bfloat16.pth")
    np.testing.assert_allclose(_logits(file, _model()), _EXPECTED["timm"], atol=0.2)


def test_position_embeddings_for_another_image_size() -> None:
    file = weight_files.read(_DATA / "timm.safetensors")
    logits = _logits(file, _model(image_size=(24, 40)), _EXPECTED["large_images"])
    np.testing.assert_allclose(logits, _EXPECTED["larger"], atol=1e-5)
    with pytest.raises(errors.UserError, match="5 patches, which do not form a square"):
        weight_files.fit(file.tensors | {"pos_embed": np.zeros((1, 6, 12))}, _model())


@pytest.mark.parametrize("grid", ["2x8x1", "0x16", "ab"])
def test_a_grid_that_makes_no_sense(tmp_path: pathlib.Path, grid: str) -> None:
    safetensors.numpy.save_file(_tensors(), tmp_path / "x.safetensors", {"grid": grid})
    with pytest.raises(errors.UserError, match=r"makes? no sense"):
        weight_files.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "names", "distilled"),
    [("timm.safetensors", "timm", False), ("vit/model.safetensors", "huggingface", False)]
    + [("deit/model.safetensors", "huggingface", True)],
)
def test_what_is_written_equals_what_was_read(
    tmp_path: pathlib.Path, name: str, names: str, distilled: bool
) -> None:
    model = _model(
        distilled=distilled,
        halting=halting.HaltingConfig(gamma=4.0, beta=-2.5, merge=True, redundancy=7.5),
    )
    params = weight_files.fit(weight_files.read(_DATA / name).tensors, model)
    weight_files.write(tmp_path / "model.safetensors", params, model, names=names)
    ours, theirs = (
        safetensors.numpy.load_file(folder)
        for folder in (tmp_path / "model.safetensors", _DATA / name)
    )
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    file = weight_files.read(tmp_path / "model.safetensors")
    assert halting.HaltingConfig(**file.gate) == model.halting
    assert (file.norm_eps, file.num_heads) == (1e-6, 3)
    if names == "huggingface":
        config, expected = (
            json.loads((path.with_name("config.json")).read_text())
            for path in (tmp_path / "x", _DATA / name)
        )
        for key in config.keys() - {"id2label", "label2id", "layer_norm_eps"}:
            assert config[key] == expected[key], key
        assert len(config["id2label"]) == 5


def test_a_learnt_gate_comes_back_where_it_learns_and_else_a_warning_tells_of_it(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(halting=halting.HaltingConfig(gamma=4.0, beta=-2.5, learnable=True))
    params = weight_files.load(_DATA / "timm.safetensors", model)
    assert params["gate"] == {"gamma": 4.0, "beta": -2.5}  # of a file without one
    params["gate"] = {"gamma": jnp.float32(3.5), "beta": jnp.float32(-2.0)}
    weight_files.write(tmp_path / "model.safetensors", params, model)
    gate = weight_files.read(tmp_path / "model.safetensors").gate
    assert halting.HaltingConfig(**gate) == halting.HaltingConfig(gamma=3.5, beta=-2.0)
    assert set(gate) == {
        "gamma",
        "beta",
        "epsilon",
        "channel",
        "learnable",
    }  # files are as before there was merging
    assert weight_files.load(tmp_path / "model.safetensors", model)["gate"] == {
        "gamma": 3.5,
        "beta": -2.0,
    }
    assert not [text for text in caplog.messages if "gate" in text]
    for other in ({"epsilon": 0.1, "learnable": True}, {"learnable": False}):
        there = weight_files.load(
            tmp_path / "model.safetensors",
            model.clone(halting=dataclasses.replace(model.halting, **other)),
        )
        assert "has another gate than config.halting" in caplog.text
        assert ("gate" in there) == other["learnable"]
        caplog.clear()


def test_sizes_that_the_tensors_do_not_tell(tmp_path: pathlib.Path) -> None:
    model = _model(norm_eps=1e-5)
    weight_files.write(tmp_path / "model.safetensors", weight_files.fit(_tensors(), model), model)
    for changes, message in (
        ({}, "norm_eps=1e-05"),
        ({"norm_eps": 1e-5, "num_heads": 2}, "num_heads=3"),
    ):
        with pytest.raises(errors.UserError, match=message):
            weight_files.load(tmp_path / "model.safetensors", _model(**changes))
    inferred, params = weight_files.infer(
        weight_files.read(tmp_path / "model.safetensors"), image_size=(16, 16), name="it"
    )
    assert inferred == model.clone(image_size=(16, 16))
    np.testing.assert_array_equal(params["head"]["kernel"], _tensors()["head.weight"].T)


def test_a_file_of_another_network_is_reported_by_what_it_lacks() -> None:
    with pytest.raises(errors.UserError, match=r"can be run: patch_embed\.proj\.weight is missing"):
        weight_files.infer(
            weight_files.WeightFile(tensors={"x": np.zeros(3)}), image_size=(16, 16), name="it"
        )
    assert errors.first_line(KeyError()) == "KeyError"


def test_widths_that_are_no_round_ratio_are_inferred() -> None:
    model = _model(width=49, num_heads=7, mlp_ratio=1.0000001 / 49)  # 1 / 49 * 49 < 1
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    inferred, _ = weight_files.infer(
        weight_files.to_file(params, model), image_size=(16, 16), name="it"
    )
    assert inferred.mlp_width == model.mlp_width == 1


def test_the_gate_of_a_released_file_is_in_its_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="avit_jax"):
        assert weight_files.read(_DATA / "tiny-10-30.pth").gate == {"gamma": 10.0, "beta": -30.0}
    assert "gate is taken from the file's name, gamma 10 and beta -30" in caplog.text
    assert weight_files.read(_DATA / "legacy.pth").gate is None


def _as_augreg(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors as big_vision and AugReg name them."""
    there = {
        "cls": tensors["cls_token"],
        "Transformer/posembed_input/pos_embedding": tensors["pos_embed"],
        **fixtures.big_vision_outside_layers(tensors),
    }
    for i in range(2):
        block = f"Transformer/encoderblock_{i}/"
        for number, norm in ((0, "norm1"), (2, "norm2")):
            there[f"{block}LayerNorm_{number}/scale"] = tensors[f"blocks.{i}.{norm}.weight"]
            there[f"{block}LayerNorm_{number}/bias"] = tensors[f"blocks.{i}.{norm}.bias"]
        for number in (0, 1):
            there[f"{block}MlpBlock_3/Dense_{number}/kernel"] = tensors[
                f"blocks.{i}.mlp.fc{number + 1}.weight"
            ].T
            there[f"{block}MlpBlock_3/Dense_{number}/bias"] = tensors[
                f"blocks.{i}.mlp.fc{number + 1}.bias"
            ]
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part, key in enumerate(("query", "key", "value")):
            rows = slice(12 * part, 12 * part + 12)
            there[f"{attention}{key}/kernel"] = tensors[f"blocks.{i}.attn.qkv.weight"][
                rows
            ].T.reshape(12, 3, 4)
            there[f"{attention}{key}/bias"] = tensors[f"blocks.{i}.attn.qkv.bias"][rows].reshape(
                3, 4
            )
        there[f"{attention}out/kernel"] = tensors[f"blocks.{i}.attn.proj.weight"].T.reshape(
            3, 4, 12
        )
        there[f"{attention}out/bias"] = tensors[f"blocks.{i}.attn.proj.bias"]
    return there


@pytest.mark.parametrize("prefix", ["", "params/"])
def test_augreg(tmp_path: pathlib.Path, prefix: str) -> None:
    tensors = _as_augreg(safetensors.numpy.load_file(_DATA / "timm.safetensors"))
    np.savez(tmp_path / "augreg.npz", **{prefix + name: array for name, array in tensors.items()})
    file = weight_files.read(tmp_path / "augreg.npz")
    np.testing.assert_allclose(_logits(file, _model()), _EXPECTED["timm"], atol=1e-5)
    assert file.num_heads == 3
    np.savez(
        tmp_path / "augreg.npz", **tensors, **{"pre_logits/kernel": np.zeros((12, 12), np.float32)}
    )
    with pytest.raises(errors.UserError, match="no place for pre_logits/kernel"):
        weight_files.read(tmp_path / "augreg.npz")
    del tensors["Transformer/encoder_norm/scale"]
    np.savez(tmp_path / "augreg.npz", **tensors)
    with pytest.raises(
        errors.UserError,
        match=r"no whole vision transformer that is supported: .*encoder_norm/scale",
    ):
        weight_files.read(tmp_path / "augreg.npz")


@pytest.mark.parametrize(
    ("make", "count"),
    [(vit.deit_tiny, 5_717_416), (vit.deit_small, 22_050_664), (vit.deit_base, 86_567_656)],
)
def test_numbers_of_parameters(make: Callable[..., vit.AViT], count: int) -> None:
    def parameters(model: vit.AViT) -> int:
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert parameters(make(halting=None)) == count
    if make is vit.deit_tiny:
        assert parameters(make(halting=None, distilled=True)) == 5_910_800


# Misfits
# ----------------------------------------------------------------------------------------------------------------


def _tensors(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = safetensors.numpy.load_file(_DATA / "timm.safetensors")
    changes = {name.replace("__", "."): array for name, array in changes.items()}
    return {name: array for name, array in (tensors | changes).items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm__bias": None}, r"norm\.bias is missing"),
        ({"blocks__1__mlp__fc2__weight": None}, r"blocks\.1\.mlp\.fc2\.weight is missing"),
        ({"extra": np.zeros(1, np.float32)}, "extra is unexpected"),
        (
            {"blocks__0__mlp__fc1__weight": np.zeros((12, 48), np.float32)},
            r"fc1\.weight is \(12, 48\) and not \(48, 12\)",
        ),
        (
            {"head__weight": np.zeros((7, 12), np.float32)},
            r"head\.weight is \(7, 12\) and not \(5, 12\).*config\.init_new_head",
        ),
        ({"cls_token": np.zeros((), np.float32)}, r"cls_token is \(\) and not \(1, 1, 12\)"),
        ({"pos_embed": np.zeros((1, 5, 13), np.float32)}, r"pos_embed is \(1, 5, 13\)"),
    ],
)
def test_misfits_are_all_named(changes: dict[str, np.ndarray | None], message: str) -> None:
    with pytest.raises(errors.UserError, match=message) as refused:
        weight_files.fit(_tensors(**changes), _model())
    assert "\n" not in str(refused.value)


def test_rgb_weights_start_a_network_of_grey_images_and_the_reverse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rgb, grey, path = _model(), _model(channels=1), _DATA / "timm.safetensors"
    images = _EXPECTED["images"][..., :1]
    same = np.repeat(images, 3, axis=-1)
    of_rgb = weight_files.load(path, rgb)
    assert "channels" not in caplog.text
    of_grey = weight_files.load(path, grey)
    assert "timm.safetensors is for images of 3 channels" in caplog.text
    expected, _ = rgb.apply({"params": of_rgb}, same)
    logits, _ = grey.apply({"params": of_grey}, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 1e-3
    caplog.clear()
    back = weight_files.to_params(weight_files.to_file(of_grey, grey), rgb, name="grey")
    assert "grey is for images of 1 channels" in caplog.text
    np.testing.assert_allclose(rgb.apply({"params": back}, same)[0], expected, rtol=0, atol=1e-6)
    with pytest.raises(errors.UserError, match=r"patch_embed.proj.weight is \(12, 3, 8, 8\)"):
        weight_files.load(path, _model(channels=4))


def test_a_distilled_file_and_a_plain_model() -> None:
    tensors = weight_files.read(_DATA / "distilled.pth").tensors
    with pytest.raises(
        errors.UserError, match=r"dist_token is unexpected, head_dist\.bias is unexpected"
    ):
        weight_files.fit(tensors, _model())


def test_a_new_head_where_the_number_of_classes_differs() -> None:
    params = weight_files.fit(_tensors(), _model(num_classes=9), new_head=True)
    assert params["head"]["kernel"].shape == (12, 9) and not params["head"]["kernel"].any()
    backbone = {name: array for name, array in _tensors().items() if not name.startswith("head.")}
    jax.tree.map(
        np.testing.assert_array_equal,
        weight_files.fit(backbone, _model(num_classes=9), new_head=True),
        params,
    )
    same = weight_files.fit(_tensors(), _model(), new_head=True)
    np.testing.assert_array_equal(same["head"]["kernel"], _tensors()["head.weight"].T)


def _broken(tmp_path: pathlib.Path, kind: str) -> pathlib.Path:
    """Writes a file that cannot be used."""
    path = tmp_path / "model.safetensors"
    data = (_DATA / "timm.safetensors").read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "huge header":
        path.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    elif kind == "page":
        path.write_text("<html>")
    elif kind == "nan":
        safetensors.numpy.save_file(_tensors(norm__bias=np.full(12, np.nan, np.float32)), path)
    elif kind == "integers":
        safetensors.numpy.save_file(_tensors(norm__bias=np.zeros(12, np.int32)), path)
    elif kind == "gate":
        safetensors.numpy.save_file(_tensors(), path, {"halting": '{"gamma": "x"}'})
    elif kind == "gate's channel":
        safetensors.numpy.save_file(_tensors(), path, {"halting": '{"channel": 0.5}'})
    elif kind == "deep gate":
        safetensors.numpy.save_file(_tensors(), path, {"halting": "[" * 100_000})
    elif kind == "eps":
        safetensors.numpy.save_file(_tensors(), path, {"norm_eps": "inf"})
    elif kind == "config's heads":
        shutil.copy(_DATA / "vit/model.safetensors", path)
        (tmp_path / "config.json").write_text(
            '{"layer_norm_eps": 1e-6, "num_attention_heads": 1e999}'
        )
    elif kind == "config's image size":
        shutil.copy(_DATA / "vit/model.safetensors", path)
        text = (
            '{"layer_norm_eps": 1e-6, "num_attention_heads": 3, "image_size": [16, 16], '
            '"patch_size": 0}'
        )
        (tmp_path / "config.json").write_text(text)
    elif kind == "config's activation":
        shutil.copy(_DATA / "vit/model.safetensors", path)
        text = '{"layer_norm_eps": 1e-6, "num_attention_heads": 3, "hidden_act": "relu"}'
        (tmp_path / "config.json").write_text(text)
    elif kind == "heads":
        safetensors.numpy.save_file(_tensors(), path, {"num_heads": "many"})
    elif kind == "gate's keys":
        safetensors.numpy.save_file(_tensors(), path, {"halting": '{"__class__": 1}'})
    elif kind == "no config":
        shutil.copy(_DATA / "vit/model.safetensors", path)
    elif kind == "config":
        shutil.copy(_DATA / "vit/model.safetensors", path)
        (tmp_path / "config.json").write_text('{"layer_norm_eps": "many"}')
    elif kind == "config's eps":
        shutil.copy(_DATA / "vit/model.safetensors", path)
        (tmp_path / "config.json").write_text('{"layer_norm_eps": -1, "num_attention_heads": 3}')
    elif kind == "layer":
        tensors = safetensors.numpy.load_file(_DATA / "vit/model.safetensors")
        del tensors["vit.encoder.layer.1.attention.attention.key.bias"]
        safetensors.numpy.save_file(tensors, path)
        shutil.copy(_DATA / "vit/config.json", tmp_path)
    elif kind == "npz of objects":
        path = tmp_path / "model.npz"
        np.savez(path, **{"Transformer/x": np.array([{}], object)})
    elif kind == "npz bomb":
        path = tmp_path / "model.npz"
        np.savez_compressed(path, cls=np.zeros(10**6))
    elif kind == "npz":
        path = tmp_path / "model.npz"
        path.write_bytes(b"PK")
    elif kind == "name":
        path = tmp_path / "model.h5"
        path.touch()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no"),
        ("truncated", "cannot be read"),
        ("huge header", "cannot be read"),
        ("page", "cannot be read"),
        ("nan", r"norm\.bias holds nan"),
        ("integers", r"norm\.bias is of dtype int32"),
        ("gate", "gate makes no sense"),
        ("gate's keys", "gate makes no sense"),
        ("heads", "metadata makes no sense"),
        ("gate's channel", "gate makes no sense"),
        ("deep gate", "gate makes no sense"),
        ("eps", "makes no sense"),
        ("config's heads", "does not give layer_norm_eps"),
        ("config's image size", "by zero"),
        ("config's activation", "its hidden_act is relu"),
        ("no config", r"config\.json is missing"),
        ("config", "does not give layer_norm_eps"),
        ("config's eps", "makes no sense"),
        ("layer", "no whole vision transformer that is supported: key is missing"),
        ("npz of objects", "cannot be read"),
        ("npz bomb", "compressed"),
        ("npz", "cannot be read"),
        ("name", "no weight file by its name"),
    ],
)
def test_broken_files(tmp_path: pathlib.Path, kind: str, message: str) -> None:
    with pytest.raises(errors.UserError, match=message) as refused:
        weight_files.read(_broken(tmp_path, kind))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["x.npz", "x.pth", "x.bin", "x", "safetensors", "x.safetensors.gz"]
)
def test_a_file_is_what_its_name_says(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        weight_files.write(tmp_path / name, weight_files.fit(_tensors(), _model()), _model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"beta": 1e300}, None),
        ({"gamma": -1e39}, None),
        ({"epsilon": 1 - 1e-12}, None),
        ({"epsilon": 1e-300}, None),
        ({"beta": 1e30}, "every image is finished after the first layer"),
        ({"beta": 600.0}, "every image is finished after the first layer"),
        ({"beta": -1e30}, "no token can halt before the last layer"),
        ({"gamma": 0.0}, "no token can halt before the last layer"),
        ({}, ""),
        ({"beta": 3.0, "epsilon": 0.3}, ""),
        ({"gamma": 1.0, "beta": -42.0, "merge": True, "redundancy": 50.0}, ""),
    ],
)
def test_gates_with_which_no_token_differs(
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    gate: dict[str, float],
    message: str | None,
) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(_tensors(), path, {"halting": json.dumps(gate)})
    if message is None:
        with pytest.raises(errors.UserError, match=r"gate makes no sense .*float32"):
            weight_files.read(path)
        return
    weight_files.read(path)
    assert message in caplog.text and bool(caplog.records) == bool(message)


def test_a_gate_in_a_name_that_is_no_number(tmp_path: pathlib.Path) -> None:
    shutil.copy(_DATA / "tiny-10-30.pth", tmp_path / f"tiny-1-{'9' * 60}.pth")
    with pytest.raises(errors.UserError, match="gate makes no sense"):
        weight_files.read(tmp_path / f"tiny-1-{'9' * 60}.pth")


def test_no_torch_is_needed() -> None:
    code = (
        "import sys, pathlib; sys.modules['torch'] = None\n"
        "from avit_jax.weights import weight_files\n"
        f"print(len(weight_files.read(pathlib.Path({str(_DATA / 'tiny-10-30.pth')!r})).tensors))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "32\n"
    assert json.loads((_DATA / "vit/config.json").read_text())["layer_norm_eps"] == 1e-12
