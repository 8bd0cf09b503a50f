"""Weight files of others, and ours for others: reading, fitting to a model, writing. PyTorch is not needed.

Read are timm's and DeiT's `.pth` and `.safetensors`, Hugging Face's `model.safetensors` with its `config.json`, `.pth` of the
released A-ViT, and `.npz` of big_vision and AugReg. A file is a stranger's: nothing of it is run, and it is taken whole or not.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from avit_jax import errors, files, halting, torch_files, vit, weights

HUB = "hf-hub:"
_logger = logging.getLogger(__name__)


_SIZES = {"norm_eps": float, "num_heads": int}  # what our metadata tells beside the tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a file holds.

    Attributes:
      tensors: by timm's names, in PyTorch's layouts.
      norm_eps: epsilon of the layer norms, where the file or its company tells; else None.
      num_heads: of the attention, likewise.
      gate: gamma, beta and so on of the halting gate, where the file or its name tells; else None.
      grid: rows and columns of patches that the position embeddings are of, where the file tells; else None: a square.
    """

    tensors: weights.Tensors
    norm_eps: float | None = None
    num_heads: int | None = None
    gate: dict[str, float] | None = None
    grid: tuple[int, int] | None = None


def fingerprint(file: WeightFile) -> str:
    """SHA-256 of all that a file holds."""
    grid = [file.grid] if file.grid and file.grid[0] != file.grid[1] else []
    digest = hashlib.sha256(json.dumps([file.norm_eps, file.num_heads, file.gate, *grid]).encode())
    for name, array in sorted(file.tensors.items()):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read(path: epath.PathLike) -> WeightFile:
    """Reads a weight file of any of the kinds above; `hf-hub:owner/name` is fetched from the Hugging Face hub.

    Raises:
      errors.UserError: it cannot be read, asks for more than numbers, or holds no vision transformer.
    """
    path = _from_hub(str(path).removeprefix(HUB)) if str(path).startswith(HUB) else pathlib.Path(path)
    if not path.exists():
        raise errors.UserError(f"there is no {path}: name a weight file, or the workdir of a run.")
    readers = dict.fromkeys((".pth", ".pt", ".bin"), _read_torch) | {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise errors.UserError(f"{path} is no weight file by its name: they end in {', '.join(readers)}.")
    try:
        tensors, metadata = readers[path.suffix](path)
    except torch_files.Refused as error:
        raise errors.UserError(f"{path} is refused: {error}.") from error
    except Exception as error:
        raise errors.UserError(f"{path} cannot be read: {errors.first_line(error)}.") from error
    for name, array in tensors.items():
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise errors.UserError(f"{path} is refused: {name} is of dtype {array.dtype}, not of floating-point numbers.")
        if not np.isfinite(array.astype(np.float32)).all():
            raise errors.UserError(f"{path} is refused: {name} holds nan or infinity.")
    try:
        if any(name.startswith("Transformer/") for name in tensors):
            heads = tensors["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape[1]
            return WeightFile(tensors=weights.from_big_vision(tensors), num_heads=heads)
        if any(".encoder.layer." in f".{name}" for name in tensors):
            sizes = _hugging_face_sizes(path)
            return WeightFile(tensors=weights.from_hugging_face(tensors), gate=_gate(path, metadata), **sizes)
    except (KeyError, ValueError, IndexError) as error:
        raise errors.UserError(f"{path} holds no whole vision transformer: {errors.first_line(error)}.") from error
    try:
        sizes: dict[str, Any] = {name: kind(metadata[name]) for name, kind in _SIZES.items() if name in metadata}
        if "grid" in metadata:
            sizes["grid"] = tuple(int(side) for side in metadata["grid"].split("x"))
    except (ValueError, OverflowError) as error:
        raise errors.UserError(f"{path} is refused: its metadata makes no sense ({errors.first_line(error)}).") from error
    return WeightFile(tensors=tensors, gate=_gate(path, metadata), **_sane(path, sizes))


def _sane(path: pathlib.Path, sizes: dict[str, Any]) -> dict[str, Any]:
    grid = sizes.get("grid", (1, 1))
    if not (0 < sizes.get("norm_eps", 0.5) < 1 and sizes.get("num_heads", 1) > 0 and len(grid) == 2 and min(grid) > 0):
        raise errors.UserError(f"{path} tells {sizes}, which makes no sense.")
    return sizes


def _from_hub(name: str) -> pathlib.Path:
    """The weights of a model on the hub, in its local cache, with `config.json` beside them where there is one."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError
    except ImportError as error:
        raise errors.UserError(f"{HUB}{name} has to be fetched: pip install huggingface_hub, or name a file.") from error
    try:
        with contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "config.json")
        return pathlib.Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # no such model, no safetensors, no network
        raise errors.UserError(f"{HUB}{name} cannot be fetched ({errors.first_line(error)}): name a file instead.") from error


def _read_safetensors(path: pathlib.Path) -> tuple[weights.Tensors, dict[str, str]]:
    import safetensors.flax

    with safetensors.safe_open(path, framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_torch(path: pathlib.Path) -> tuple[weights.Tensors, dict[str, str]]:
    return torch_files.read(path), {}


def _read_npz(path: pathlib.Path) -> tuple[weights.Tensors, dict[str, str]]:
    with zipfile.ZipFile(path) as archive:
        torch_files.check_stored(archive)
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {name: arrays[name] for name in arrays.files}
    prefixes = {name.split("/")[0] for name in tensors}
    if prefixes == {"params"}:
        tensors = {name.removeprefix("params/"): array for name, array in tensors.items()}
    return tensors, {}


def _gate(path: pathlib.Path, metadata: Mapping[str, str]) -> dict[str, float] | None:
    """The gate from our metadata, or from the name the released A-ViT gives its files, such as tiny-10-30.pth."""
    if "halting" in metadata:
        try:
            gate = halting.HaltingConfig(**json.loads(metadata["halting"]))
            if [type(value) for value in (gate.channel, gate.learnable, gate.merge)] != [int, bool, bool]:
                raise ValueError(f"channel {gate.channel}, learnable {gate.learnable}, merge {gate.merge}")
            told = _told(gate)
            return told | {key: float(told[key]) for key in ("gamma", "beta", "epsilon", "redundancy") if key in told}
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise errors.UserError(f"{path} is refused: its gate makes no sense ({errors.first_line(error)}).") from error
    by_name = re.fullmatch(r"(?:tiny|small|base)-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", path.stem)
    if by_name is None:
        return None
    gamma, beta = float(by_name[1]), -float(by_name[2])
    _logger.warning("%s: the gate is taken from the file's name, gamma %g and beta %g", path, gamma, beta)
    return {"gamma": gamma, "beta": beta}


def _told(gate: halting.HaltingConfig) -> dict[str, Any]:
    """The gate as files tell it; those of networks that do not merge are as they were before any did."""
    told = dataclasses.asdict(gate)
    return told if gate.merge else {key: value for key, value in told.items() if key not in ("merge", "redundancy")}


def _hugging_face_sizes(path: pathlib.Path) -> dict[str, Any]:
    config = path.with_name("config.json")
    if not config.exists():
        raise errors.UserError(f"{config} is missing: it tells the epsilon of the layer norms of {path}.")
    try:
        told = json.loads(config.read_text())
        sizes = {"norm_eps": float(told["layer_norm_eps"]), "num_heads": int(told["num_attention_heads"])}
        if isinstance(told.get("image_size"), list):
            sizes["grid"] = tuple(int(side) // int(told["patch_size"]) for side in told["image_size"])
        other = [key for key, value in (("hidden_act", "gelu"), ("qkv_bias", True)) if told.get(key, value) != value]
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, AttributeError) as error:
        raise errors.UserError(
            f"{config} does not tell layer_norm_eps, num_attention_heads and the like ({errors.first_line(error)})."
        ) from error
    if other:
        raise errors.UserError(f"{config} tells of another network: its {other[0]} is {told[other[0]]}.")
    return _sane(config, sizes)


def load(path: epath.PathLike, model: vit.AViT) -> dict[str, Any]:
    """Parameters of a model from a weight file, see `read` and `adopt`."""
    return adopt(read(path), model, name=str(path))


def adopt(file: WeightFile, model: vit.AViT, *, name: str, new_head: bool = False) -> dict[str, Any]:
    """Parameters of a model from what a file holds, see `fit`; its gate too if it learns, else a warning tells of another.

    Raises:
      errors.UserError: it does not fit; also where it has another number of heads, or another epsilon in the layer norms.
    """
    for key, value in (("norm_eps", file.norm_eps), ("num_heads", file.num_heads)):
        if value is not None and value != getattr(model, key):
            raise errors.UserError(f"{name} has a {key} of {value}: set --config.model.{key}={value}.")
    params = fit(file.tensors, model, new_head=new_head, grid=file.grid)
    if file.gate and model.halting:
        gate = dataclasses.replace(halting.HaltingConfig(**file.gate), learnable=model.halting.learnable)
        if "gate" in params:  # as far as it has been learnt it is a parameter as others are
            params["gate"] = {name: np.float32(getattr(gate, name)) for name in params["gate"]}
            gate = dataclasses.replace(gate, gamma=model.halting.gamma, beta=model.halting.beta)
        if gate != model.halting:
            _logger.warning("%s was trained with another gate, %s, than config.halting tells", name, file.gate)
    return params


def infer(file: WeightFile, *, image_size: tuple[int, int], name: str) -> tuple[vit.AViT, dict[str, Any]]:
    """The model that the tensors of a file are of, and its parameters, for images of the given size.

    The number of heads is not in the tensors: where the file does not tell, it is that of heads of 64 channels, as all usual
    vision transformers have them.

    Raises:
      errors.UserError: it holds no whole vision transformer.
    """
    tensors = file.tensors
    try:
        width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        hidden = len(tensors["blocks.0.mlp.fc1.weight"])
        ratio = hidden / width
        model = vit.AViT(
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            width=width,
            depth=len([key for key in tensors if key.endswith("attn.qkv.weight")]),
            num_heads=file.num_heads or width // 64,
            mlp_ratio=ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
            num_classes=len(tensors["head.weight"]),
            distilled="dist_token" in tensors,
            norm_eps=file.norm_eps or vit.AViT.norm_eps,
            halting=halting.HaltingConfig(**file.gate) if file.gate else None,
        )
        model.check()
    except (KeyError, ValueError, TypeError) as error:
        raise errors.UserError(f"{name} holds no vision transformer that can be run: {errors.first_line(error)}") from error
    return model, adopt(file, model, name=name)


def fit(
    tensors: Mapping[str, np.ndarray], model: vit.AViT, *, new_head: bool = False, grid: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Parameters of a model from the tensors of a file; position embeddings are resized where the image size differs.

    Args:
      tensors: by timm's names.
      model: which they have to fit.
      new_head: the classifiers begin at zero where the number of classes differs, or there are none.
      grid: as in `WeightFile`.

    Returns:
      Tree for `model.apply({"params": tree}, images)`, float32.

    Raises:
      errors.UserError: tensors are missing, surplus, or of another shape; all are named.
    """
    tensors = dict(tensors)
    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    patch_shape = (model.patch_size, model.patch_size, model.channels)
    expected = weights.to_torch(zeros, patch_shape=patch_shape)
    heads = [name for name in expected if name.startswith("head")]
    if new_head and any(np.shape(tensors.get(name)) != expected[name].shape for name in heads):
        tensors |= {name: expected[name] for name in heads}
    here, there = expected["pos_embed"].shape, np.shape(tensors.get("pos_embed"))
    patches = there[1] - model.num_readout if len(there) == 3 else 0
    side = math.isqrt(max(0, patches))
    before = grid or ((side, side) if side**2 == patches else None)
    differs = there != here or before not in (None, model.grid)
    if len(there) == 3 and there[::2] == here[::2] and differs and tensors.keys() == expected.keys():
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], model.grid, model.num_readout, before=grid)
    wrong = [
        f"{name} {'is missing' if name not in tensors else f'is {tensors[name].shape} and not {array.shape}'}"
        for name, array in expected.items()
        if np.shape(tensors.get(name)) != array.shape or name not in tensors
    ] + [f"{name} is surplus" for name in sorted(tensors.keys() - expected.keys())]
    if wrong:
        rest = f", and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise errors.UserError(
            f"the weights do not fit the model: {', '.join(wrong[:12])}{rest}; set config.model to their sizes"
            + ("." if new_head else ", or --config.init_new_head=True where only the classes differ.")
        )
    params = weights.from_torch({name: np.asarray(tensors[name], np.float32) for name in expected})
    if "gate" in shapes:  # no tensor of a file
        params["gate"] = {name: np.float32(getattr(model.halting, name)) for name in shapes["gate"]}
    return params


def resize_positions(
    embedding: np.ndarray, grid: tuple[int, int], num_readout: int, *, before: tuple[int, int] | None = None
) -> np.ndarray:
    """Position embeddings for another number of patches, bicubic, as PyTorch's `interpolate` with align_corners=False.

    Args:
      embedding: `(1, R + n, D)`.
      grid: rows and columns of patches that are wanted.
      num_readout: R, of tokens that are no patches and keep theirs.
      before: rows and columns that it has; None: as many of both.

    Returns:
      `(1, R + rows * columns, D)` float32.

    Raises:
      errors.UserError: the embeddings are not of such a grid.
    """
    head, patches = embedding[0, :num_readout], embedding[0, num_readout:]
    before = before or (math.isqrt(len(patches)),) * 2
    if not len(patches) or math.prod(before) != len(patches):
        of = "a square" if before[0] == before[1] else f"{before[0]} x {before[1]}"
        raise errors.UserError(f"position embeddings of {len(patches)} patches are not of {of}: they cannot be resized.")
    rows, columns = (_bicubic(side, size) for side, size in zip(before, grid, strict=True))
    patches = np.einsum("ri,cj,ijd->rcd", rows, columns, patches.reshape(*before, -1).astype(np.float64))
    return np.concatenate([head, patches.reshape(grid[0] * grid[1], -1)])[None].astype(np.float32)


def _bicubic(size: int, new_size: int) -> np.ndarray:
    """`(new_size, size)` weights of cubic convolution with a = -0.75, the border repeated.

    Reference: Keys, Cubic convolution interpolation, 1981, equation 15.
    """
    a = -0.75
    center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(center).astype(int)
    matrix = np.zeros((new_size, size))
    for offset in range(-1, 3):
        x = abs(center - (first + offset))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(matrix, (np.arange(new_size), np.clip(first + offset, 0, size - 1)), np.where(x <= 1, near, far))
    return matrix


def write(path: epath.PathLike, params: Mapping[str, Any], model: vit.AViT, *, names: str = "timm") -> None:
    """Writes safetensors; the gate, as it has been learnt, and what the tensors do not tell are in the metadata.

    Args:
      path: of the file.
      params: of the model.
      model: for its sizes.
      names: "timm", or "huggingface", which gets a `config.json` beside the file.

    Raises:
      ValueError: other names.
    """
    import safetensors.numpy

    if names not in ("timm", "huggingface"):
        raise ValueError(f'names must be "timm" or "huggingface"; got "{names}".')
    path = epath.Path(path)
    file = to_file(params, model)
    tensors = file.tensors
    metadata = {"format": "pt", "norm_eps": str(file.norm_eps), "num_heads": str(file.num_heads)}
    metadata["grid"] = "x".join(map(str, file.grid))
    if file.gate is not None:
        metadata["halting"] = json.dumps(file.gate)
    if names == "huggingface":
        tensors = weights.to_hugging_face(tensors)
        files.write(path.with_name("config.json"), json.dumps(_hugging_face_config(model), indent=2) + "\n")
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    files.write(path, safetensors.numpy.save(contiguous, metadata))


def to_file(params: Mapping[str, Any], model: vit.AViT) -> WeightFile:
    """What a file of these parameters holds; a gate that learns is fixed where it is."""
    params = jax.device_get(params)
    gate = None
    if model.halting is not None:
        # In as many digits as float32 needs: whoever types them gets the same gate.
        learnt = {name: float(str(np.float32(value))) for name, value in params.get("gate", {}).items()}
        gate = _told(model.halting) | learnt | {"learnable": False}
    tensors = weights.to_torch(params, patch_shape=(model.patch_size, model.patch_size, model.channels))
    return WeightFile(tensors=tensors, norm_eps=model.norm_eps, num_heads=model.num_heads, gate=gate, grid=model.grid)


def _hugging_face_config(model: vit.AViT) -> dict[str, Any]:
    kind = "deit" if model.distilled else "vit"
    return {
        "architectures": ["DeiTForImageClassificationWithTeacher" if model.distilled else "ViTForImageClassification"],
        "model_type": kind,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "layer_norm_eps": model.norm_eps,
        "image_size": model.pixels[0] if len(set(model.pixels)) == 1 else list(model.pixels),
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "id2label": {str(i): str(i) for i in range(model.num_classes)},
        "label2id": {str(i): i for i in range(model.num_classes)},
    }
