"""Names of DINOv3 in timm's class `Eva` and in its own files, to and from timm's usual names."""

import re
from typing import Any

import numpy as np

from avit_jax.weights import name_maps
from avit_jax.weights.name_maps import Tensors

# timm's usual names -> names of `Eva`.
_SCALES = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
# Names of DINOv3's own files; the first linear layer of the MLP is the gate.
_OWN = {"storage_tokens": "reg_token"}
_OWN_MLP = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
_PERIODS = "rope_embed.periods"
_OWN_EPS = 1e-5


def matches(tensors: Tensors) -> bool:
    """Returns whether tensors in timm's names have no position embeddings."""
    return "pos_embed" not in tensors


def to_timm(tensors: Tensors) -> tuple[Tensors, dict[str, Any], list[str]]:
    """Translates to timm's usual names; see `name_maps.to_timm`.

    DINOv3's own files hold a bias of the keys that the network masks.

    Raises:
      KeyError: as there.
      ValueError: as in `name_maps.to_timm`, or the periods of the rotation are not DINOv3's.
    """
    result: Tensors = {}
    for name, array in tensors.items():
        module, _, last = name.rpartition(".")
        if name == _PERIODS or last == "bias_mask":
            continue
        if last == "bias" and module.endswith(".qkv") and _PERIODS in tensors:
            query, _, value = np.split(array, 3)
            array = np.concatenate([query, np.zeros_like(query), value])
        if own := re.fullmatch(r"(.*\.mlp)\.(w[123])", module):
            module = f"{own[1]}.{_OWN_MLP[own[2]]}"
        renamed = f"{module}.{last}" if module else _OWN.get(name, name)
        name_maps.add(result, renamed, array)
    attributes = _of_periods(tensors) if _PERIODS in tensors else {}
    result, more, dropped = name_maps.to_timm(result)
    return result, attributes | more, dropped


def _of_periods(tensors: Tensors) -> dict[str, Any]:
    """Returns what the periods in DINOv3's own files tell, which are rounded to bfloat16."""
    periods = np.asarray(tensors[_PERIODS], np.float64)
    count = periods.size
    theta = float(periods.max() ** (count / max(count - 1, 1)))
    theta = float(f"{theta:.2g}")
    expected = theta ** (np.arange(count) / count)
    if periods.ndim != 1 or not np.allclose(periods, expected, rtol=2**-8, atol=0):
        raise ValueError(f"{_PERIODS} are not the powers of one number, as in DINOv3")
    width = len(tensors["cls_token"].ravel())
    attributes = {"rope_theta": theta, "pool": "token", "norm_eps": _OWN_EPS}
    return attributes | {"num_heads": width // (4 * count)}


def from_timm(tensors: Tensors) -> Tensors:
    """Translates timm's usual names to those of `Eva`.

    It splits biases unless keys have one, which `Eva` has with attn_type="rope" only.
    """
    result: Tensors = {}
    for name, array in tensors.items():
        module, _, last = name.rpartition(".")
        start, _, scale = module.rpartition(".")
        is_gated = len(array) == 2 * tensors.get(f"{start}.fc2.weight", array).shape[-1]
        if f"{scale}.{last}" in _SCALES:
            result[f"{start}.{_SCALES[f'{scale}.{last}']}"] = array
        elif name.endswith("qkv.bias") and not np.split(array, 3)[1].any():
            result[f"{start}.q_bias"], _, result[f"{start}.v_bias"] = np.split(array, 3)
        elif scale == "fc1" and is_gated:
            gate, value = np.split(array, 2)
            result |= {f"{module}_g.{last}": gate, f"{module}_x.{last}": value}
        else:
            result[name] = array
    return result
