"""Weight files of others, and ours for others: reading, fitting to a model, writing. PyTorch is not needed.

Read are timm's and DeiT's `.pth` and `.safetensors`, Hugging Face's `model.safetensors` with its `config.json`, `.pth` of the
released A-ViT, and `.npz` of big_vision and AugReg. A file is a stranger's: nothing of it is run, and it is taken whole or not.
"""

import dataclasses
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

from avit_jax import errors, halting, torch_files, vit, weights

_logger = logging.getLogger(__name__)
Tensors = dict[str, np.ndarray]

# Inside a layer: Hugging Face's name -> timm's; query, key and value are joined.
_HUGGING_FACE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HUGGING_FACE_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a file holds.

    Attributes:
      tensors: by timm's names, in PyTorch's layouts.
      norm_eps: epsilon of the layer norms, where the file's company tells; else None.
      gate: gamma, beta and so on of the halting gate, where the file or its name tells; else None.
    """

    tensors: Tensors
    norm_eps: float | None = None
    gate: dict[str, float] | None = None


def read(path: pathlib.Path) -> WeightFile:
    """Reads a weight file of any of the kinds above.

    Raises:
      errors.UserError: it cannot be read, asks for more than numbers, or holds no vision transformer.
    """
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
            return WeightFile(tensors=_from_big_vision(tensors))
        if any(".encoder.layer." in f".{name}" for name in tensors):
            return WeightFile(tensors=_from_hugging_face(tensors), norm_eps=_hugging_face_eps(path))
    except (KeyError, ValueError, IndexError) as error:
        raise errors.UserError(f"{path} holds no whole vision transformer: {errors.first_line(error)}.") from error
    return WeightFile(tensors=tensors, gate=_gate(path, metadata))


def _read_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    import safetensors.flax

    with safetensors.safe_open(path, framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_torch(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    return torch_files.read(path), {}


def _read_npz(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise torch_files.Refused("its archive is compressed, and may be of any size")
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
            return dataclasses.asdict(halting.HaltingConfig(**json.loads(metadata["halting"])))
        except (TypeError, ValueError) as error:
            raise errors.UserError(f"{path} is refused: its gate makes no sense ({errors.first_line(error)}).") from error
    by_name = re.fullmatch(r"(?:tiny|small|base)-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", path.stem)
    if by_name is None:
        return None
    gamma, beta = float(by_name[1]), -float(by_name[2])
    _logger.warning("%s: the gate is taken from the file's name, gamma %g and beta %g", path, gamma, beta)
    return {"gamma": gamma, "beta": beta}


def _hugging_face_eps(path: pathlib.Path) -> float:
    config = path.with_name("config.json")
    if not config.exists():
        raise errors.UserError(f"{config} is missing: it tells the epsilon of the layer norms of {path}.")
    try:
        eps = float(json.loads(config.read_text())["layer_norm_eps"])
    except (KeyError, TypeError, ValueError) as error:
        raise errors.UserError(f"{config} does not tell a layer_norm_eps ({errors.first_line(error)}).") from error
    if not 0 < eps < 1:
        raise errors.UserError(f"{config} tells a layer_norm_eps of {eps}, which makes no sense.")
    return eps


def _from_hugging_face(tensors: Tensors) -> Tensors:
    """Timm's names for Hugging Face's; what is not known keeps its name, and is told when it does not fit."""
    ours: Tensors = {}
    qkv: dict[str, dict[str, np.ndarray]] = {}
    for full_name, array in tensors.items():
        name = re.sub(r"^(vit|deit)\.", "", full_name)
        if name.startswith("pooler."):  # of a model without a head
            continue
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            index, module, kind = layer.groups()
            part = re.fullmatch(r"attention\.attention\.(query|key|value)", module)
            if part:
                qkv.setdefault(f"blocks.{index}.attn.qkv.{kind}", {})[part[1]] = array
            else:
                ours[f"blocks.{index}.{_HUGGING_FACE.get(module, module)}.{kind}"] = array
            continue
        module, _, kind = name.rpartition(".")
        if name in _HUGGING_FACE_OUTSIDE:
            ours[_HUGGING_FACE_OUTSIDE[name]] = array
        else:
            ours[f"{_HUGGING_FACE_OUTSIDE.get(module, module)}.{kind}"] = array
    return ours | {name: np.concatenate([parts[key] for key in ("query", "key", "value")]) for name, parts in qkv.items()}


def _to_hugging_face(tensors: Tensors) -> Tensors:
    distilled = "dist_token" in tensors
    layer_names = {ours: theirs for theirs, ours in _HUGGING_FACE.items()}
    outside = {ours: theirs for theirs, ours in _HUGGING_FACE_OUTSIDE.items() if distilled or theirs != "cls_classifier"}
    if not distilled:
        outside["head"] = "classifier"
    prefix, theirs = "deit." if distilled else "vit.", {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if name in outside:
            theirs[prefix + outside[name]] = array
        elif module.startswith("blocks."):
            _, index, inner = module.split(".", 2)
            start = f"{prefix}encoder.layer.{index}."
            if inner == "attn.qkv":
                for key, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                    theirs[f"{start}attention.attention.{key}.{kind}"] = part
            else:
                theirs[f"{start}{layer_names[inner]}.{kind}"] = array
        else:
            there = outside[module]
            theirs[("" if "classifier" in there else prefix) + f"{there}.{kind}"] = array
    return theirs


def _from_big_vision(tensors: Tensors) -> Tensors:
    """Timm's names and layouts for those of big_vision and AugReg."""
    ours: Tensors = {"cls_token": tensors["cls"], "pos_embed": tensors["Transformer/posembed_input/pos_embedding"]}
    ours["patch_embed.proj.weight"] = tensors["embedding/kernel"].transpose(3, 2, 0, 1)
    ours["patch_embed.proj.bias"] = tensors["embedding/bias"]
    ours["head.weight"], ours["head.bias"] = tensors["head/kernel"].T, tensors["head/bias"]

    def norm(there: str, here: str) -> None:
        ours[f"{here}.weight"], ours[f"{here}.bias"] = tensors[f"{there}/scale"], tensors[f"{there}/bias"]

    def dense(there: str, here: str) -> None:
        ours[f"{here}.weight"], ours[f"{here}.bias"] = tensors[f"{there}/kernel"].T, tensors[f"{there}/bias"]

    norm("Transformer/encoder_norm", "norm")
    depth = len({name.split("/")[1] for name in tensors if name.startswith("Transformer/encoderblock_")})
    for i in range(depth):
        there, here = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norm(f"{there}/LayerNorm_0", f"{here}.norm1")
        norm(f"{there}/LayerNorm_2", f"{here}.norm2")
        dense(f"{there}/MlpBlock_3/Dense_0", f"{here}.mlp.fc1")
        dense(f"{there}/MlpBlock_3/Dense_1", f"{here}.mlp.fc2")
        attention = f"{there}/MultiHeadDotProductAttention_1"
        width = tensors[f"{attention}/out/bias"].shape[0]
        parts = [f"{attention}/{key}" for key in ("query", "key", "value")]
        ours[f"{here}.attn.qkv.weight"] = np.concatenate([tensors[f"{part}/kernel"].reshape(width, width).T for part in parts])
        ours[f"{here}.attn.qkv.bias"] = np.concatenate([tensors[f"{part}/bias"].reshape(width) for part in parts])
        ours[f"{here}.attn.proj.weight"] = tensors[f"{attention}/out/kernel"].reshape(width, width).T
        ours[f"{here}.attn.proj.bias"] = tensors[f"{attention}/out/bias"]
    return ours


def load(path: epath.PathLike, model: vit.AViT, *, new_head: bool = False) -> dict[str, Any]:
    """Parameters of a model from a weight file, see `read` and `fit`; where the file tells another gate, a warning says so.

    Raises:
      errors.UserError: it cannot be read, or does not fit; also where its layer norms have another epsilon.
    """
    file = read(pathlib.Path(path))
    if file.norm_eps is not None and file.norm_eps != model.norm_eps:
        raise errors.UserError(
            f"the layer norms of {path} have an epsilon of {file.norm_eps}: set --config.model.norm_eps={file.norm_eps}."
        )
    if file.gate and model.halting and any(getattr(model.halting, key) != value for key, value in file.gate.items()):
        _logger.warning("%s was trained with another gate, %s, than config.halting tells", path, file.gate)
    return fit(file.tensors, model, new_head=new_head)


def fit(tensors: Mapping[str, np.ndarray], model: vit.AViT, *, new_head: bool = False) -> dict[str, Any]:
    """Parameters of a model from the tensors of a file; position embeddings are resized where the image size differs.

    Args:
      tensors: by timm's names.
      model: which they have to fit.
      new_head: the classifiers are left out, and begin at zero, where the number of classes differs.

    Returns:
      Tree for `model.apply({"params": tree}, images)`, float32.

    Raises:
      errors.UserError: tensors are missing, surplus, or of another shape; all are named.
    """
    tensors = dict(tensors)
    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    gate = shapes.get("halting")  # its own parameters, where it learns, are in no file
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    patch_shape = (model.patch_size, model.patch_size, model.channels)
    expected = weights.to_torch(zeros, patch_shape=patch_shape)
    heads = [name for name in expected if name.startswith("head")]
    if new_head and any(name in tensors and tensors[name].shape != expected[name].shape for name in heads):
        tensors |= {name: expected[name] for name in heads}
    here, there = expected["pos_embed"].shape, np.shape(tensors.get("pos_embed"))
    if len(there) == 3 and there[::2] == here[::2] and there != here and tensors.keys() == expected.keys():
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], model.grid, model.num_readout)
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
    return params if gate is None else params | {"halting": gate}


def resize_positions(embedding: np.ndarray, grid: tuple[int, int], num_readout: int) -> np.ndarray:
    """Position embeddings for another number of patches, bicubic, as PyTorch's `interpolate` with align_corners=False.

    Args:
      embedding: `(1, R + n * n, D)` of a square picture.
      grid: rows and columns of patches that are wanted.
      num_readout: R, of tokens that are no patches and keep theirs.

    Returns:
      `(1, R + rows * columns, D)` float32.
    """
    head, patches = embedding[0, :num_readout], embedding[0, num_readout:]
    side = math.isqrt(len(patches))
    if side * side != len(patches):
        raise errors.UserError(f"position embeddings of {len(patches)} patches are not of a square: they cannot be resized.")
    rows, columns = (_bicubic(side, size) for size in grid)
    patches = np.einsum("ri,cj,ijd->rcd", rows, columns, patches.reshape(side, side, -1).astype(np.float64))
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


def write(path: pathlib.Path, params: Mapping[str, Any], model: vit.AViT, *, names: str = "timm") -> None:
    """Writes safetensors in the names of "timm" or "huggingface"; the gate is in the metadata.

    The gate's own parameters, where it learns, have to be folded into gamma and beta by the caller.
    """
    import safetensors.numpy

    patch_shape = (model.patch_size, model.patch_size, model.channels)
    tensors = weights.to_torch(jax.device_get(params), patch_shape=patch_shape)
    if names == "huggingface":
        tensors = _to_hugging_face(tensors)
    metadata = {"format": "pt"}
    if model.halting is not None:
        metadata["halting"] = json.dumps(dataclasses.asdict(model.halting))
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)
