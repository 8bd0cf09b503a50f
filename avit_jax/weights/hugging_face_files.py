"""Writes networks in the names of Hugging Face's files, with their `config.json`."""

import math
from typing import Any

import numpy as np

from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import architecture, positions
from avit_jax.weights.name_maps import Tensors

# Kind of names -> timm's module inside a layer -> Hugging Face's.
_VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.attention.{}",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2 = {
    **{"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    **{name: _VIT[name] for name in ("attn.qkv", "attn.proj")},
    **{"ls1": "layer_scale1", "ls2": "layer_scale2"},
}
_DINOV3 = _DINOV2 | {
    **{"attn.qkv": "attention.{}_proj", "attn.proj": "attention.o_proj"},
    **{"mlp.fc1": "mlp.up_proj", "mlp.fc1_g": "mlp.gate_proj", "mlp.fc2": "mlp.down_proj"},
}
_SWIGLU = _DINOV2 | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_CLIP = {
    **{"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    **{"attn.qkv": "self_attn.{}_proj", "attn.proj": "self_attn.out_proj"},
}
_OUTSIDE_VIT = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_OUTSIDE_DINOV3 = _OUTSIDE_VIT | {"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"}
_OUTSIDE_CLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    **{
        f"attn_pool.in_proj_{kind}": f"head.attention.in_proj_{kind}" for kind in ("weight", "bias")
    },
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    **{f"attn_pool.mlp.{name}": f"head.mlp.{name}" for name in ("fc1", "fc2")},
}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "swiglu": "gelu"}


def from_timm(tensors: Tensors, model: vit.AViT) -> tuple[Tensors, dict[str, Any]]:
    """Translates tensors in timm's names to those of the kind of network that computes the same.

    The kinds are ViT, DeiT, Dinov2 with and without registers, DINOv3, CLIP vision and SigLIP
    vision.

    Returns:
      The tensors, and the content of `config.json`.

    Raises:
      errors.UserError: Hugging Face has no such network among these.
    """
    parts = architecture.of_model(model)
    options = set(architecture.changed(parts)) - {"mlp", "qkv_bias", "position_class"}
    options |= {"mlp"} if parts["mlp"] == "swiglu" else set()  # others have any activation
    if not model.distilled and parts["pre_norm"] and options == {"pre_norm"} and parts["qkv_bias"]:
        return _clip(tensors, model)
    pools = ("avg",) if model.num_classes else ("avg", "map")  # the classifier reads the average
    if parts["pool"] in pools and options == {"pool", "class_token"} and parts["qkv_bias"]:
        return _siglip(tensors, model)
    is_dino = parts["layer_scale"] and not model.distilled
    is_dino &= options <= {"layer_scale", "num_registers", "mlp", "rope_theta"}
    if is_dino and parts["rope_theta"] and not model.num_classes:
        return _dinov3(tensors, model)
    if is_dino and not parts["rope_theta"]:
        return _dinov2(tensors, model)
    if not options:
        return _vit(tensors, model)
    named = architecture.changed(parts) | {"num_classes": model.num_classes}
    raise errors.UserError(
        f"Hugging Face has no network of these parts: {named}; write the names of timm."
    )


def _vit(tensors: Tensors, model: vit.AViT) -> tuple[Tensors, dict[str, Any]]:
    kind = "deit" if model.distilled else "vit"
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    heads = heads if model.distilled else {"head": "classifier"}
    start = f"{kind}." if model.num_classes else ""
    names = {name: start + there for name, there in _OUTSIDE_VIT.items()} | heads
    tensors = _with_class_position(tensors, model)
    suffix = "WithTeacher" if model.distilled else ""
    name = f"{'DeiT' if model.distilled else 'ViT'}ForImageClassification{suffix}"
    name = name if model.num_classes else "ViTModel"
    return _named(tensors, names, f"{start}encoder.layer", _VIT), _config(model, name, kind)


def _dinov2(tensors: Tensors, model: vit.AViT) -> tuple[Tensors, dict[str, Any]]:
    """Returns Dinov2; the classifier gets weights of zero for the average of the patch tokens."""
    parts = architecture.of_model(model)
    kind = "dinov2_with_registers" if parts["num_registers"] else "dinov2"
    gated = parts["mlp"] == "swiglu"
    widths = {ratio: _dinov2_width(ratio * model.width, gated) for ratio in range(1, 17)}
    ratio = next((ratio for ratio in widths if widths[ratio] == model.mlp_width), None)
    if ratio is None:
        raise errors.UserError(
            f"Dinov2 has no MLP of {model.mlp_width} channels at width {model.width}: write the "
            "names of timm."
        )
    tensors = _with_class_position(tensors, model)
    start = f"{kind}." if model.num_classes else ""
    if model.num_classes:
        weight = tensors["head.weight"]
        tensors["head.weight"] = np.concatenate([weight, np.zeros_like(weight)], axis=1)
    names = {name: start + there for name, there in _OUTSIDE_VIT.items()} | {"head": "classifier"}
    result = _named(tensors, names, f"{start}encoder.layer", _SWIGLU if gated else _DINOV2)
    result[f"{start}embeddings.mask_token"] = np.zeros((1, model.width), np.float32)
    name = "Dinov2WithRegisters" if parts["num_registers"] else "Dinov2"
    config = _config(model, name + ("ForImageClassification" if start else "Model"), kind)
    config |= {"mlp_ratio": ratio, "use_swiglu_ffn": gated}
    return result, config | {"num_register_tokens": parts["num_registers"]}


def _dinov2_width(hidden: int, gated: bool) -> int:
    """Returns the channels of Dinov2's MLP after its activation; gated ones are rounded up to 8."""
    return (hidden * 2 // 3 + 7) // 8 * 8 if gated else hidden


def _dinov3(tensors: Tensors, model: vit.AViT) -> tuple[Tensors, dict[str, Any]]:
    """Returns DINOv3, for which Hugging Face has no classifier."""
    gated = model.mlp == "swiglu"
    split: Tensors = {}
    for name, array in tensors.items():
        if gated and ".mlp.fc1." in name:
            split[name.replace("fc1", "fc1_g")], split[name] = np.split(array, 2)
        else:
            split[name] = array
    result = _named(split, _OUTSIDE_DINOV3, "layer", _DINOV3)
    biases = {}
    for part in ("query", "key", "value"):
        names = [name for name in result if name.endswith(f".{part[0]}_proj.bias")]
        # By default, only keys have no bias there.
        biases[f"{part}_bias"] = any(part != "key" or result[name].any() for name in names)
        for name in [] if biases[f"{part}_bias"] else names:
            del result[name]
    width, count = model.width, model.num_registers
    result["embeddings.mask_token"] = np.zeros((1, 1, width), np.float32)
    result.setdefault("embeddings.register_tokens", np.zeros((1, 0, width), np.float32))
    config = _config(model, "DINOv3ViTModel", "dinov3_vit") | biases
    del config["qkv_bias"]
    config |= {"rope_theta": model.rope_theta, "num_register_tokens": count}
    config |= {"hidden_act": "silu"} if gated else {}
    return result, config | {"use_gated_mlp": gated, "proj_bias": True, "mlp_bias": True}


def _clip(tensors: Tensors, model: vit.AViT) -> tuple[Tensors, dict[str, Any]]:
    """Returns CLIP's vision network; its classifier is a projection without bias."""
    tensors = _with_class_position(tensors, model)
    bias = tensors.pop("head.bias", np.zeros(1))
    if bias.any():
        raise errors.UserError(
            "Hugging Face's CLIP vision network has no classifier with a bias: write the names of "
            "timm."
        )
    result = _clip_names(tensors, {"head": "visual_projection"})
    name = "CLIPVisionModelWithProjection" if model.num_classes else "CLIPVisionModel"
    config = _config(model, name, "clip_vision_model")
    return result, config | {"projection_dim": model.num_classes or 1}


def _siglip(tensors: Tensors, model: vit.AViT) -> tuple[Tensors, dict[str, Any]]:
    """Returns SigLIP's vision network, with or without its attention pooling."""
    tensors = dict(tensors)
    for kind in ("weight", "bias") if model.pool == "map" else ():
        parts = [tensors.pop(f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        tensors[f"attn_pool.in_proj_{kind}"] = np.concatenate(parts)
    result = _clip_names(tensors, {"head": "classifier"})
    config = _config(model, "SiglipVisionModel", "siglip_vision_model")
    config |= {"vision_use_head": model.pool == "map"}
    if not model.num_classes:
        return result, config
    labels = {key: config.pop(key) for key in ("id2label", "label2id")}
    config = {"model_type": "siglip", "vision_config": config, **labels}
    return result, config | {"architectures": ["SiglipForImageClassification"]}


def _clip_names(tensors: Tensors, head: dict[str, str]) -> Tensors:
    start = "vision_model."
    names = {name: start + there for name, there in _OUTSIDE_CLIP.items()} | head
    for name in ("cls_token", "pos_embed"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(-1, tensors[name].shape[2])
    if "cls_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"][0]
    return _named(tensors, names, f"{start}encoder.layers", _CLIP)


def _with_class_position(tensors: Tensors, model: vit.AViT) -> Tensors:
    """Returns tensors with positions for the class and distillation token, but not registers."""
    count = 2 if model.distilled else 1
    if not architecture.of_model(model)["position_class"]:
        tensors = positions.with_prefix(tensors)
    if "reg_token" not in tensors:
        return dict(tensors)
    embedding, patches = tensors["pos_embed"], math.prod(model.grid)
    tensors = {**tensors, "reg_token": tensors["reg_token"] + embedding[:, count:-patches]}
    return tensors | {
        "pos_embed": np.concatenate([embedding[:, :count], embedding[:, -patches:]], axis=1)
    }


def _named(
    tensors: Tensors, outside: dict[str, str], layers: str, inside: dict[str, str]
) -> Tensors:
    """Returns the tensors under the names of a kind; splits queries, keys and values."""
    result: Tensors = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if name in outside:
            result[outside[name]] = array
        elif not module.startswith("blocks."):
            result[f"{outside[module]}.{kind}"] = array
        else:
            _, index, module = module.split(".", 2)
            there = f"{layers}.{index}.{inside[module]}.{'lambda1' if kind == 'gamma' else kind}"
            if module != "attn.qkv":
                result[there] = array
                continue
            parts = ("q", "k", "v") if "_proj" in there else ("query", "key", "value")
            for part, rows in zip(parts, np.split(array, 3), strict=True):
                result[there.format(part)] = rows
    return result


def _config(model: vit.AViT, architecture_name: str, kind: str) -> dict[str, Any]:
    """Returns the `config.json` of a model."""
    parts = architecture.of_model(model)
    config = {
        "architectures": [architecture_name],
        "model_type": kind,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "layer_norm_eps": model.norm_eps,
        "image_size": model.pixels[0] if len(set(model.pixels)) == 1 else list(model.pixels),
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "hidden_act": _ACTIVATIONS.get(parts["mlp"], parts["mlp"]),
        "qkv_bias": parts["qkv_bias"],
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
    }
    if kind.startswith("dinov2"):
        del config["intermediate_size"]
    return config
