"""A layer of `vit_tpu`: its sizes, its packed weights, and what it computes inside the kernel.

Axes as in `vit`; n is a compiled number of tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from avit_jax.core.arrays import Array

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and constants of a network that are compiled into the kernel.

    Attributes:
      num_tokens: N.
      num_prefix_tokens: R.
      width: D.
      num_heads: H.
      mlp_width: channels of the MLP's hidden layer.
      depth: L.
      norm_eps: epsilon of the layer norms.
      epsilon: of halting.
      channel: that the gate reads; negative counts from the end.
      token_multiple: the kernel is compiled for multiples of it, see `token_counts`.
    """

    num_tokens: int
    num_prefix_tokens: int
    width: int
    num_heads: int
    mlp_width: int
    depth: int
    norm_eps: float
    epsilon: float
    channel: int
    token_multiple: int = 32

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.num_heads

    @property
    def group_width(self) -> int:
        """Lanes of a group of heads, which are padded to whole groups."""
        return max(self.head_width, LANES)

    @property
    def num_groups(self) -> int:
        """Groups of heads."""
        return -(-self.num_heads * self.head_width // self.group_width)

    def token_counts(self) -> tuple[int, ...]:
        """Returns the compiled numbers of tokens in ascending order; the last one holds N."""
        largest = -(-self.num_tokens // 16) * 16
        step = self.token_multiple * -(-largest // 256)
        return (*range(step, largest - step // 2 + 1, step), largest)


def pack(params: Mapping[str, Any], sizes: Sizes, dtype: jax.typing.DTypeLike) -> dict[str, Array]:
    """Returns the parameters of all layers as the kernel reads them.

    Heads are padded to whole groups. Queries are scaled by `K ** -0.5`, which is exact if K is a
    power of 4.

    Args:
      params: of all layers, stacked, as `AViT` holds them.
      sizes: of the network.
      dtype: of the products; norms and biases are float32.
    """
    heads, head_width = sizes.num_heads, sizes.head_width
    missing = sizes.num_groups * sizes.group_width // head_width - heads

    def pad(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], heads, head_width, *x.shape[axis + 1 :])
        widths = [(0, 0)] * len(shape)
        widths[axis] = (0, missing)
        x = jnp.pad(x.reshape(shape), widths)
        return x.reshape(*shape[:axis], -1, *shape[axis + 2 :])

    def pad_qkv(x: Array) -> Array:
        query, key, value = jnp.split(x.astype(jnp.float32), 3, axis=-1)
        parts = (query * head_width**-0.5, key, value)
        return jnp.concatenate([pad(part, part.ndim - 1) for part in parts], axis=-1)

    weights: dict[str, Array] = {}
    for name in ("qkv", "proj", "fc1", "fc2"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        if name == "qkv":
            kernel, bias = pad_qkv(kernel), pad_qkv(bias)
        if name == "proj":
            kernel = pad(kernel, 1)
        weights |= {name: kernel.astype(dtype), f"{name}_bias": bias}
    for name in ("norm1", "norm2"):
        weights |= {f"{name}_scale": params[name]["scale"], f"{name}_bias": params[name]["bias"]}
    rows = {name: x[:, None].astype(jnp.float32) for name, x in weights.items() if x.ndim == 2}
    return weights | rows


def dot(a: Array, b: Array, *, transposed: bool = False, exact: bool = False) -> Array:
    """Returns a @ b, or a @ b.T, in float32.

    Args:
      a: matrix in float32 or bfloat16.
      b: matrix of the same dtype.
      transposed: whether b is transposed.
      exact: whether the products of float32 numbers are not rounded to bfloat16 before. Otherwise,
        JAX's default precision decides.
    """
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if exact else None
    if a.dtype == jnp.bfloat16:  # its products are exact; Mosaic has no other precision for them
        precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * (jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale) + bias


def layer(
    x: Array, key_bias: Array, weights: Mapping[str, Any], index: Array, sizes: Sizes
) -> Array:
    """Runs a layer on the tokens `(n, D)` of an image, inside a kernel.

    Args:
      x: float32 or bfloat16.
      key_bias: `(1, n)` bias of each key.
      weights: from `pack`, or references to them.
      index: of the layer.
      sizes: of the network.
    """
    w = {name: functools.partial(ref.__getitem__, index) for name, ref in weights.items()}
    dtype = x.dtype
    a = _norm(x, w["norm1_scale"](), w["norm1_bias"](), sizes.norm_eps).astype(dtype)
    qkv = (dot(a, w["qkv"]()) + w["qkv_bias"]()).astype(dtype)
    a = dot(_attend(qkv, key_bias, sizes), w["proj"]()) + w["proj_bias"]()
    x = (x.astype(jnp.float32) + a).astype(dtype)
    a = _norm(x, w["norm2_scale"](), w["norm2_bias"](), sizes.norm_eps).astype(dtype)
    a = dot(a, w["fc1"]()) + w["fc1_bias"]()
    a = (0.5 * a * (1.0 + jax.lax.erf(a * 0.5**0.5))).astype(dtype)
    return (x.astype(jnp.float32) + dot(a, w["fc2"]()) + w["fc2_bias"]()).astype(dtype)


def _attend(qkv: Array, key_bias: Array, sizes: Sizes) -> Array:
    """Attention of all heads. The heads of a group share its lanes and differ by masks."""
    width, heads_of_group = sizes.group_width, sizes.group_width // sizes.head_width
    third = sizes.num_groups * width
    # Mosaic compiles `//` only if it knows the chip, which it does not on a machine without a TPU.
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    head = jax.lax.div(lane, jnp.full_like(lane, sizes.head_width))
    outputs = []
    for first in range(0, third, width):
        query, key, value = (qkv[:, i + first : i + first + width] for i in (0, third, 2 * third))
        out = jnp.zeros((), jnp.float32)
        for i in range(min(heads_of_group, sizes.num_heads - first // sizes.head_width)):
            own = head == i
            masked = query if heads_of_group == 1 else jnp.where(own, query, jnp.zeros_like(query))
            logits = dot(masked, key, transposed=True) + key_bias
            weight = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
            total = weight.sum(axis=-1, keepdims=True)
            values = dot(weight.astype(value.dtype), value) * (1.0 / total)
            out = jnp.where(own, values, out) if i else values
        outputs.append(out.astype(qkv.dtype))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
