"""What a transformer layer consists of, and the activations of its MLP."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from avit_jax.core.arrays import Array
from avit_jax.models.rotary import Rotation


def _gelu(x: Array) -> Array:
    """Computes the exact GELU by erf, which XLA computes faster than the erfc of `jax.nn.gelu`."""
    # In half precision, a GPU could fuse the tanh approximation into the product before it. But the
    # approximation differs from the exact GELU by up to 5e-4.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _swiglu(x: Array) -> Array:
    gate, x = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * x


# Name -> activation of the MLP.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "swiglu": _swiglu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a layer consists of. The defaults describe the plain layer of DeiT.

    Attributes:
      mlp: activation of the MLP. "gelu" is exact, "gelu_tanh" approximates it by tanh, "quick_gelu"
        is x * sigmoid(1.702 x). "swiglu" is silu(a) * b, where the output of `fc1` is a, then b.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether a layer norm of each head is applied to its queries and to its keys.
      layer_scale: whether the output of each branch is multiplied by a learned vector.
      rotation: how queries and keys rotate with the places of their tokens; None: they do not.

    Reference: Shazeer, arXiv 2002.05202 (SwiGLU); Touvron et al., arXiv 2103.17239 (LayerScale);
      Dehghani et al., arXiv 2302.05442 (query-key normalization).
    """

    mlp: str = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    rotation: Rotation | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is the layer of DeiT, which special kernels may require."""
        return self == LayerSpec()

    @property
    def mlp_inputs(self) -> int:
        """Outputs of `fc1` for each hidden channel of the MLP."""
        return 2 if self.mlp == "swiglu" else 1
