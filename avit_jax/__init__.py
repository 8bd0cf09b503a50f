"""Adaptive-token vision transformers (A-ViT) in JAX and Flax.

Modules load when they are first used: the command line has to handle Ctrl-C before it imports JAX.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avit_jax import halting, halting_linen, halting_nnx, serving, weights, zoo
    from avit_jax.core.halting import HaltingConfig
    from avit_jax.inference import adaptive, autotune
    from avit_jax.inference.maps import attention_maps
    from avit_jax.models import vit
    from avit_jax.models.vit import AViT, deit_base, deit_small, deit_tiny
    from avit_jax.networks import load, make_adaptive, predict
    from avit_jax.publish import push, save
    from avit_jax.training import build, losses, restore
    from avit_jax.utils import errors
    from avit_jax.weights import weight_files

# Hides XLA's alarm about slow compilation. JAX reads it when it is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.2.0"
__all__ = [
    "AViT",
    "HaltingConfig",
    "adaptive",
    "attention_maps",
    "autotune",
    "build",
    "deit_base",
    "deit_small",
    "deit_tiny",
    "errors",
    "halting",
    "halting_linen",
    "halting_nnx",
    "load",
    "losses",
    "make_adaptive",
    "predict",
    "push",
    "restore",
    "save",
    "serving",
    "vit",
    "weight_files",
    "weights",
    "zoo",
]
# Where each name is; a module if the path ends in it.
_PATHS = {
    "AViT": "models.vit",
    "HaltingConfig": "core.halting",
    "adaptive": "inference.adaptive",
    "attention_maps": "inference.maps",
    "autotune": "inference.autotune",
    "build": "training.build",
    "deit_base": "models.vit",
    "deit_small": "models.vit",
    "deit_tiny": "models.vit",
    "errors": "utils.errors",
    "load": "networks",
    "losses": "training.losses",
    "make_adaptive": "networks",
    "predict": "networks",
    "push": "publish",
    "restore": "training.restore",
    "save": "publish",
    "vit": "models.vit",
    "weight_files": "weights.weight_files",
}


def __getattr__(name: str) -> Any:
    path = f"{__name__}.{_PATHS.get(name, name)}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
    value = module if path.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
