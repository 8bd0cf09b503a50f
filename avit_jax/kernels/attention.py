"""Attention of one layer: exact, or by cuDNN's kernel on NVIDIA GPUs in half precision.

Axes as in `vit`. A bias for each key, `(B, N)`, is added to the logits of all queries and heads. It
masks halted keys. With merging, attention is proportional: the bias is the logarithm of the number
of patches that a key stands for.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from avit_jax.core import halting
from avit_jax.core.arrays import Array

# Bias of halted keys. It is so negative that their weight underflows to exactly 0. It is finite, so
# an image whose tokens have all halted gives no NaN.
_HALTED_KEY_BIAS = -1e9
_WIDEST_HEAD = 128  # cuDNN's limit before Hopper, used on all GPUs


def key_bias(
    active: Bool[Array, "B N"] | None, size: Float[Array, "B N"] | None
) -> Float[Array, "B N"] | None:
    """Returns the bias of each key.

    Args:
      active: `(B, N)` bool, False masks the key; None if all are active.
      size: `(B, N)` float, number of patches that each key stands for; None for 1.

    Returns:
      `(B, N)`, at least float32; None for 0.
    """
    # Scaling the weights instead would take one more pass over all pairs.
    bias = None if size is None else jnp.log(size)
    if active is None:
        return bias
    return jnp.where(active, 0.0 if bias is None else bias, _HALTED_KEY_BIAS)


def exact(
    query: Float[Array, "B H Q K"],
    key: Float[Array, "B H N K"],
    value: Float[Array, "B H N K"],
    bias: Float[Array, "B N"] | None,
) -> Float[Array, "B H Q K"]:
    """Computes attention in plain JAX, on every backend and in every dtype.

    Args:
      query: `(B, H, Q, K)`, of the Q tokens that attend.
      key: `(B, H, N, K)`.
      value: as `key`.
      bias: from `key_bias`.

    Returns:
      `(B, H, Q, K)`.
    """
    # jax.nn.dot_product_attention rounds float64 to float32, and is slower on a CPU.
    logits = jnp.matmul(query * query.shape[-1] ** -0.5, key.swapaxes(-2, -1))
    logits = logits.astype(halting.at_least_float32(logits.dtype))
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    # Dividing by the sum before the product with the values would take one more pass over all
    # pairs.
    weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weight.sum(axis=-1, keepdims=True).astype(value.dtype)
    return jnp.matmul(weight.astype(value.dtype), value) / total


def can_fuse(dtype: jax.typing.DTypeLike, head_width: int) -> bool:
    """Returns whether `fused` supports heads of this dtype and width K."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and head_width % 8 == 0 and head_width <= _WIDEST_HEAD


@functools.cache
def has_cudnn() -> bool:
    """Returns whether the first local device supports cuDNN's attention; starts the backend.

    It needs an NVIDIA GPU of compute capability 8.0 or more.
    """
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "").split(".")
    return capability[0].isdecimal() and int(capability[0]) >= 8  # AMD has names such as gfx90a


def fused(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    bias: Float[Array, "B N"] | None,
) -> Float[Array, "B N H K"]:
    """Computes the same attention as `exact` up to rounding, with axes `(B, N, H, K)`.

    It uses cuDNN if the program is compiled for an NVIDIA GPU. Tracing it needs cuDNN on this
    machine. cuDNN gives no gradient of the bias.

    Args:
      query: `(B, N, H, K)`, of a dtype and width that `can_fuse` accepts.
      key: as `query`.
      value: as `query`.
      bias: from `key_bias`.

    Returns:
      `(B, N, H, K)`.
    """
    return jax.lax.platform_dependent(query, key, value, bias, cuda=_cudnn, default=_elsewhere)


def _elsewhere(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    bias: Float[Array, "B N"] | None,
) -> Float[Array, "B N H K"]:
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return exact(query, key, value, bias).swapaxes(1, 2)


@jax.custom_vjp
def _cudnn(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    bias: Float[Array, "B N"] | None,
) -> Float[Array, "B N H K"]:
    return _call_cudnn(query, key, value, bias)


def _call_cudnn(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    bias: Float[Array, "B N"] | None,
    num_keys: int | None = None,
) -> Float[Array, "B N H K"]:
    batch, num = query.shape[:2]
    if bias is not None:
        lowest = float(jnp.finfo(query.dtype).min / 2)  # float16 cannot hold _HALTED_KEY_BIAS
        bias = jnp.maximum(bias, lowest).astype(query.dtype)
        bias = jnp.broadcast_to(bias[:, None, None, :], (batch, 1, num, num))
    lengths = None if num_keys is None else jnp.full(batch, num_keys, jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, bias, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _forward(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    bias: Float[Array, "B N"] | None,
) -> tuple[Float[Array, "B N H K"], Callable[..., tuple]]:
    """Pads an odd number of tokens by a masked one, because JAX's gradient needs an even number."""
    num = query.shape[1]
    if num % 2 and bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 1)), constant_values=_HALTED_KEY_BIAS)

    def run(
        query: Float[Array, "B N H K"], key: Float[Array, "B N H K"], value: Float[Array, "B N H K"]
    ) -> Float[Array, "B N H K"]:
        if num % 2 == 0:
            return _call_cudnn(query, key, value, bias)
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
        return _call_cudnn(query, key, value, bias, num if bias is None else None)[:, :num]

    return jax.vjp(run, query, key, value)


def _backward(vjp: Callable[..., tuple], grad: Float[Array, "B N H K"]) -> tuple:
    return (*vjp(grad), None)


_cudnn.defvjp(_forward, _backward)
