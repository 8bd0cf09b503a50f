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
from avit_jax.weights import (
    architecture,
    big_vision,
    config_json,
    dinov3,
    foreign_parts,
    hugging_face,
    name_maps,
    positions,
    tensor_files,
)
from avit_jax.weights.name_maps import Tensors

_MAX_NAMED = 5  # tensors in one message
# What the translation of an unknown file's names can raise.
_UNUSABLE = (KeyError, ValueError, IndexError, TypeError)
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
      attributes: of `AViT`, such as pool, that the file or its config gives or the tensors show;
        see `architecture.PLAIN`.
      label_names: names of the classes.
    """

    tensors: Tensors
    norm_eps: float | None = None
    num_heads: int | None = None
    gate: dict[str, float] | None = None
    grid: tuple[int, int] | None = None
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    label_names: tuple[str, ...] | None = None


def fingerprint(file: WeightFile) -> str:
    """Returns the SHA-256 of everything in a file that its logits depend on."""
    more: list[Any] = [file.grid] if file.grid and file.grid[0] != file.grid[1] else []
    unseen = {key: value for key, value in file.attributes.items() if key in architecture.UNSEEN}
    more += [changed] if (changed := architecture.changed(unseen)) else []
    digest = hashlib.sha256(json.dumps([file.norm_eps, file.num_heads, file.gate, *more]).encode())
    for name, array in sorted(file.tensors.items()):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read(path: epath.PathLike, *, ema: bool = False) -> WeightFile:
    """Reads a weight file.

    Args:
      path: a file, a folder of Hugging Face or timm, or `hf-hub:owner/name`.
      ema: reads the moving average of the weights of a training checkpoint of PyTorch.

    Raises:
      errors.UserError: the file cannot be read, holds more than tensors, holds no vision
        transformer, contradicts the `config.json` beside it, or needs what `AViT` lacks.
    """
    path = tensor_files.find(path)
    tensors, metadata = tensor_files.read(path, ema=ema)
    config_json.refuse_other_kinds(path)
    names, prefix, tensors = _names_of(path, tensors)
    is_dinov2 = any(".mlp.w12." in name for name in tensors)  # whose gate is known
    has_eva_names = any(name.endswith("attn.q_bias") for name in tensors)
    try:
        tensors, hints, dropped = names.to_timm(tensors)
    except _UNUSABLE as error:
        raise _no_network(path, error) from error
    if reason := foreign_parts.problem(tensors):
        raise errors.UserError(f"{path} holds a network that is not supported: {reason}.")
    if prefix:
        _warn("%s: the prefix %s of its tensors' names is left out", path, prefix)
    if dropped:
        _tell_dropped(path, dropped)
    sizes = {key: hints.pop(key) for key in ("num_heads", "norm_eps") if key in hints}
    config = config_json.read(path, tensors, required=names is hugging_face)
    attributes = config.pop("attributes")
    is_packed = names is name_maps and not is_dinov2 and name_maps.is_packed(tensors)
    if is_packed and not config and "num_heads" not in metadata:
        _warn("%s does not give the activation of its gated MLP: silu of its first half", path)
    sources = [_sizes_in(path, metadata), config, {"attributes": hints}]
    for key, value in [item for source in sources for item in source.items()]:
        target, values = (attributes, value) if key == "attributes" else (sizes, {key: value})
        for name, known in values.items():
            if target.setdefault(name, known) != known:
                raise errors.UserError(
                    f"{path} contradicts itself or the config.json beside it: "
                    f"{name}={target[name]} and {name}={known}; correct one of them."
                )
    _refuse_rotary(path, tensors, attributes, has_eva_names=has_eva_names)
    if attributes.get("pool") != "map" and f"{architecture.POOL}latent" in tensors:
        unused = [name for name in tensors if name.startswith(architecture.POOL)]
        _tell_dropped(path, unused)
        tensors = {name: array for name, array in tensors.items() if name not in unused}
    if "num_heads" in metadata:  # `write` names what differs from DeiT
        attributes.setdefault("position_class", True)
    if attributes.get("position_class") is False:
        tensors = positions.with_prefix(tensors)
    _check_sizes(path, sizes)
    num_layers = len([name for name in tensors if name.endswith("attn.qkv.weight")])
    gate = _read_gate(path, metadata, num_layers)
    return WeightFile(tensors=tensors, gate=gate, attributes=attributes, **sizes)


def _names_of(path: pathlib.Path, tensors: Tensors) -> tuple[Any, str, Tensors]:
    """Returns the module that translates the names, their prefix, and the tensors without it."""
    try:
        tensors, prefix = name_maps.without_prefix(tensors)
        if name_maps.is_post_norm(tensors):
            raise ValueError(
                "by the order of its tensors, the norms of a layer follow its branches, which is "
                "not supported; if they come first, sort the tensors by name"
            )
    except ValueError as error:
        raise _no_network(path, error) from error
    for names in (big_vision, hugging_face, dinov3):
        if names.matches(tensors):
            return names, prefix, tensors
    return name_maps, prefix, tensors


def _no_network(path: pathlib.Path, error: Exception) -> errors.UserError:
    reason = errors.first_line(error)
    return errors.UserError(
        f"{path} holds no whole vision transformer that is supported: {reason}."
    )


def _tell_dropped(path: pathlib.Path, dropped: list[str]) -> None:
    """Logs names that are left out."""
    rest = f" and {len(dropped) - _MAX_NAMED} more" if len(dropped) > _MAX_NAMED else ""
    named = errors.printable(", ".join(sorted(dropped)[:_MAX_NAMED]))
    _logger.info("%s: left out: %s%s", errors.printable(str(path)), named, rest)


def _refuse_rotary(
    path: pathlib.Path, tensors: Tensors, attributes: Mapping[str, Any], *, has_eva_names: bool
) -> None:
    """Raises errors.UserError if a network has no position embeddings that are known."""
    if has_eva_names and "pos_embed" in tensors and not config_json.tells_rotation(path):
        raise errors.UserError(
            f"{path} has the names of EVA, in which queries and keys may rotate (RoPE): put timm's "
            'config.json, with "architecture" or "use_rot_pos_emb", beside it.'
        )
    is_network = any(name.endswith("attn.qkv.weight") for name in tensors)
    if is_network and "pos_embed" not in tensors and not attributes.get("rope_theta"):
        raise errors.UserError(
            f"{path} has no position embeddings: for rotary ones (RoPE), put the config.json of "
            "timm or Hugging Face beside it; only those of DINOv3 are supported."
        )


def _sizes_in(path: pathlib.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the sizes and attributes in the metadata that `writing.write` adds."""
    kinds = {"norm_eps": float, "num_heads": int, "grid": _parse_grid}
    try:
        sizes = {key: kind(metadata[key]) for key, kind in kinds.items() if key in metadata}
        if "num_heads" in metadata:  # `write` wrote it
            attributes = json.loads(metadata.get("attributes", "{}"))
            plain = {name: architecture.PLAIN[name] for name in architecture.UNSEEN}
            if not attributes.keys() <= architecture.PLAIN.keys():
                raise ValueError(f"attributes {attributes}")
            sizes["attributes"] = plain | attributes
        return sizes
    except (ValueError, OverflowError, AttributeError, RecursionError) as error:
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
