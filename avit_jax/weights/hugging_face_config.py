"""What the `config.json` of Hugging Face says without saying it: defaults of its networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Kinds of networks -> default activation.
MODEL_TYPES = {
    **dict.fromkeys(("vit", "deit", "vit_mae", "vit_msn", "ijepa"), "gelu"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), "gelu"),
    "clip_vision_model": "quick_gelu",
    "siglip_vision_model": "gelu_pytorch_tanh",
}
# Configs of a network of images and texts leave defaults of the image network out.
_NESTED = {
    "clip": {"model_type": "clip_vision_model", "layer_norm_eps": 1e-5},
    "siglip": {"model_type": "siglip_vision_model", "layer_norm_eps": 1e-6},
}
_NESTED_HEADS = 12
# Queries, keys and values of DINOv3 -> whether they have a bias by default.
_BIASES = {"query_bias": True, "key_bias": False, "value_bias": True}
_DINOV3 = {"rope_theta": 100.0, "use_gated_mlp": False, "hidden_act": "gelu", **_BIASES}


def image_network(content: Any) -> Any:
    """Returns a config, or the part of it about images if it describes images and texts."""
    kind = str(content.get("model_type")) if isinstance(content, dict) else ""
    if kind == "timm_wrapper":  # a config of timm, which transformers wrote
        return {key: value for key, value in content.items() if key != "model_type"}
    if kind == "dinov3_vit":
        return _DINOV3 | {key: value for key, value in content.items() if value is not None}
    if kind not in _NESTED or not isinstance(content.get("vision_config"), dict):
        return content
    # Labels are those of the whole network: old configs hold two meaningless ones in the part.
    vision = content["vision_config"] | {"id2label": content.get("id2label")}
    return {"num_attention_heads": _NESTED_HEADS, **_NESTED[kind], **vision}


def unread_bias(content: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns the key of a config that leaves out a bias that the tensors have; None if none does.

    Args:
      content: of the config.
      tensors: timm's name -> array.
    """
    for name in [name for name in tensors if name.endswith("attn.qkv.bias")]:
        for key, bias in zip(_BIASES, np.array_split(tensors[name], 3), strict=True):
            if not content.get(key, True) and bias.any():
                return key
    return None
