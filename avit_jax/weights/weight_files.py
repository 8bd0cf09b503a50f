"""Weight files of others, and ours for others: reading, fitting to a model, writing. PyTorch is not
needed.

Read are timm's and DeiT's `.pth` and `.safetensors`, Hugging Face's `model.safetensors` with its
`config.json`, `.pth` of the released A-ViT, and `.npz` of big_vision and AugReg. A file is a
stranger's: nothing of it is run, and it is taken whole or not.
"""

import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.utils import errors, files
from avit_jax.weights import name_maps, tensor_files, weight_config
from avit_jax.weights.positions import fit_positions

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
      grid: rows and columns of patches that the position embeddings are of, where the file or its
        company tells; else None.
    """

    tensors: name_maps.Tensors
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
    """Reads a weight file of any of the kinds above; `hf-hub:owner/name` is fetched from the
    Hugging Face hub.

    Of a folder of Hugging Face or timm, its `model.safetensors` is read.

    Raises:
      errors.UserError: it cannot be read, asks for more than numbers, holds no vision transformer,
        or contradicts the `config.json` beside it.
    """
    path = tensor_files.find(path)
    tensors, metadata = tensor_files.read(path)
    sizes: dict[str, Any] = {}
    try:
        if any(name.startswith("Transformer/") for name in tensors):
            tensors, sizes["num_heads"] = name_maps.from_big_vision(tensors)
        tensors, prefix = name_maps.without_prefix(tensors)
        if prefix:
            message = "%s: the prefix %s of its tensors' names is left out"
            _logger.warning(message, errors.printable(str(path)), errors.printable(prefix))
        is_hugging_face = name_maps.is_hugging_face(tensors)
        if is_hugging_face:
            tensors = name_maps.from_hugging_face(tensors)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise errors.UserError(
            f"{path} holds no whole vision transformer: {errors.first_line(error)}."
        ) from error
    for told in (
        _told_by_metadata(path, metadata),
        weight_config.check(path, tensors, required=is_hugging_face),
    ):
        for key, value in told.items():
            if sizes.setdefault(key, value) != value:
                raise errors.UserError(
                    f"{path} and what is beside it contradict: a {key} of {sizes[key]}, and of "
                    f"{value}."
                )
    depth = len([name for name in tensors if name.endswith("attn.qkv.weight")])
    if sizes.pop("no_embed_class", False):
        tensors = _with_class_positions(tensors)
    return WeightFile(tensors=tensors, gate=_gate(path, metadata, depth), **_sane(path, sizes))


def _with_class_positions(tensors: name_maps.Tensors) -> name_maps.Tensors:
    """Adds position embeddings of zero for the class token, as it has none with timm's
    no_embed_class.
    """
    patches = tensors.get("pos_embed", np.zeros(0))
    if patches.ndim != 3:
        return tensors
    zeros = np.zeros_like(
        patches, shape=(len(patches), 2 if "dist_token" in tensors else 1, patches.shape[2])
    )
    return tensors | {"pos_embed": np.concatenate([zeros, patches], axis=1)}


def _told_by_metadata(path: pathlib.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The sizes in our metadata."""
    try:
        sizes: dict[str, Any] = {
            name: kind(metadata[name]) for name, kind in _SIZES.items() if name in metadata
        }
        if "grid" in metadata:
            sizes["grid"] = tuple(int(side) for side in metadata["grid"].split("x"))
    except (ValueError, OverflowError) as error:
        raise errors.UserError(
            f"{path} is refused: its metadata makes no sense "
            f"({errors.printable(errors.first_line(error))})."
        ) from error
    return sizes


def _sane(path: pathlib.Path, sizes: dict[str, Any]) -> dict[str, Any]:
    grid = sizes.get("grid", (1, 1))
    if not (
        0 < sizes.get("norm_eps", 0.5) < 1
        and sizes.get("num_heads", 1) > 0
        and len(grid) == 2
        and min(grid) > 0
    ):
        raise errors.UserError(f"{path} tells {sizes}, which makes no sense.")
    return sizes


def _gate(path: pathlib.Path, metadata: Mapping[str, str], depth: int) -> dict[str, float] | None:
    """The gate from our metadata, or from the name the released A-ViT gives its files, such as
    tiny-10-30.pth.
    """
    by_name = re.fullmatch(r"(?:tiny|small|base)-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", path.stem)
    if "halting" not in metadata and by_name is None:
        return None
    try:
        if "halting" in metadata:
            gate = halting.HaltingConfig(**json.loads(metadata["halting"]))
            if [type(value) for value in (gate.channel, gate.learnable, gate.merge)] != [
                int,
                bool,
                bool,
            ]:
                raise ValueError(
                    f"channel {gate.channel}, learnable {gate.learnable}, merge {gate.merge}"
                )
            told = _told(gate)
            told |= {
                key: float(told[key])
                for key in ("gamma", "beta", "epsilon", "redundancy")
                if key in told
            }
        else:
            told = {"gamma": float(by_name[1]), "beta": -float(by_name[2])}
            gate = halting.HaltingConfig(**told)
            message = "%s: the gate is taken from the file's name, gamma %g and beta %g"
            _logger.warning(message, errors.printable(str(path)), gate.gamma, gate.beta)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise errors.UserError(
            f"{path} is refused: its gate makes no sense "
            f"({errors.printable(errors.first_line(error))})."
        ) from error
    sizes = {key: getattr(gate, key) for key in ("gamma", "beta", "epsilon", "redundancy")}
    useless = halting.explain_useless_gate(**sizes, num_layers=depth)
    if useless:
        _logger.warning("%s: %s", errors.printable(str(path)), useless)
    return told


def _told(gate: halting.HaltingConfig) -> dict[str, Any]:
    """The gate as files tell it; those of networks that do not merge are as they were before any
    did.
    """
    told = dataclasses.asdict(gate)
    return (
        told
        if gate.merge
        else {key: value for key, value in told.items() if key not in ("merge", "redundancy")}
    )


def load(path: epath.PathLike, model: vit.AViT, *, grid: Sequence[int] = ()) -> dict[str, Any]:
    """Parameters of a model from a weight file, see `read` and `adopt`."""
    return adopt(read(path), model, name=str(path), grid=grid)


def adopt(
    file: WeightFile,
    model: vit.AViT,
    *,
    name: str,
    new_head: bool = False,
    grid: Sequence[int] = (),
) -> dict[str, Any]:
    """Parameters of a model from what a file holds, see `fit`; its gate too if it learns, else a
    warning tells of another.

    Args:
      file: from `read`.
      model: which it has to fit.
      name: of the file, for messages.
      new_head: as in `fit`.
      grid: rows and columns of patches that the file's position embeddings are of, if the file does
        not tell.

    Raises:
      errors.UserError: it does not fit, or has another number of heads, epsilon of the layer norms,
        or grid.
      ValueError: the grid is not two numbers.
    """
    if len(grid) not in (0, 2):
        raise ValueError(f"grid must be the rows and columns of patches, or empty; got {grid}.")
    grid = tuple(grid) or file.grid
    if file.grid not in (None, grid):
        raise errors.UserError(
            f"{name} tells a grid of {file.grid}, and config.init_grid is {grid}: leave it out."
        )
    for key, value in (("norm_eps", file.norm_eps), ("num_heads", file.num_heads)):
        if value is not None and value != getattr(model, key):
            raise errors.UserError(
                f"{name} has a {key} of {value}: set --config.model.{key}={value}."
            )
    params = fit(file.tensors, model, new_head=new_head, grid=grid, name=name)
    if file.gate and model.halting:
        gate = dataclasses.replace(
            halting.HaltingConfig(**file.gate), learnable=model.halting.learnable
        )
        if "gate" in params:  # as far as it has been learnt it is a parameter as others are
            params["gate"] = {name: np.float32(getattr(gate, name)) for name in params["gate"]}
            gate = dataclasses.replace(gate, gamma=model.halting.gamma, beta=model.halting.beta)
        if gate != model.halting:
            _logger.warning(
                "%s was trained with another gate, %s, than config.halting tells", name, file.gate
            )
    return params


def infer(
    file: WeightFile, *, image_size: tuple[int, int], name: str
) -> tuple[vit.AViT, dict[str, Any]]:
    """The model that the tensors of a file are of, and its parameters, for images of the given
    size.

    The number of heads is not in the tensors: where the file does not tell, it is that of heads of
    64 channels, as all usual vision transformers have them.

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
        raise errors.UserError(
            f"{name} holds no vision transformer that can be run: {errors.first_line(error)}"
        ) from error
    return model, adopt(file, model, name=name)


def fit(
    tensors: Mapping[str, np.ndarray],
    model: vit.AViT,
    *,
    new_head: bool = False,
    grid: tuple[int, int] | None = None,
    name: str = "the file",
) -> dict[str, Any]:
    """Parameters of a model from the tensors of a file; position embeddings of another grid are
    resized.

    Args:
      tensors: by timm's names.
      model: which they have to fit.
      new_head: the classifiers begin at zero where the number of classes differs, or there are
        none.
      grid: as in `WeightFile`.
      name: of the file, for messages.

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
    expected = name_maps.to_torch(zeros, patch_shape=patch_shape)
    heads = [name for name in expected if name.startswith("head")]
    if new_head and any(np.shape(tensors.get(name)) != expected[name].shape for name in heads):
        tensors |= {name: expected[name] for name in heads}
    here, there = expected["pos_embed"].shape, np.shape(tensors.get("pos_embed"))
    if len(there) == 3 and there[::2] == here[::2] and tensors.keys() == expected.keys():
        positions = fit_positions(
            tensors["pos_embed"], model.grid, model.num_prefix_tokens, before=grid, name=name
        )
        tensors["pos_embed"] = positions
    wrong = [
        f"{name} is missing"
        if name not in tensors
        else f"{name} is {tensors[name].shape} and not {array.shape}"
        for name, array in expected.items()
        if np.shape(tensors.get(name)) != array.shape or name not in tensors
    ] + [f"{name} is surplus" for name in sorted(tensors.keys() - expected.keys())]
    if wrong:
        rest = f", and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise errors.UserError(
            f"the weights do not fit the model: {', '.join(wrong[:12])}{rest}; set config.model "
            "to their sizes"
            + (
                "."
                if new_head
                else ", or --config.init_new_head=True where only the classes differ."
            )
        )
    params = name_maps.from_torch(
        {name: np.asarray(tensors[name], np.float32) for name in expected}
    )
    if "gate" in shapes:  # no tensor of a file
        params["gate"] = {name: np.float32(getattr(model.halting, name)) for name in shapes["gate"]}
    return params


def write(
    path: epath.PathLike, params: Mapping[str, Any], model: vit.AViT, *, names: str = "timm"
) -> None:
    """Writes safetensors; the gate, as it has been learnt, and what the tensors do not tell are in
    the metadata.

    Args:
      path: of the file.
      params: of the model.
      model: for its sizes.
      names: "timm", or "huggingface", which gets a `config.json` beside the file.

    Raises:
      ValueError: other names, or a path that does not end in .safetensors.
    """
    import safetensors.numpy

    if not str(path).lower().endswith(".safetensors"):
        raise ValueError(
            "weights are written as safetensors: the name of the file must end in .safetensors; "
            f"got {path}."
        )
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
        tensors = name_maps.to_hugging_face(tensors)
        files.write(
            path.with_name("config.json"),
            json.dumps(weight_config.of_model(model), indent=2) + "\n",
        )
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    files.write(path, safetensors.numpy.save(contiguous, metadata))


def to_file(params: Mapping[str, Any], model: vit.AViT) -> WeightFile:
    """What a file of these parameters holds; a gate that learns is fixed where it is."""
    params = jax.device_get(params)
    gate = None
    if model.halting is not None:
        # In as many digits as float32 needs: whoever types them gets the same gate.
        learnt = {
            name: float(str(np.float32(value))) for name, value in params.get("gate", {}).items()
        }
        gate = _told(model.halting) | learnt | {"learnable": False}
    tensors = name_maps.to_torch(
        params, patch_shape=(model.patch_size, model.patch_size, model.channels)
    )
    return WeightFile(
        tensors=tensors,
        norm_eps=model.norm_eps,
        num_heads=model.num_heads,
        gate=gate,
        grid=model.grid,
    )
