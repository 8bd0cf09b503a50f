"""Translates the tensor names of Hugging Face's ViT and DeiT to and from timm's."""

import re

import numpy as np

from avit_jax.weights.name_maps import Tensors, add

# Inside a layer: Hugging Face's name -> timm's, except query, key and value.
_LAYER_MODULES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# Models of transformers 5 have these names in memory; `save_pretrained` writes the names above.
_LAYER_MODULES_5 = {
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|[qkv]_proj)")
_QKV_PARTS = ("query", "key", "value")
_OUTSIDE_LAYERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


def matches(tensors: Tensors) -> bool:
    """Returns whether the names are Hugging Face's."""
    return any(_LAYER.fullmatch(_without_model(name)) for name in tensors)


def to_timm(tensors: Tensors) -> Tensors:
    """Translates Hugging Face's names to timm's; drops tensors of the pooler.

    Raises:
      KeyError: query, key or value is missing.
      ValueError: two tensors with different values get one name.
    """
    result: Tensors = {}
    qkv: dict[str, Tensors] = {}
    for full_name, array in tensors.items():
        name = _without_model(full_name)
        layer = _LAYER.fullmatch(name)
        if name.startswith("pooler."):  # of a model without a head
            continue
        if layer is None:
            module, _, kind = name.rpartition(".")
            translated = f"{_OUTSIDE_LAYERS.get(module, module)}.{kind}" if module else name
            add(result, _OUTSIDE_LAYERS.get(name, translated), array)
            continue
        index, module, kind = layer.groups()
        if part := _QKV.fullmatch(module):
            add(qkv.setdefault(f"blocks.{index}.attn.qkv.{kind}", {}), part[1][0], array)
        else:
            module = (_LAYER_MODULES | _LAYER_MODULES_5).get(module, module)
            add(result, f"blocks.{index}.{module}.{kind}", array)
    for name, parts in qkv.items():
        for part in _QKV_PARTS:
            if part[0] not in parts:
                raise KeyError(part)
        add(result, name, np.concatenate([parts[letter] for letter in "qkv"]))
    return result


def from_timm(tensors: Tensors) -> Tensors:
    """Translates timm's names to Hugging Face's; the inverse of `to_timm`."""
    distilled = "dist_token" in tensors
    unused = "classifier" if distilled else "cls_classifier"
    outside = {ours: name for name, ours in _OUTSIDE_LAYERS.items() if name != unused}
    modules = {ours: name for name, ours in _LAYER_MODULES.items()}
    prefix = "deit." if distilled else "vit."
    result: Tensors = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if name in outside:
            result[prefix + outside[name]] = array
        elif not module.startswith("blocks."):
            translated = f"{outside[module]}.{kind}"
            result[translated if "classifier" in translated else prefix + translated] = array
        else:
            _, index, module = module.split(".", 2)
            start = f"{prefix}encoder.layer.{index}."
            if module == "attn.qkv":
                for part, rows in zip(_QKV_PARTS, np.split(array, 3), strict=True):
                    result[f"{start}attention.attention.{part}.{kind}"] = rows
            else:
                result[f"{start}{modules[module]}.{kind}"] = array
    return result


def _without_model(name: str) -> str:
    return re.sub(r"^(vit|deit)\.", "", name)
