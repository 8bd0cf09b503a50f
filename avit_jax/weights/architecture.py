"""What a network consists of besides its sizes: what tensors and configs show.

The names are attributes of `AViT`, and the tensors are in timm's names.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from avit_jax.models import checks, vit

# Attributes of the plain network, DeiT.
PLAIN: dict[str, Any] = {
    "pool": "token",
    "class_token": True,
    "num_registers": 0,
    "position_class": True,
    "pre_norm": False,
    "fc_norm": False,
    "mlp": "gelu",
    "qkv_bias": True,
    "qk_norm": False,
    "layer_scale": False,
}
POOL = "attn_pool."  # start of the names of an attention pooling
# Attributes that no tensor shows.
UNSEEN = ("pool", "mlp")
# Names of activations in configs -> `mlp`.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
}
# Keys of configs -> attributes of the same meaning.
_SAME = {
    **{name: name for name in ("class_token", "pre_norm", "fc_norm", "qk_norm", "qkv_bias")},
    **dict.fromkeys(("reg_tokens", "num_register_tokens"), "num_registers"),
}


def of_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the attributes that tensors show; `position_class` is not among them.

    `pool` and `mlp` are among them only if the tensors leave no choice.
    """
    shapes = {name: np.shape(array) for name, array in tensors.items()}
    registers = shapes.get("reg_token", ())
    shown = {
        "class_token": "cls_token" in shapes,
        "num_registers": registers[1] if len(registers) == 3 else 0,
        "pre_norm": "norm_pre.weight" in shapes,
        "fc_norm": "fc_norm.weight" in shapes,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes or "blocks.0.attn.qkv.weight" not in shapes,
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
        "layer_scale": "blocks.0.ls1.gamma" in shapes,
    }
    fc1, fc2 = (shapes.get(f"blocks.0.mlp.{name}.weight", (0, 0)) for name in ("fc1", "fc2"))
    if f"{POOL}latent" in shapes:
        shown["pool"] = "map"
    if len(fc1) == len(fc2) == 2 and fc1[0] == 2 * fc2[1] > 0:
        shown["mlp"] = "swiglu"
    return shown


def of_config(section: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that a section of a `config.json` gives.

    Args:
      section: of timm or Hugging Face.
      shown: the attributes that the tensors show.

    Raises:
      ValueError: an activation or a pooling is not supported; the message names it.
    """
    given = {key: value for key, value in section.items() if value is not None}
    found = {ours: given[key] for key, ours in _SAME.items() if key in given}
    if "num_registers" in found:
        found["num_registers"] = int(found["num_registers"])
    if "init_values" in given:
        found["layer_scale"] = bool(given["init_values"])
    if given.get("no_embed_class"):
        found["position_class"] = False
    for key in [key for key in ("act_layer", "hidden_act") if key in given]:
        if shown.get("mlp") == "swiglu":  # its activation is another key
            continue
        if not isinstance(given[key], str) or given[key] not in _ACTIVATIONS:
            raise ValueError(f"its {key} is {given[key]}")
        found["mlp"] = _ACTIVATIONS[given[key]]
    if given.get("use_swiglu_ffn") and shown.get("mlp") != "swiglu":
        raise ValueError("its use_swiglu_ffn is True, and the tensors have no gate")
    if "global_pool" in given:
        found["pool"] = given["global_pool"]
        if found["pool"] not in checks.POOLS:
            raise ValueError(f"its global_pool is {found['pool']}")
    return found


def changed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that differ from the plain network."""
    return {name: value for name, value in attributes.items() if value != PLAIN[name]}


def of_model(model: vit.AViT) -> dict[str, Any]:
    """Returns all attributes of a model."""
    return {name: getattr(model, name) for name in PLAIN}
