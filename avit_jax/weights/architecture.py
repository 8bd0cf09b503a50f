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
    "rope_theta": 0.0,
}
POOL = "attn_pool."  # start of the names of an attention pooling
# Attributes that no tensor shows.
UNSEEN = ("pool", "mlp", "rope_theta")
# Names of activations in configs -> `mlp`.
_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
}
# Keys of configs -> attributes of the same meaning.
_SAME = {
    **{name: name for name in ("class_token", "pre_norm", "fc_norm", "qk_norm", "qkv_bias")},
    **dict.fromkeys(("reg_tokens", "num_reg_tokens", "num_register_tokens"), "num_registers"),
    **{"use_fc_norm": "fc_norm", "use_pre_transformer_norm": "pre_norm"},
}
# Poolings after which timm puts the last norm by default; keys that change it.
_AVERAGES = ("avg", "max")
_FC_NORM = ("fc_norm", "use_fc_norm")
# Keys about a gated MLP.
_GATED = ("use_swiglu_ffn", "use_gated_mlp", "swiglu_mlp")
# Keys of timm's class `Eva` about rotary position embeddings -> their default, DINOv3's value.
_ROTARY = {
    "rope_type": ("cat", "dinov3"),
    "rope_rotate_half": (False, True),
    "use_abs_pos_emb": (True, False),
    "rope_grid_offset": (0.0, 0.0),
    "rope_grid_indexing": ("ij", "ij"),
}
_ROTARY_THETA = 10000.0  # default of `Eva`
# Keys that only `Eva` has. Its attention pooling reads the class token and registers too.
_EVA = {"use_rot_pos_emb", "num_reg_tokens", "use_fc_norm", "swiglu_mlp", "attn_type", *_ROTARY}


def of_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the attributes that tensors show; `position_class` is not among them.

    Those of `UNSEEN` are among them only if the tensors leave no choice.
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
    if "pos_embed" in shapes:
        shown["rope_theta"] = 0.0
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
    if "no_embed_class" in given:
        found["position_class"] = not given["no_embed_class"]
    is_gated = shown.get("mlp") == "swiglu"
    for key in [key for key in _GATED if bool(given.get(key, is_gated)) != is_gated]:
        gate = "a" if is_gated else "no"
        raise ValueError(f"its {key} is {given[key]}, and the tensors have {gate} gate")
    for key in [key for key in ("act_layer", "hidden_act") if key in given]:
        if given.get("use_gated_mlp") and given[key] not in ("silu", "swish"):
            raise ValueError(f"its {key} is {given[key]}, and its use_gated_mlp is True")
        if is_gated:  # otherwise, its activation is another key
            if key == "act_layer" and given[key] not in ("silu", "swish"):
                raise ValueError(f"its act_layer is {given[key]}, and the tensors have a gate")
            continue
        if not isinstance(given[key], str) or given[key] not in _ACTIVATIONS:
            raise ValueError(f"its {key} is {given[key]}")
        found["mlp"] = _ACTIVATIONS[given[key]]
    if "global_pool" in given:
        found["pool"] = given["global_pool"]
        if found["pool"] not in checks.POOLS:
            raise ValueError(f"its global_pool is {found['pool']}")
    return found


def check_pooling(
    config: Mapping[str, Any],
    shown: Mapping[str, Any],
    named: str | None,
    *,
    norm_first: bool,
    may_drop: bool,
    has_eva_name: bool,
) -> None:
    """Compares the pooling of a `config.json` of timm with the network that timm builds.

    Args:
      config: the top level with `model_args`, which timm builds the network by.
      shown: the attributes that the tensors show.
      named: the pooling that the name of the architecture gives; None if unknown.
      norm_first: whether the architecture may put the last norm before an average by default.
      may_drop: whether timm leaves out an attention pooling that the architecture does not have.
      has_eva_name: whether the architecture is one of timm's class `Eva`.

    Raises:
      ValueError: they differ.
    """
    args = config.get("model_args") or {}
    pool = args.get("global_pool") or config.get("global_pool") or named
    is_shown = shown["fc_norm"] if pool in _AVERAGES else pool == "map"
    if named not in (None, pool) and not args.get("global_pool") and not is_shown:
        raise ValueError(
            f"its global_pool is {pool}, and its architecture has {named}; if {pool} is right, "
            f'write "global_pool": "{pool}" into its "model_args" too'
        )
    if shown.get("pool") == "map" and pool not in (None, "map") and not may_drop:
        raise ValueError(
            f"its global_pool is {pool}, and the tensors have an attention pooling: correct "
            "global_pool"
        )
    is_eva = has_eva_name or any(args.get(key) is not None for key in _EVA)
    if is_eva and pool == "map" and (shown["class_token"] or shown["num_registers"]):
        raise ValueError(
            "its global_pool is map, and timm's class Eva pools the class token and registers too"
        )
    if pool is None or any((config | args).get(key) is not None for key in _FC_NORM):
        return
    averages, key = (("avg",), "use_fc_norm") if is_eva else (_AVERAGES, "fc_norm")
    if pool in averages and not shown["fc_norm"] and not norm_first:
        raise ValueError(
            f"its global_pool is {pool}, with which timm has a norm after the pooling (fc_norm), "
            "and the tensors have one before it; if that is right, write "
            f'"{key}": false into its "model_args"'
        )
    if pool not in _AVERAGES and shown["fc_norm"]:
        raise ValueError(
            f"its global_pool is {pool}, and the tensors have a norm after an average (fc_norm): "
            "correct global_pool"
        )


def of_rotary(config: Mapping[str, Any]) -> dict[str, float]:
    """Returns `rope_theta`, if a config of timm or Hugging Face without None gives it.

    Raises:
      ValueError: it describes rotary position embeddings other than DINOv3's.
    """
    if config.get("model_type") == "dinov3_vit":
        return {"rope_theta": float(config["rope_theta"])}
    if not config.get("use_rot_pos_emb"):
        return {"rope_theta": 0.0} if "use_rot_pos_emb" in config else {}
    for key, (default, wanted) in _ROTARY.items():
        if config.get(key, default) != wanted:
            raise ValueError(
                f"its {key} is {config.get(key, default)}, and rotary position embeddings must be "
                "those of DINOv3"
            )
    return {"rope_theta": float(config.get("rope_temperature", _ROTARY_THETA))}


def to_config(attributes: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """Returns attributes, heads and epsilon as the `model_args` of a `config.json` of timm.

    Args:
      attributes: those to give.
      shown: the attributes that the tensors show.
    """
    names = {"pool": "global_pool", "mlp": "act_layer"}
    args = {names.get(key, key): value for key, value in attributes.items()}
    if "position_class" in args:
        args["no_embed_class"] = not args.pop("position_class")
    if args.get("global_pool") in _AVERAGES:
        args["fc_norm"] = shown["fc_norm"]
    return args


def changed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that differ from the plain network."""
    return {name: value for name, value in attributes.items() if value != PLAIN[name]}


def of_model(model: vit.AViT) -> dict[str, Any]:
    """Returns all attributes of a model."""
    return {name: getattr(model, name) for name in PLAIN}
