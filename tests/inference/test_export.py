"""Exported networks: the same logits in a process with JAX and `serving` only; bad files are refused."""

import dataclasses
import io
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable

import fakes
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.core import halting
from avit_jax.data import augment
from avit_jax.inference import export, serving
from avit_jax.models import flops, vit
from avit_jax.training import build
from avit_jax.utils import errors
from avit_jax.weights import weight_files

_MODEL = vit.AViT(
    image_size=(24, 16), patch_size=8, width=16, depth=4, num_heads=2, num_classes=5,
    halting=halting.HaltingConfig(gamma=3.0, beta=-1.0),
)  # fmt: skip
_IMAGES = np.random.default_rng(0).integers(0, 256, (9, 24, 16, 3), np.uint8)
_COLORS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(_MODEL.init)(jax.random.key(0), jnp.zeros((1, 24, 16, 3)))["params"]


@pytest.fixture(scope="module")
def file(params: dict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("export") / "network.avit"
    export.write(path, params, _MODEL, label_names=["a", "b", "c", "d", "e"], **_COLORS)
    return path


def _expected(
    params: dict, images: np.ndarray, model: vit.AViT = _MODEL
) -> tuple[np.ndarray, np.ndarray]:
    logits, aux = model.apply({"params": params}, augment.normalize(images, **_COLORS))
    depth = flops.is_computed(aux.active, model.num_prefix_tokens).sum(axis=0)[
        :, model.num_prefix_tokens :
    ]
    return np.asarray(logits), np.asarray(depth).reshape(len(images), *model.grid)


def test_any_batch_in_a_fresh_process_with_the_loader_alone(
    file: pathlib.Path, params: dict, tmp_path: pathlib.Path
) -> None:
    shutil.copy(serving.__file__, tmp_path / "loader.py")
    np.save(tmp_path / "images.npy", _IMAGES)
    code = (
        "import sys\nsys.modules.update(flax=None, avit_jax=None)\nimport jax, numpy as np, "
        "loader\n"
        "jax.config.update('jax_default_matmul_precision', 'highest')\n"
        f"network = loader.load({str(file)!r})\nimages = np.load('images.npy')\n"
        "np.savez('out.npz', **{f'{name}{n}': x for n in (1, 8, 9)"
        " for name, x in zip(('logits', 'depth'), "
        "network(images[:n]))})\nprint(network.metadata['label_names'][4])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert done.stdout == "e\n"
    out = np.load(tmp_path / "out.npz")
    for n in (1, 8, 9):
        logits, depth = _expected(params, _IMAGES[:n])
        np.testing.assert_allclose(out[f"logits{n}"], logits, atol=1e-5)
        np.testing.assert_array_equal(out[f"depth{n}"], depth)
    assert len(np.unique(depth)) > 1


def _environment() -> dict[str, str]:
    import os

    return {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}


def test_a_fixed_batch_and_what_it_refuses(params: dict, tmp_path: pathlib.Path) -> None:
    export.write(tmp_path / "network.avit", params, _MODEL, batch=4, **_COLORS)
    network = serving.load(tmp_path / "network.avit")
    np.testing.assert_allclose(
        network(_IMAGES[:4])[0], _expected(params, _IMAGES[:4])[0], atol=1e-5
    )
    for images in (_IMAGES[:3], _IMAGES[:4].astype(np.float32), _IMAGES[:4, :16]):
        with pytest.raises(ValueError, match=r"images must be \(4, 24, 16, 3\) of uint8"):
            network(images)
    assert network.metadata["halting"]["gamma"] == 3.0 and network.metadata["mean"] == [
        0.4,
        0.5,
        0.6,
    ]


def test_a_static_network_uses_all_its_layers(params: dict, tmp_path: pathlib.Path) -> None:
    static = _MODEL.clone(halting=None)
    export.write(tmp_path / "network.avit", params, static, **_COLORS)
    logits, depth = serving.load(tmp_path / "network.avit")(_IMAGES)
    np.testing.assert_allclose(logits, _expected(params, _IMAGES, static)[0], atol=1e-5)
    assert depth.shape == (9, 3, 2) and (np.asarray(depth) == 4).all()


def test_the_file_does_not_need_cudnn(params: dict, tmp_path: pathlib.Path) -> None:
    model = _MODEL.clone(dtype=jnp.bfloat16, fused_attention=True)
    export.write(tmp_path / "network.avit", params, model, batch=2, **_COLORS)
    with zipfile.ZipFile(tmp_path / "network.avit") as archive:
        assert (
            b"__cudnn"
            not in jax.export.deserialize(bytearray(archive.read("program"))).mlir_module().encode()
        )


def test_it_is_lowered_for_all_platforms(file: pathlib.Path) -> None:
    with zipfile.ZipFile(file) as archive:
        program = jax.export.deserialize(bytearray(archive.read("program")))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}


def _changed(file: pathlib.Path, target: pathlib.Path, **parts: bytes | None) -> pathlib.Path:
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            data = parts.get(name.split(".")[0], before.read(name))
            if data is not None:
                after.writestr(name, data)
    return target


def _npz(save: Callable[..., None], **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "flipped",
        "page",
        "other zip",
        "other version",
        "program",
        "no weights",
        "objects",
        "other platform",
    ]
    + ["other weights", "bomb", "bomb inside", "calls", "other program", "string"],
)
def test_bad_files_are_refused_in_one_sentence(
    file: pathlib.Path, tmp_path: pathlib.Path, kind: str, params: dict
) -> None:
    bad, data = tmp_path / "bad.avit", bytearray(file.read_bytes())
    if kind == "truncated":
        bad.write_bytes(data[:-1000])
    elif kind == "flipped":
        data[len(data) // 2] ^= 1
        bad.write_bytes(data)
    elif kind == "page":
        bad.write_text("<html>")
    elif kind == "other zip":
        np.savez(bad.with_suffix(".npz"), x=np.zeros(3))
        bad = bad.with_suffix(".npz")
    elif kind == "other version":
        _changed(file, bad, metadata=json.dumps({"kind": "avit_jax network, version 7"}).encode())
    elif kind == "program":
        _changed(file, bad, program=b"\0" * 2000)
    elif kind == "no weights":
        _changed(file, bad, weights=None)
    elif kind == "objects":
        _changed(file, bad, weights=_npz(np.savez, **{"0": np.array([{}], object)}))
    elif kind == "other weights":
        _changed(file, bad, weights=_npz(np.savez, **{"0": np.zeros(3, np.float32)}))
    elif kind == "string":
        _changed(file, bad, weights=_npz(np.savez, **{str(i): np.array("x") for i in range(40)}))
    elif kind in ("calls", "other program"):
        checks = [jax.export.DisabledSafetyCheck.custom_call("a_strangers")]
        call = jax.ffi.ffi_call("a_strangers", jax.ShapeDtypeStruct((1, 3), np.float32))
        run = (lambda x: (call(x), x)) if kind == "calls" else jnp.square
        images = jax.ShapeDtypeStruct((1, 24, 16, 3), np.uint8)
        program = jax.export.export(jax.jit(run), platforms=("cpu",), disabled_checks=checks)(
            images
        )
        _changed(file, bad, program=bytes(program.serialize()), weights=_npz(np.savez))
    elif kind == "bomb inside":
        _changed(file, bad, weights=_npz(np.savez_compressed, **{"0": np.zeros(10**6)}))
    elif kind == "bomb":
        with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("metadata.json", " " * 10**6)
    elif kind == "other platform":
        export.write(bad, params, _MODEL, platforms=("tpu",), **_COLORS)
    with pytest.raises(serving.BadArtifact) as refused:
        serving.load(bad)
    assert "\n" not in str(refused.value) and str(bad) in str(refused.value)
    expected = {
        "calls": "calls functions that no exported network needs: a_strangers",
        "bomb": "compressed",
        "other weights": "its weights",
    }
    assert expected.get(kind, "") in str(refused.value)


def test_weights_of_any_size_and_numpys_dtypes(
    params: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # the layout of archives above 2 GiB
        export.write(tmp_path / "network.avit", params, _MODEL, **_COLORS)
    serving.load(tmp_path / "network.avit")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    with pytest.raises(ValueError, match="NumPy's"):
        export.write(tmp_path / "half.avit", half, _MODEL, **_COLORS)


def test_a_run_is_exported(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(**{"train.steps": 2})
    fakes.real_run(config, tmp_path / "run")
    export.from_checkpoint(tmp_path / "network.avit", config, tmp_path / "run")
    export.from_checkpoint(tmp_path / "weights.safetensors", config, tmp_path / "run")
    with pytest.raises(errors.UserError, match=r"must be name\.avit .*weights\.pth"):
        export.from_checkpoint(tmp_path / "weights.pth", config, tmp_path / "run")
    network = serving.load(tmp_path / "network.avit")
    assert network.metadata["label_names"] == [str(i) for i in range(10)]
    assert network.metadata["sigmoid"] is False and network.metadata["value_range"] == []
    metadata = _metadata(tmp_path / "network.avit")
    assert metadata["crop_ratio"] == config.data.crop_ratio > 0
    del metadata["sigmoid"], metadata["value_range"], metadata["crop_ratio"]  # as in older files
    _changed(
        tmp_path / "network.avit", tmp_path / "old.avit", metadata=json.dumps(metadata).encode()
    )
    assert "sigmoid" not in serving.load(tmp_path / "old.avit").metadata
    config.loss.sigmoid, config.data.range = True, (0.0, 4095.0)
    export.from_checkpoint(tmp_path / "more.avit", config, tmp_path / "run")
    metadata = serving.load(tmp_path / "more.avit").metadata
    assert metadata["sigmoid"] is True and metadata["value_range"] == [0, 4095]
    model, params = (
        build.model(config),
        fixtures.restored_state(config, tmp_path / "run").ema_params,
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    expected = model.apply(
        {"params": params}, augment.normalize(images, config.data.mean, config.data.std)
    )[0]
    np.testing.assert_allclose(network(images)[0], expected, atol=1e-5)
    loaded = weight_files.load(tmp_path / "weights.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def _metadata(file: pathlib.Path) -> dict:
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("metadata.json"))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("image_size", [None, 24, [16, 24], [24.0, 16.0], "24"]),
        ("channels", [None, 1, True, "3", [3]]),
        ("batch", [None, 4, False, "any"]),
        ("num_classes", [None, 4, 5.0, [5]]),
        ("label_names", [None, ["a"], [1, 2, 3, 4, 5], "abcde", {}]),
        ("mean", [None, [0.5, 0.5], ["a", "b", "c"], [0.5, 0.5, float("nan")], 0.5]),
        ("std", [None, [0.0, 1.0, 1.0], [0.5, float("inf"), 0.5], [True, True, True], {}]),
        ("halting", [[], "yes", 3]),
        ("sigmoid", [None, 1, "yes"]),
        ("value_range", [None, [1], ["a", "b"], [0, float("inf")]]),
        ("crop_ratio", [None, 1.5, -1, "0.9", True]),
    ],
)
def test_metadata_that_contradicts_the_program(
    file: pathlib.Path, tmp_path: pathlib.Path, key: str, values: list
) -> None:
    whole = _metadata(file)
    without = {name: value for name, value in whole.items() if name != key}
    older_lack = ("sigmoid", "value_range", "crop_ratio")
    lacking = [] if key in older_lack else [without]
    for metadata in (*lacking, *(whole | {key: value} for value in values)):
        _changed(file, tmp_path / "bad.avit", metadata=json.dumps(metadata).encode())
        with pytest.raises(
            serving.BadArtifact, match=f"its metadata does not fit its program: {key}"
        ):
            serving.load(tmp_path / "bad.avit")


@pytest.mark.parametrize(
    "metadata", [b"[]", b"3", b"null", b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff"]
)
def test_metadata_that_is_none(file: pathlib.Path, tmp_path: pathlib.Path, metadata: bytes) -> None:
    _changed(file, tmp_path / "bad.avit", metadata=metadata)
    with pytest.raises(serving.BadArtifact, match="is no exported network, or damaged"):
        serving.load(tmp_path / "bad.avit")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(
    file: pathlib.Path, tmp_path: pathlib.Path, params: dict, value: float
) -> None:
    arrays = [np.array(x) for x in jax.tree.leaves(params)]
    arrays[3].flat[-1] = value
    _changed(
        file,
        tmp_path / "bad.avit",
        weights=_npz(np.savez, **{str(i): x for i, x in enumerate(arrays)}),
    )
    with pytest.raises(serving.BadArtifact, match="its weights hold NaN or infinity"):
        serving.load(tmp_path / "bad.avit")


def _one_weight(weights: list, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return weights[0][None, :] + images[:, 0, 0, :1], images[:, :3, :2, 0].astype(jnp.int32)


_OTHERS: dict[str, Callable] = {
    "one output": lambda weights, images: _one_weight(weights, images)[0],
    "a dict": lambda weights, images: dict(zip("ab", _one_weight(weights, images), strict=True)),
    "depths as floats": lambda weights, images: (
        _one_weight(weights, images)[0],
        images[:, :3, :2, 0].astype(jnp.float32),
    ),
    "logits as integers": lambda weights, images: (
        images[:, 0, 0, :1] + jnp.zeros((1, 5), jnp.uint8),
        images[..., 0] + 0,
    ),
    "no batch": lambda weights, images: tuple(x[0] for x in _one_weight(weights, images)),
    "another batch": lambda weights, images: tuple(x[:1] for x in _one_weight(weights, images)),
}


@pytest.mark.parametrize("name", [*_OTHERS, "swapped arguments", "another body", "good"])
def test_programs_that_would_fail_at_the_call(
    file: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    run = _OTHERS.get(name, _one_weight)
    weights, images = (
        [jax.ShapeDtypeStruct((5,), np.float32)],
        jax.ShapeDtypeStruct((4, 24, 16, 3), np.uint8),
    )
    with jax.numpy_dtype_promotion("standard"):
        if name == "swapped arguments":
            program = jax.export.export(
                jax.jit(lambda x, y, images: run([x], images)), platforms=("cpu",)
            )(*weights * 2, images)
        else:
            program = jax.export.export(jax.jit(run), platforms=("cpu",))(weights, images)
        if name == "another body":
            other = jax.export.export(jax.jit(lambda x: (x, x)), platforms=("cpu",))(images)
            program = dataclasses.replace(
                program, mlir_module_serialized=other.mlir_module_serialized
            )
    arrays = {str(i): np.zeros(5, np.float32) for i in range(1 + (name == "swapped arguments"))}
    metadata = json.dumps(_metadata(file) | {"batch": 4}).encode()
    path = _changed(
        file,
        tmp_path / "other.avit",
        program=bytes(program.serialize()),
        weights=_npz(np.savez, **arrays),
        metadata=metadata,
    )
    if name == "good":
        assert serving.load(path)(np.zeros((4, 24, 16, 3), np.uint8))[0].shape == (4, 5)
        return
    with pytest.raises(
        serving.BadArtifact,
        match="does not run" if name == "another body" else "does not map images",
    ):
        serving.load(path)
