"""Writes weight files as safetensors. See `weight_files`."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from avit_jax.models import vit
from avit_jax.utils import files
from avit_jax.weights import architecture, dinov3, hugging_face_files, name_maps
from avit_jax.weights.reading import WeightFile, gate_fields


def write(
    path: epath.PathLike,
    params: Mapping[str, Any],
    model: vit.AViT,
    *,
    names: str = "timm",
    more_metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes safetensors. The metadata holds the gate and the sizes that tensors do not show.

    Args:
      path: of the file.
      params: parameters of the model.
      model: gives the sizes.
      names: "timm", or "huggingface", which also writes a `config.json` beside the file.
      more_metadata: is added to the metadata.

    Raises:
      ValueError: `names` has another value, or the path does not end in .safetensors.
    """
    import safetensors.numpy

    if not str(path).lower().endswith(".safetensors"):
        raise ValueError(f"the name of a weight file must end in .safetensors; got {path}.")
    if names not in ("timm", "huggingface"):
        raise ValueError(f'names must be "timm" or "huggingface"; got "{names}".')
    path = epath.Path(path)
    file = to_file(params, model)
    tensors = file.tensors
    metadata = {"format": "pt", "norm_eps": str(file.norm_eps), "num_heads": str(file.num_heads)}
    metadata["grid"] = "x".join(map(str, file.grid))
    changed = architecture.changed(file.attributes)
    # Hugging Face's tensors hold a position for the class token; rotary networks have none at all.
    if names == "huggingface" or model.rope_theta:
        changed.pop("position_class", None)
    if changed:
        metadata["attributes"] = json.dumps(changed)
    if file.gate is not None:
        metadata["halting"] = json.dumps(file.gate)
    metadata |= more_metadata or {}
    if names == "timm" and model.rope_theta:
        tensors = dinov3.from_timm(tensors)
    if names == "huggingface":
        tensors, config = hugging_face_files.from_timm(tensors, model)
        config = json.dumps(config, indent=2)
        files.write(path.with_name("config.json"), config + "\n")
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    files.write(path, safetensors.numpy.save(contiguous, metadata))


def gate_of(params: Mapping[str, Any], model: vit.AViT) -> dict[str, Any] | None:
    """Returns the gate as files hold it, None without halting; a learned one becomes fixed."""
    if model.halting is None:
        return None
    # The shortest decimals that give the same float32, so that users can type them.
    learned = jax.device_get(params.get("gate", {})).items()
    numbers = {name: float(str(np.float32(value))) for name, value in learned}
    return gate_fields(model.halting) | numbers | {"learnable": False}


def to_file(params: Mapping[str, Any], model: vit.AViT) -> WeightFile:
    """Returns the content of a file of these parameters; a learned gate becomes a fixed one."""
    params = jax.device_get(params)
    gate = gate_of(params, model)
    patch_shape = (model.patch_size, model.patch_size, model.channels)
    tensors = name_maps.to_torch(params, patch_shape=patch_shape)
    # timm and CLIP have no bias there; positions take it in, if they are learned
    if {"norm_pre.weight", "pos_embed"} <= tensors.keys():
        bias = tensors.pop("patch_embed.proj.bias")
        prefix = model.num_prefix_tokens if model.position_class else 0
        tensors["pos_embed"] = np.array(tensors["pos_embed"])
        tensors["pos_embed"][:, prefix:] += bias
    return WeightFile(
        tensors=tensors,
        norm_eps=model.norm_eps,
        num_heads=model.num_heads,
        gate=gate,
        grid=model.grid,
        attributes=architecture.of_model(model),
    )
