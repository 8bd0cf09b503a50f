"""Adaptive-token vision transformers (A-ViT) in JAX and Flax.

Modules load when they are first used: the command line has to handle Ctrl-C before it imports JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avit_jax import adaptive, halting, halting_linen, halting_nnx, losses, serving, vit, weights
    from avit_jax.halting import HaltingConfig
    from avit_jax.vit import AViT, deit_base, deit_small, deit_tiny

__all__ = [
    "AViT",
    "HaltingConfig",
    "adaptive",
    "deit_base",
    "deit_small",
    "deit_tiny",
    "halting",
    "halting_linen",
    "halting_nnx",
    "losses",
    "serving",
    "vit",
    "weights",
]
_MODULE_OF = {"HaltingConfig": "halting", "AViT": "vit", "deit_base": "vit", "deit_small": "vit", "deit_tiny": "vit"}


def __getattr__(name: str) -> Any:
    path = f"{__name__}.{_MODULE_OF.get(name, name)}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
    value = getattr(module, name) if name in _MODULE_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
