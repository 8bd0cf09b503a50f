"""Attention maps: how much attention each place of the grid gets. Axes as in `models.vit`."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from avit_jax.core import halting
from avit_jax.core.arrays import Array
from avit_jax.kernels import attention as attention_lib
from avit_jax.models import block, executors, forward, vit


def attention_maps(model: vit.AViT, params: Any, images: Array, layer: int = -1) -> jax.Array:
    """Returns the attention weights of the token that the classifier reads, in one layer.

    With `pool` "token", this is the class token. With "avg" or "max", the weights are means over
    the patch tokens that are active in the layer. With "map", they are the weights of the learned
    query after the last layer. This query reads halted tokens too.

    Args:
      model: the network.
      params: its parameters.
      images: `(B, H, W, C)` float, normalized, as for `model.apply`.
      layer: index of the layer, from 0 to L - 1, or from -L to -1; with "map" only the last one.

    Returns:
      `(B, heads, rows, columns)`, at least float32. Except with "map", halted tokens have weight 0,
      and all weights are 0 if all tokens that ask have halted. The sum over the grid is at most 1,
      because prefix tokens have weights too. A token into which others merged has the weight of all
      its patches.

    Raises:
      ValueError: there is no such layer, or the images do not fit the model.

    Examples:
      >>> maps = avit_jax.attention_maps(model, params, images).mean(axis=1)
    """
    if not -model.depth <= layer < model.depth:
        raise ValueError(
            f"layer must be at least {-model.depth} and below {model.depth}; got {layer}."
        )
    layer %= model.depth
    if model.pool == "map" and layer != model.depth - 1:
        raise ValueError(
            'with pool="map", only the query after the last layer has a map: set layer=-1.'
        )
    return _jitted(model.clone(removal=None), layer, params, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jitted(model: vit.AViT, layer: int, params: Any, images: jax.Array) -> jax.Array:
    run: Any = model.apply
    weights = run({"params": params}, images, layer, method=_weights)
    return weights.reshape(*weights.shape[:2], *model.grid)


def _weights(network: vit.AViT, images: jax.Array, layer: int) -> jax.Array:
    """Returns the weights of all patches, `(B, H, patches)`."""
    cell = block.Block(**network.block_kwargs, parent=None)
    prefix = network.num_prefix_tokens
    carry = forward.start(cell, network.embed(images), prefix, network.readout)
    params = block.cast(network.layers.variables["params"], network.dtype)
    gate = None if network.halting is None else network.gate.gate()
    run = functools.partial(forward.run, cell, executors.masked, gate)
    if network.pool == "map":
        return _of_query(network, run(carry, params)[0].readout)
    before, own = (jax.tree.map(operator.itemgetter(i), params) for i in (slice(layer), layer))
    if gate is None:
        carry, _ = run(carry, before)
    else:  # `run` would halt all tokens in its last layer
        step = functools.partial(forward.step, cell, executors.masked, gate, is_last=False)
        carry, _ = jax.lax.scan(step, carry, before)
    active = carry.state.active
    queries = slice(1) if network.pool == "token" else slice(prefix, None)
    apply: Any = cell.apply
    weights = apply(
        {"params": own}, carry.x, active, carry.size, queries, method=_of_layer
    )  # (B, H, queries, N)
    asks = active[:, queries].astype(weights.dtype)
    asks = asks / jnp.maximum(asks.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bhqn,bq->bhn", weights, asks)[..., prefix:]


def _of_layer(
    cell: block.Block, x: jax.Array, active: jax.Array, size: jax.Array | None, queries: slice
) -> jax.Array:
    a = cell.norm1(x) * active[..., None].astype(x.dtype)
    query, key, _ = cell.heads(a)
    return _softmax(query[:, :, queries], key, attention_lib.key_bias(active, size))


def _of_query(network: vit.AViT, readout: jax.Array) -> jax.Array:
    """Returns the weights of SigLIP's query, see `attention_pool`."""
    p = network.attn_pool.variables["params"]
    tokens = network.norm(readout).astype(p["latent"].dtype)
    kernel, bias = (p["kv"][name][..., : network.width] for name in ("kernel", "bias"))
    key = tokens @ kernel + bias.reshape(1, 1, -1)
    query = p["latent"] @ p["q"]["kernel"] + p["q"]["bias"].reshape(1, 1, -1)
    query, key = (
        x.reshape(*x.shape[:2], network.num_heads, -1).swapaxes(1, 2) for x in (query, key)
    )
    return _softmax(query, key, None)[:, :, 0]


def _softmax(query: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Returns the attention weights `(B, H, Q, N)`, which `attention_lib.exact` does not keep."""
    logits = jnp.matmul(query * query.shape[-1] ** -0.5, key.swapaxes(-2, -1))
    logits = logits.astype(halting.at_least_float32(logits.dtype))
    return jax.nn.softmax(logits if bias is None else logits + bias[:, None, None], axis=-1)
