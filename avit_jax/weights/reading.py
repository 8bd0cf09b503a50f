"""Reads a weight file of any supported kind: tensors, sizes and gate. See `weight_files`."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from avit_jax.core import halting
from avit_jax.utils import errors
from avit_jax.weights import big_vision, config_json, hugging_face, name_maps, tensor_files
from avit_jax.weights.name_maps import Tensors

_GATE_NUMBERS = ("gamma", "beta", "epsilon", "redundancy")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The content of a weight file. A value is None if neither the file nor its config gives it.

    Attributes:
      tensors: timm's name -> array in PyTorch's layout.
      norm_eps: epsilon of the layer norms.
      num_heads: heads of the attention.
      gate: fields of the halting gate, such as gamma and beta; see `HaltingConfig`.
      grid: (rows, columns) of patches of the position embeddings.
    """

    tensors: Tensors
    norm_eps: float | None = None
    num_heads: int | None = None
    gate: dict[str, float] | None = None
    grid: tuple[int, int] | None = None


def fingerprint(file: WeightFile) -> str:
    """Returns the SHA-256 of everything in a file."""
    grid = [file.grid] if file.grid and file.grid[0] != file.grid[1] else []
    digest = hashlib.sha256(json.dumps([file.norm_eps, file.num_heads, file.gate, *grid]).encode())
    for name, array in sorted(file.tensors.items()):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read(path: epath.PathLike) -> WeightFile:
    """Reads a weight file.

    Args:
      path: a file, a folder of Hugging Face or timm, or `hf-hub:owner/name`.

    Raises:
      errors.UserError: the file cannot be read, holds more than tensors, holds no vision
        transformer, or contradicts the `config.json` beside it.
    """
    path = tensor_files.find(path)
    tensors, metadata = tensor_files.read(path)
    sizes: dict[str, Any] = {}
    try:
        if big_vision.matches(tensors):
            tensors, sizes["num_heads"] = big_vision.to_timm(tensors)
        tensors, prefix = name_maps.without_prefix(tensors)
        if prefix:
            _warn("%s: the prefix %s of its tensors' names is left out", path, prefix)
        is_hugging_face = hugging_face.matches(tensors)
        if is_hugging_face:
            tensors = hugging_face.to_timm(tensors)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise errors.UserError(
            f"{path} holds no whole vision transformer: {errors.first_line(error)}."
        ) from error
    config = config_json.read(path, tensors, required=is_hugging_face)
    for source in (_sizes_in(path, metadata), config):
        for key, value in source.items():
            if sizes.setdefault(key, value) != value:
                raise errors.UserError(
                    f"{path} contradicts the config.json beside it: {key}={sizes[key]} and "
                    f"{key}={value}; correct one of them."
                )
    num_layers = len([name for name in tensors if name.endswith("attn.qkv.weight")])
    if sizes.pop("no_embed_class", False):
        tensors = _with_prefix_positions(tensors)
    _check_sizes(path, sizes)
    return WeightFile(tensors=tensors, gate=_read_gate(path, metadata, num_layers), **sizes)


def _with_prefix_positions(tensors: Tensors) -> Tensors:
    """Adds position embeddings of zero for the prefix tokens, which timm's no_embed_class lacks."""
    patches = tensors.get("pos_embed", np.zeros(0))
    if patches.ndim != 3:
        return tensors
    num_prefix_tokens = 2 if "dist_token" in tensors else 1
    zeros = np.zeros_like(patches, shape=(len(patches), num_prefix_tokens, patches.shape[2]))
    return tensors | {"pos_embed": np.concatenate([zeros, patches], axis=1)}


def _sizes_in(path: pathlib.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the sizes in the metadata that `writing.write` adds."""
    kinds = {"norm_eps": float, "num_heads": int, "grid": _parse_grid}
    try:
        return {key: kind(metadata[key]) for key, kind in kinds.items() if key in metadata}
    except (ValueError, OverflowError) as error:
        raise _refused(path, "metadata", error) from error


def _parse_grid(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split("x"))


def _check_sizes(path: pathlib.Path, sizes: Mapping[str, Any]) -> None:
    grid = sizes.get("grid", (1, 1))
    valid = 0 < sizes.get("norm_eps", 0.5) < 1 and sizes.get("num_heads", 1) > 0
    if not (valid and len(grid) == 2 and min(grid) > 0):
        raise errors.UserError(f"{path} is refused: {dict(sizes)} makes no sense.")


def _read_gate(
    path: pathlib.Path, metadata: Mapping[str, str], num_layers: int
) -> dict[str, float] | None:
    """Reads the gate from our metadata, or from a name of the released A-ViT: tiny-10-30.pth."""
    name = re.fullmatch(r"(?:tiny|small|base)-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", path.stem)
    try:
        if "halting" in metadata:
            gate = halting.HaltingConfig(**json.loads(metadata["halting"]))
            types = [type(value) for value in (gate.channel, gate.learnable, gate.merge)]
            if types != [int, bool, bool]:
                raise ValueError(
                    f"channel {gate.channel}, learnable {gate.learnable}, merge {gate.merge}"
                )
            fields = gate_fields(gate)
            fields |= {key: float(fields[key]) for key in _GATE_NUMBERS if key in fields}
        elif name is not None:
            fields = {"gamma": float(name[1]), "beta": -float(name[2])}
            gate = halting.HaltingConfig(**fields)
            message = "%s: the gate is taken from the file's name, gamma %s and beta %s"
            _warn(message, path, f"{gate.gamma:g}", f"{gate.beta:g}")
        else:
            return None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _refused(path, "gate", error) from error
    numbers = {key: getattr(gate, key) for key in _GATE_NUMBERS}
    if problem := halting.explain_useless_gate(**numbers, num_layers=num_layers):
        _warn("%s: %s", path, problem)
    return fields


def gate_fields(gate: halting.HaltingConfig) -> dict[str, Any]:
    """Returns the fields of a gate as files hold them.

    Fields about merging are left out if the network does not merge, as in older files.
    """
    fields = dataclasses.asdict(gate)
    if not gate.merge:
        del fields["merge"], fields["redundancy"]
    return fields


def _refused(path: pathlib.Path, part: str, error: BaseException) -> errors.UserError:
    reason = errors.printable(errors.first_line(error))
    return errors.UserError(f"{path} is refused: its {part} makes no sense ({reason}).")


def _warn(message: str, *values: object) -> None:
    _logger.warning(message, *(errors.printable(str(value)) for value in values))
