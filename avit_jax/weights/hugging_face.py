"""Translates the tensor names of Hugging Face's vision transformers to timm's.

These are ViT, DeiT, MAE, MSN, I-JEPA, Dinov2 with and without registers, DINOv3, and the vision
networks of CLIP and SigLIP. Names are those of files and, since transformers 5, those of models in
memory.
"""

import re
from typing import Any

import numpy as np

from avit_jax.weights import name_maps
from avit_jax.weights.name_maps import Tensors, add

# Inside a layer: Hugging Face's name -> timm's, except query, key and value.
_LAYER_MODULES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.down_proj": "mlp.fc2",
}
_KINDS = {"lambda1": "gamma"}
_LAYER = re.compile(
    r"(?:encoder\.layers?|layers|(?:model\.)?layer)\.(\d+)\.(.+)\.(weight|bias|lambda1)"
)
_QKV = re.compile(r"(?:attention|self_attn)\.(?:attention\.)?(query|key|value|[qkv]_proj)")
# The gated MLP of transformers 5 in memory; timm has both parts in one.
_GATED = re.compile(r"mlp\.(gate|up)_proj")
_OUTSIDE_LAYERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "layernorm": "norm",
    "post_layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "visual_projection": "head",
    "distillation_classifier": "head_dist",
    # The attention pooling of SigLIP.
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
}
_MODEL = re.compile(r"^(vit|deit|ijepa|dinov2|dinov2_with_registers|vision_model)\.")
# What the image network does not use: the pooler of a model without a head, the text networks.
_UNUSED = re.compile(r"pooler\..*|text_model\..*|text_projection\..*|logit_(scale|bias)")
_POOLING = re.compile(r"head\.(probe|(attention|layernorm|mlp)\..*)")
_POOLING_QKV = "head.attention.in_proj_"


def matches(tensors: Tensors) -> bool:
    """Returns whether the names are Hugging Face's."""
    return any(_LAYER.fullmatch(_MODEL.sub("", name)) for name in tensors)


def to_timm(tensors: Tensors) -> tuple[Tensors, dict[str, Any], list[str]]:
    """Translates Hugging Face's names to timm's.

    Without a class token, patch tokens are averaged, unless there is SigLIP's attention pooling. It
    is left out if there is a classifier, which reads the average.

    Returns:
      The tensors; attributes of `AViT` that follow from the names; names that are left out.

    Raises:
      KeyError: query, key or value is missing.
      ValueError: two tensors with different values get one name, or the classifier reads what
        `AViT` does not have.
    """
    result: Tensors = {}
    parts: dict[str, Tensors] = {}  # timm's name -> its parts
    dropped = []
    own = {_MODEL.sub("", name): array for name, array in tensors.items()}
    unused = set(name_maps.unused(own))
    averages = any(name in tensors for name in ("classifier.weight", "classifier.bias"))
    for full_name, array in tensors.items():
        name = _MODEL.sub("", full_name)
        if _UNUSED.fullmatch(name) or name in unused or (averages and _POOLING.fullmatch(name)):
            dropped.append(full_name)
            continue
        if name.startswith(_POOLING_QKV):
            kind = name.removeprefix(_POOLING_QKV)
            query, key_value = np.split(array, [len(array) // 3])
            add(result, f"attn_pool.q.{kind}", query)
            add(result, f"attn_pool.kv.{kind}", key_value)
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            module, _, kind = name.rpartition(".")
            translated = f"{_OUTSIDE_LAYERS.get(module, module)}.{kind}" if module else name
            add(result, _OUTSIDE_LAYERS.get(name, translated), array)
            continue
        index, module, kind = layer.groups()
        if part := _QKV.fullmatch(module):
            add(parts.setdefault(f"blocks.{index}.attn.qkv.{kind}", {}), part[1][0], array)
        elif part := _GATED.fullmatch(module):
            add(parts.setdefault(f"blocks.{index}.mlp.fc1.{kind}", {}), part[1], array)
        else:
            module = _LAYER_MODULES.get(module, module)
            add(result, f"blocks.{index}.{module}.{_KINDS.get(kind, kind)}", array)
    has_gate = any("gate" in found for found in parts.values())
    for name, found in parts.items():
        wanted = {"q": "query", "k": "key", "v": "value"}
        if "attn" not in name:
            wanted = {"gate": "gate_proj", "up": "up_proj"} if has_gate else {"up": "up_proj"}
        elif name.endswith("bias") and "pos_embed" not in result:  # DINOv3 has some of them
            zeros = np.zeros_like(next(iter(found.values())))
            found = {key: found.get(key, zeros) for key in wanted}
        if missing := [part for key, part in wanted.items() if key not in found]:
            raise KeyError(missing[0])
        add(result, name, np.concatenate([found[key] for key in wanted]))
    return result, _complete(result), dropped


def _complete(tensors: Tensors) -> dict[str, Any]:
    """Adds axes and zeros that timm's layout has; returns the attributes of `AViT`."""
    for name, ndim in (("cls_token", 1), ("pos_embed", 2)):
        if np.ndim(tensors.get(name)) == ndim:
            tensors[name] = tensors[name].reshape(*(1,) * (3 - ndim), *tensors[name].shape)
    if "norm_pre.weight" in tensors and "head.weight" in tensors:
        if "head.bias" in tensors:
            raise ValueError(
                "the classifier of CLIPForImageClassification averages tokens without their norm"
            )
        tensors["head.bias"] = np.zeros(len(tensors["head.weight"]), np.float32)  # a projection
    width = len(tensors.get("norm.weight", ()))
    if np.shape(tensors.get("head.weight"))[1:] == (2 * width,):
        head = tensors["head.weight"]
        if head[:, width:].any():
            raise ValueError(
                "the classifier of Dinov2ForImageClassification reads the class token and the "
                "average of the patches, which is not supported; save its backbone "
                "alone (model.dinov2.save_pretrained)"
            )
        tensors["head.weight"] = head[:, :width]
    registers = {}
    if "dist_token" in tensors and "head_dist.weight" not in tensors:
        tensors["reg_token"] = tensors.pop("dist_token")  # no classifier reads it
    elif "reg_token" in tensors:
        registers = name_maps.fold_class_position(tensors)
    pool = "map" if "attn_pool.latent" in tensors else "avg"
    attributes: dict[str, Any] = {"pool": "token" if "cls_token" in tensors else pool}
    has_position = {"cls_token", "pos_embed"} <= tensors.keys()
    return attributes | ({"position_class": True} if has_position else {}) | registers
