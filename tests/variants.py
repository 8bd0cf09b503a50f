"""Small networks built like those that people use: one of each kind."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.weights import weight_files

SIZES = {"patch_size": 4, "width": 16, "num_heads": 2, "depth": 3, "num_classes": 5}
GATE = halting.HaltingConfig(gamma=1.5, beta=-0.7)
MERGING = halting.HaltingConfig(gamma=1.5, beta=-0.7, merge=True, redundancy=1.0)
# Kind -> attributes of `AViT` that differ from those of DeiT.
KINDS: dict[str, dict[str, Any]] = {
    "deit3": {"layer_scale": True, "position_class": False},
    "dinov2": {"layer_scale": True, "patch_size": 7},
    "dinov2_giant": {"layer_scale": True, "mlp": "swiglu", "mlp_ratio": 2.5},
    "dinov2_registers": {"layer_scale": True, "num_registers": 3, "position_class": False},
    "registers_with_positions": {"num_registers": 2},
    "clip": {"pre_norm": True, "mlp": "quick_gelu", "norm_eps": 1e-5},
    "siglip_average": {"class_token": False, "pool": "avg", "mlp": "gelu_tanh"},
    "siglip": {"class_token": False, "pool": "map", "mlp": "gelu_tanh"},
    "average_after_class_token": {"pool": "avg", "fc_norm": True},
    "maximum": {"class_token": False, "pool": "max", "num_registers": 1, "fc_norm": True},
    "attention_beside_registers": {"pool": "map", "num_registers": 2},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "dinov3": {"rope_theta": 100.0, "layer_scale": True, "num_registers": 2, "norm_eps": 1e-5},
}


def network(kind: str, **changes: Any) -> vit.AViT:
    """Returns the network of a kind, oblong and with a gate that halts some tokens."""
    attributes = SIZES | KINDS[kind] | {"halting": GATE} | changes
    size = attributes["patch_size"]
    return vit.AViT(**({"image_size": (2 * size, 4 * size)} | attributes))


def static(kind: str) -> vit.AViT:
    """Returns the network of a kind, or a "plain" one, without a gate."""
    if kind == "plain":
        return vit.AViT(**(SIZES | {"image_size": (16, 16), "halting": None}))
    return network(kind, halting=None)


def write(folder: pathlib.Path, model: vit.AViT) -> pathlib.Path:
    """Writes random parameters of a network to a weight file."""
    path = folder / "model.safetensors"
    weight_files.write(path, params(model), model)
    return path


def images(model: vit.AViT, count: int, seed: int = 0) -> np.ndarray:
    shape = (count, *model.pixels, model.channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def params(model: vit.AViT) -> Any:
    """Returns random parameters, of which none has its initial value."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(model, 1))["params"]
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return jnp.asarray(values * leaf.shape[-2] ** -0.5, jnp.float32)
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return jnp.asarray(centre + 0.3 * values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float64(tree: Any) -> Any:
    """Returns a tree of NumPy arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
