"""Layouts, folders, parts and prefixes of weight files; refused files give one sentence."""

import contextlib
import json
import pathlib
import shutil
import struct
import time
import zipfile
from collections.abc import Callable

import fixtures
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import name_maps, tensor_files, weight_files

_DATA = pathlib.Path(__file__).parents[1] / "data/weights"
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


def _tensors(name: str = "timm.safetensors") -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(_DATA / name)


def _check_logits(path: pathlib.Path | str, expected: str, **changes: object) -> None:
    model = vit.AViT(**_SIZES | changes)
    logits = model.apply({"params": weight_files.load(path, model)}, _EXPECTED["images"])[0]
    np.testing.assert_allclose(logits, _EXPECTED[expected], atol=1e-5)


_IN_MEMORY = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}  # Hugging Face's names in files -> in memory since transformers 5


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_names_of_hugging_face_in_memory(tmp_path: pathlib.Path, kind: str, prefix: str) -> None:
    tensors = {}
    for name, array in _tensors(f"{kind}/model.safetensors").items():
        for old, new in _IN_MEMORY.items():
            name = name.replace(old, new)
        tensors[prefix + name] = array
    assert (
        f"{prefix}{kind}.layers.1.attention.o_proj.bias" in tensors
        and f"{prefix}{kind}.layers.1.mlp.fc2.bias" in tensors
    )
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    shutil.copy(_DATA / kind / "config.json", tmp_path)
    _check_logits(tmp_path / "x.safetensors", kind, norm_eps=1e-12, distilled=kind == "deit")


def _big_vision(heads: tuple[int, int] = (3, 3)) -> dict[str, np.ndarray]:
    """Returns the tensors as big_vision's models/vit.py names them.

    Its class token has no position embedding; here the token includes it.
    """
    tensors = _tensors()
    there = {
        "cls": tensors["cls_token"] + tensors["pos_embed"][:, :1],
        "pos_embedding": tensors["pos_embed"][:, 1:],
        **fixtures.big_vision_outside_layers(tensors),
    }
    for i in range(2):
        block, shape = f"Transformer/encoderblock_{i}/", (heads[i], 12 // heads[i])
        for number in (0, 1):
            there[f"{block}LayerNorm_{number}/scale"] = tensors[
                f"blocks.{i}.norm{number + 1}.weight"
            ]
            there[f"{block}LayerNorm_{number}/bias"] = tensors[f"blocks.{i}.norm{number + 1}.bias"]
            there[f"{block}MlpBlock_0/Dense_{number}/kernel"] = tensors[
                f"blocks.{i}.mlp.fc{number + 1}.weight"
            ].T
            there[f"{block}MlpBlock_0/Dense_{number}/bias"] = tensors[
                f"blocks.{i}.mlp.fc{number + 1}.bias"
            ]
        attention = f"{block}MultiHeadDotProductAttention_0/"
        for part, key in enumerate(("query", "key", "value")):
            rows = slice(12 * part, 12 * part + 12)
            there[f"{attention}{key}/kernel"] = tensors[f"blocks.{i}.attn.qkv.weight"][
                rows
            ].T.reshape(12, *shape)
            there[f"{attention}{key}/bias"] = tensors[f"blocks.{i}.attn.qkv.bias"][rows].reshape(
                shape
            )
        there[f"{attention}out/kernel"] = tensors[f"blocks.{i}.attn.proj.weight"].T.reshape(
            *shape, 12
        )
        there[f"{attention}out/bias"] = tensors[f"blocks.{i}.attn.proj.bias"]
    return there


def test_names_of_big_vision_today(tmp_path: pathlib.Path) -> None:
    path, tensors = tmp_path / "x.npz", _big_vision()
    np.savez(
        path,
        **{f"params/{name}": array for name, array in tensors.items()},
        **{"opt/count": np.int32(3)},
    )
    _check_logits(path, "timm")
    stacked = {name: array for name, array in tensors.items() if "encoderblock" not in name}
    for name in [name for name in tensors if "encoderblock_0" in name]:
        both = np.stack([tensors[name], tensors[name.replace("block_0", "block_1")]])
        stacked[name.replace("encoderblock_0", "encoderblock")] = both
    np.savez(path, **stacked)  # by its option scan
    _check_logits(path, "timm")


def _averaging() -> dict[str, np.ndarray]:
    """Returns big_vision's tensors of a network without class token."""
    tensors = _big_vision()
    del tensors["cls"]
    return tensors


@pytest.mark.parametrize("tower", [False, True])
def test_a_network_of_big_vision_without_class_token(tmp_path: pathlib.Path, tower: bool) -> None:
    tensors = _averaging()
    if tower:  # SigLIP
        tensors = {f"params/img/{name}": array for name, array in tensors.items()}
        tensors |= {"params/t": np.zeros(1), "params/b": np.zeros(1), "params/txt/x": np.zeros(1)}
    np.savez(tmp_path / "x.npz", **tensors)
    file = weight_files.read(tmp_path / "x.npz")
    assert {name: file.attributes[name] for name in ("pool", "mlp", "class_token")} == {
        "pool": "avg",
        "mlp": "gelu_tanh",
        "class_token": False,
    }
    np.testing.assert_array_equal(file.tensors["pos_embed"], _averaging()["pos_embedding"])
    assert file.tensors.keys() == _tensors().keys() - {"cls_token"}


class MlpBlock(nn.Module):
    """Has the names of big_vision's; 48 hidden channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(48)(x))
        return nn.Dense(x.shape[-1])(hidden)


class _Pooling(nn.Module):
    """The attention pooling of Flax's layers, under big_vision's names."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        probe = self.param("probe", nn.initializers.normal(1), (1, 1, 12))
        probe = jnp.repeat(probe, len(x), axis=0)
        x = nn.MultiHeadDotProductAttention(num_heads=3)(probe, x)
        x = x + MlpBlock()(nn.LayerNorm()(x))
        return x[:, 0]


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_attention_pooling_of_big_vision(tmp_path: pathlib.Path, num_classes: int) -> None:
    pooling, rng = _Pooling(), np.random.default_rng(0)
    shapes = jax.eval_shape(pooling.init, jax.random.key(0), np.zeros((1, 4, 12), np.float32))
    theirs = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    tensors = _averaging()
    head = {key: tensors.pop(key) for key in ("head/kernel", "head/bias")}
    tensors |= head if num_classes else {}
    flat = flax.traverse_util.flatten_dict(theirs["params"], sep="/")
    tensors |= {f"MAPHead_0/{name}": array for name, array in flat.items()}
    np.savez(tmp_path / "x.npz", **tensors)
    file = weight_files.read(tmp_path / "x.npz")
    model, params = weight_files.infer(file, image_size=(16, 16), name="it")
    assert (model.pool, model.mlp, model.num_classes) == ("map", "gelu_tanh", num_classes)
    images = jnp.asarray(_EXPECTED["images"])
    output, aux = model.apply({"params": params}, images, features=True)
    expected = pooling.apply(theirs, aux.features.reshape(len(images), 4, 12))
    if num_classes:
        expected = np.asarray(expected) @ head["head/kernel"] + head["head/bias"]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    del tensors["MAPHead_0/MultiHeadDotProductAttention_0/out/bias"]
    np.savez(tmp_path / "x.npz", **tensors)
    with pytest.raises(errors.UserError, match=r"MAPHead_0/MultiHead.*out/bias"):
        weight_files.read(tmp_path / "x.npz")


def test_names_of_dinov2_and_of_separate_gates(tmp_path: pathlib.Path) -> None:
    tensors = _tensors()
    registers = np.full((1, 2, 12), 0.5, np.float32)
    theirs = {name.replace("mlp.fc2", "mlp.w3"): array for name, array in tensors.items()}
    theirs |= {"register_tokens": registers, "mask_token": np.zeros((1, 12), np.float32)}
    first = theirs.pop("blocks.0.mlp.fc1.bias")
    value, gate = np.split(first, 2)
    theirs |= {"blocks.0.mlp.fc1_x.bias": value, "blocks.0.mlp.fc1_g.bias": gate}
    theirs["blocks.1.mlp.w12.bias"] = theirs.pop("blocks.1.mlp.fc1.bias")
    result, attributes, dropped = name_maps.to_timm(theirs)
    assert dropped == ["mask_token"] and attributes == {"position_class": False}
    assert result.keys() == tensors.keys() | {"reg_token"}
    np.testing.assert_array_equal(result["blocks.0.mlp.fc1.bias"], np.concatenate([gate, value]))
    expected = tensors["cls_token"] + tensors["pos_embed"][:, :1]
    np.testing.assert_array_equal(result["cls_token"], expected)
    np.testing.assert_array_equal(result["pos_embed"], tensors["pos_embed"][:, 1:])
    np.testing.assert_array_equal(result["reg_token"], registers)


def test_heads_that_differ_from_layer_to_layer(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", **_big_vision(heads=(3, 2)))
    with pytest.raises(errors.UserError, match="2 and 3 heads, and every layer must have the same"):
        weight_files.read(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("name", "other"),
    [("vit.layernorm.weight", "deit.layernorm.weight"), ("classifier.bias", "cls_classifier.bias")]
    + [("vit.encoder.layer.0.attention.attention.key.bias", "vit.layers.0.attention.k_proj.bias")],
)
def test_two_names_of_one_tensor(tmp_path: pathlib.Path, name: str, other: str) -> None:
    tensors = _tensors("vit/model.safetensors")
    shutil.copy(_DATA / "vit/config.json", tmp_path)
    safetensors.numpy.save_file(tensors | {other: tensors[name]}, tmp_path / "x.safetensors")
    _check_logits(tmp_path / "x.safetensors", "vit", norm_eps=1e-12)
    safetensors.numpy.save_file(tensors | {other: tensors[name] + 1}, tmp_path / "x.safetensors")
    with pytest.raises(
        errors.UserError, match="two of its tensors, with different values, are both"
    ):
        weight_files.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "backbone.", "encoder.", "_orig_mod.", "_orig_mod.module.", "net.1."],
)
@pytest.mark.parametrize("head", [True, False])
def test_the_prefix_of_a_wrapper_is_left_out(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, prefix: str, head: bool
) -> None:
    tensors = {
        ("" if name.startswith("head") and not head else prefix) + name: array
        for name, array in _tensors().items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    _check_logits(tmp_path / "x.safetensors", "timm")
    assert f"the prefix {prefix} of its tensors' names is left out" in caplog.text


def test_several_networks_in_one_file(tmp_path: pathlib.Path) -> None:
    both = {
        f"{prefix}{name}": array
        for name, array in _tensors().items()
        for prefix in ("student.", "teacher.")
    }
    safetensors.numpy.save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(
        errors.UserError, match=r"several networks, whose names begin with student\. and teacher\."
    ):
        weight_files.read(tmp_path / "x.safetensors")


def test_a_folder_of_hugging_face(tmp_path: pathlib.Path) -> None:
    assert tensor_files.is_weights(_DATA / "vit") and not tensor_files.is_weights(tmp_path)
    _check_logits(_DATA / "vit", "vit", norm_eps=1e-12)
    shutil.copy(_DATA / "vit/model.safetensors", tmp_path)
    (tmp_path / "checkpoints").mkdir()  # a workdir
    assert not tensor_files.is_weights(tmp_path)


def _split(folder: pathlib.Path, **changes: object) -> dict[str, str]:
    """Writes the tensors of Hugging Face's ViT as two files and their index; returns the index."""
    shutil.copy(_DATA / "vit/config.json", folder)
    tensors = _tensors("vit/model.safetensors")
    index = {}
    for i in (0, 1):
        part = f"model-0000{i + 1}-of-00002.safetensors"
        names = sorted(tensors)[i::2]
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / part)
        index |= dict.fromkeys(names, part)
    content = {"metadata": {}, "weight_map": index | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return index


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", ""]
)
def test_a_model_in_several_files(tmp_path: pathlib.Path, name: str) -> None:
    _split(tmp_path)
    assert tensor_files.is_weights(tmp_path / name)
    _check_logits(tmp_path / name, "vit", norm_eps=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": "../model-00001-of-00002.safetensors"}, "does not name files beside it"),
        ({"x": "/etc/passwd"}, "does not name files beside it"),
        ({"x": 3}, "as an index it makes no sense"),
        ({"x": "model-00009-of-00002.safetensors"}, "00009-of-00002.safetensors, .* is missing"),
        ({"x": "model-00001-of-00002.safetensors"}, "00001-of-00002.safetensors lacks x"),
        (
            {"classifier.bias": "model-00002-of-00002.safetensors"},
            "00001-of-00002.safetensors holds classifier.bias, which it does not list there",
        ),
    ],
)
def test_an_index_that_is_wrong(
    tmp_path: pathlib.Path, changes: dict[str, object], message: str
) -> None:
    _split(tmp_path, **changes)
    with pytest.raises(errors.UserError, match=message):
        weight_files.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_makes_no_sense(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(errors.UserError, match="as an index it makes no sense"):
        weight_files.read(tmp_path)


@pytest.mark.parametrize(
    ("file", "name"),
    [("legacy.pth", "x.pth.tar"), ("legacy.pth", "last.ckpt"), ("legacy.pth", "X.PT.TAR")],
)
def test_names_of_checkpoints(tmp_path: pathlib.Path, file: str, name: str) -> None:
    shutil.copy(_DATA / file, tmp_path / name)
    _check_logits(tmp_path / name, "timm")
    _check_logits(tmp_path, "timm")  # the only weight file of its folder


def test_a_folder_of_several_weight_files(tmp_path: pathlib.Path) -> None:
    for name in ("a.pth", "b.pth"):
        shutil.copy(_DATA / "legacy.pth", tmp_path / name)
    with pytest.raises(errors.UserError, match=r"several weight files, a\.pth, b\.pth: name one"):
        weight_files.read(tmp_path)
    shutil.copy(_DATA / "timm.safetensors", tmp_path / "model.safetensors")
    _check_logits(tmp_path, "timm")


def test_arrays_of_bfloat16_and_compressed_ones(tmp_path: pathlib.Path) -> None:
    tensors = {name: array.astype(jnp.bfloat16) for name, array in _big_vision().items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **tensors)
        read, _ = tensor_files.read(tmp_path / "x.npz")
        assert {array.dtype.name for array in read.values()} == {"bfloat16"}
        for name, array in read.items():
            np.testing.assert_array_equal(array, tensors[name])
    np.savez_compressed(tmp_path / "x.npz", **_big_vision())
    _check_logits(tmp_path / "x.npz", "timm")
    np.savez(tmp_path / "x.npz", **{"head/kernel": np.zeros(3, "V1")})
    with pytest.raises(errors.UserError, match="head/kernel is of dtype"):
        weight_files.read(tmp_path / "x.npz")


@pytest.mark.parametrize("start", ["params/", "opt/target/", "target/"])
def test_whole_training_states_of_flax(tmp_path: pathlib.Path, start: str) -> None:
    state = {f"{start}{name}": array for name, array in _big_vision().items()}
    state |= {"opt/state/step": np.int32(3), "opt/mu/head/bias": np.zeros(5, np.float32)}
    np.savez(tmp_path / "x.npz", **state)
    _check_logits(tmp_path / "x.npz", "timm")


def test_only_checkpoints_of_pytorch_have_a_moving_average() -> None:
    with pytest.raises(errors.UserError, match="only one PyTorch file can hold a moving average"):
        tensor_files.read(_DATA / "timm.safetensors", ema=True)


@pytest.mark.parametrize("path", ["http://x/y.pth", "nonsense://x"])
def test_a_storage_that_cannot_be_reached(path: str) -> None:
    with pytest.raises(
        errors.UserError, match=rf"{path} cannot be reached \(no such storage is known\)"
    ):
        tensor_files.is_weights(path)


def test_a_suffix_in_capitals(tmp_path: pathlib.Path) -> None:
    shutil.copy(_DATA / "timm.safetensors", tmp_path / "X.SAFETENSORS")
    _check_logits(tmp_path / "X.SAFETENSORS", "timm")


def _header(path: pathlib.Path, header: object, size: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def _many(path: pathlib.Path, count: int) -> None:
    entries = {
        f"a{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(count)
    }
    _header(path, entries, 4 * count)


def _float8(path: pathlib.Path, dtype: str) -> None:
    _header(path, {"norm.bias": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}, 4)


def _npz(path: pathlib.Path, member: str, content: bytes) -> None:
    np.savez(path, cls=np.zeros((1, 1, 12), np.float32))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, content)


_ARRAY = b"\x93NUMPY\x01\x00"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("x.npz", lambda path: _npz(path, "readme.txt", b"hello"), "readme.txt in it is no array"),
        ("x.npz", lambda path: _npz(path, "cls", b"hello"), "two of its arrays have one name"),
        (
            "x.npz",
            lambda path: _npz(path, "x.npy", _ARRAY + b"\xff\x7f" + b"(" * 0x7FFF),
            "cannot be read",
        ),
        ("x.npz", lambda path: np.savez(path, x=np.zeros(1, "f4,f4")), "x is of dtype"),
        ("x.npz", lambda path: np.savez(path, x=np.zeros(1, "U3")), "x is of dtype <U3"),
        ("x.npz", lambda path: np.savez(path, x=np.full(1, 1e300)), "x holds nan or infinity"),
        (
            "x.npz",
            lambda path: np.savez(path, **{"a\x1b[2J": np.zeros(1)}),
            r"a\\x1b\[2J, is no plain text",
        ),
        (
            "x.safetensors",
            lambda path: _float8(path, "F8_E4M3"),
            "norm.bias is of dtype F8_E4M3, and not one of float16",
        ),
        ("x.safetensors", lambda path: _float8(path, "F8_E5M2"), "norm.bias is of dtype F8_E5M2"),
        (
            "x.safetensors",
            lambda path: _many(path, 300_000),
            "its header of .* bytes is larger than",
        ),
        ("x.safetensors", lambda path: _many(path, 20_000), "it holds 20000 tensors"),
        (
            "x.safetensors",
            lambda path: safetensors.numpy.save_file({"a\n": np.zeros(1)}, path),
            r"a\\n, is no plain text",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: pathlib.Path, name: str, make: Callable[[pathlib.Path], None], message: str
) -> None:
    make(tmp_path / name)
    start = time.process_time()
    with pytest.raises(errors.UserError, match=message) as refused:
        weight_files.read(tmp_path / name)
    assert str(refused.value).isprintable() and time.process_time() - start < 10


def test_a_file_in_a_bucket_is_refused() -> None:
    with pytest.raises(errors.UserError, match=r"gs://bucket/w\.safetensors is in a bucket: copy"):
        weight_files.read("gs://bucket/w.safetensors")


def test_a_kernel_without_channels_is_a_sentence(tmp_path: pathlib.Path) -> None:
    empty = {"patch_embed.proj.weight": np.zeros((0, 3, 4, 4), np.float32)}
    empty["blocks.0.mlp.fc1.weight"] = np.zeros((8, 0), np.float32)
    with pytest.raises(errors.UserError, match="no vision transformer that can be run"):
        weight_files.infer(
            weight_files.WeightFile(tensors=empty), image_size=(16, 16), name="empty"
        )


@pytest.mark.parametrize("name", ["_" * 10**6, "embed_" * 10**5 + "!"], ids=["lines", "embeds"])
def test_long_names_take_no_time(tmp_path: pathlib.Path, name: str) -> None:
    safetensors.numpy.save_file({name: np.ones(2, np.int8)}, tmp_path / "x.safetensors")
    started = time.monotonic()
    with contextlib.suppress(errors.UserError):
        weight_files.read(tmp_path / "x.safetensors")
    assert time.monotonic() - started < 30


def test_tensors_without_elements_are_refused(tmp_path: pathlib.Path) -> None:
    empty = {"reg_token": np.zeros((1, 10**9, 0), np.float32)}
    safetensors.numpy.save_file(_tensors() | empty, tmp_path / "x.safetensors")
    with pytest.raises(errors.UserError, match="reg_token is empty"):
        weight_files.read(tmp_path / "x.safetensors")


def test_one_part_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    safetensors.numpy.save_file(_tensors(), path)
    with pytest.raises(errors.UserError, match=r"put model\.safetensors\.index\.json beside it"):
        weight_files.read(path)


@pytest.mark.parametrize("name", ["a.avit", "a.ONNX"])
def test_a_program_is_no_weight_file(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(errors.UserError, match="is a program, whose weights are not read"):
        weight_files.read(tmp_path / name)


def test_two_towers_of_one_name(tmp_path: pathlib.Path) -> None:
    tensors = {f"img/{name}": array for name, array in _averaging().items()}
    tensors["head/kernel"] = tensors["img/head/kernel"] + 1
    np.savez(tmp_path / "x.npz", **tensors)
    with pytest.raises(errors.UserError, match="are both head/kernel"):
        weight_files.read(tmp_path / "x.npz")
