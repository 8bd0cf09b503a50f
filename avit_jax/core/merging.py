"""Merges halted tokens into active ones, and measures how redundant a token is.

A-ViT drops a token once it halts. With merging, a halted patch token becomes part of the most
similar patch token that keeps running. The result is the mean of the two, weighted by the number of
patches that each stands for. In attention, a token of size s counts as s keys. The
halting score may depend on redundancy. Then one of two similar tokens halts first.

Prefix tokens do not merge. All functions are pure.

Reference: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, called [ToMe], for
the weighted mean and for attention by size. [ToMe] merges a fixed number of pairs in each layer.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float, Shaped

from avit_jax.core import halting
from avit_jax.core.arrays import Array


@no_type_check  # JAX also fills it with leaves of other types and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What merging needs to know of each token `(B, N)`, besides which tokens are active.

    Attributes:
      size: number of patches that the token stands for, at least float32.
      cumulative: sum of its scores so far, as in `halting.HaltingState`.
      is_patch: bool, False for prefix tokens.
      index: index of the token in its image, of the dtype of the size; None if the caller does not
        need to know into which token each one merges.
    """

    size: Float[Array, "B N"]
    cumulative: Float[Array, "B N"]
    is_patch: Bool[Array, "B N"]
    index: Float[Array, "B N"] | None = None


def similarity(tokens: Float[Array, "B N D"], channels: int) -> Float[Array, "B N N"]:
    """Computes the cosine similarity of all pairs of tokens; it has no gradient.

    Args:
      tokens: `(B, N, D)`.
      channels: number of channels that are compared, the first ones.

    Returns:
      `(B, N, N)`, at least float32.
    """
    x = jax.lax.stop_gradient(tokens[..., :channels])
    x = x.astype(halting.at_least_float32(x.dtype))
    x = x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + jnp.finfo(x.dtype).tiny)
    # The gate amplifies rounding errors. So this product has full float32 precision on all devices.
    return jnp.matmul(x, x.swapaxes(-2, -1), precision=jax.lax.Precision.HIGHEST)


def redundancy(similar: Float[Array, "B N N"], active: Bool[Array, "B N"]) -> Float[Array, "B N"]:
    """Returns the cosine similarity of each token to the most similar active token before it.

    Args:
      similar: `(B, N, N)`, from `similarity`.
      active: `(B, N)` bool, tokens that are compared.

    Returns:
      `(B, N)` in [-1, 1]; -1 for the first active token, 0 for tokens that are not active.
    """
    place = jnp.arange(active.shape[-1])
    before = (place[:, None] > place[None, :])[None] & active[:, None, :]
    return jnp.where(active, jnp.where(before, similar, -1.0).max(axis=-1), 0.0)


def _target(similar: Array, kept: Array) -> Array:
    """Returns the index `(B, N)` of the most similar kept token; N if similarities are nan."""
    similar = jnp.where(kept[:, None, :], similar, -jnp.inf)
    most = similar == similar.max(axis=-1, keepdims=True)
    num_tokens = most.shape[-1]
    # The first of the most similar tokens, as argmax returns it. This is faster on a CPU.
    return jnp.where(most, jnp.arange(num_tokens), num_tokens).min(axis=-1)


def merge(
    tokens: Float[Array, "B N D"],
    size: Float[Array, "B N"],
    similar: Float[Array, "B N N"],
    *,
    merged: Bool[Array, "B N"],
    kept: Bool[Array, "B N"],
) -> tuple[Float[Array, "B N D"], Float[Array, "B N"]]:
    """Merges each token of `merged` into the most similar token of `kept` in its image.

    An image without kept tokens does not change.

    Args:
      tokens: `(B, N, D)`.
      size: `(B, N)` number of patches that each token stands for, at least float32.
      similar: `(B, N, N)`, from `similarity`.
      merged: `(B, N)` bool, tokens that merge into others.
      kept: `(B, N)` bool, tokens that others merge into.

    Returns:
      Tokens `(B, N, D)` and sizes `(B, N)`. Tokens that are not kept are unchanged.

    Reference: [ToMe] section 3.
    """
    target = _target(similar, kept)
    weight = jnp.where(merged & kept.any(axis=-1, keepdims=True), size, 0.0)
    image = jax.lax.broadcasted_iota(target.dtype, target.shape, 0)

    def add(target: Array, values: Array) -> Array:
        return jnp.zeros_like(values).at[image, target].add(values)

    wide = tokens.astype(size.dtype)
    more, sums = add(target, weight), add(target, weight[..., None] * wide)
    total = size + more
    change = (sums - more[..., None] * wide) / jnp.maximum(total, 1.0)[..., None]
    return tokens + change.astype(tokens.dtype), total


def score_and_merge(
    tokens: Float[Array, "B N D"],
    info: TokenInfo,
    active: Bool[Array, "B N"] | None,
    gate: tuple[Shaped[ArrayLike, ""], Shaped[ArrayLike, ""]],
    config: halting.HaltingConfig,
    channels: int,
) -> tuple[Float[Array, "B N D"], dict[str, Float[Array, "B N"]]]:
    """Scores the output of a layer, and merges the patch tokens that halt.

    Args:
      tokens: `(B, N, D)` outputs of the layer.
      info: of the tokens.
      active: `(B, N)` bool, at the input of the layer; None if all are.
      gate: gamma and beta.
      config: the gate and its threshold.
      channels: number of channels that are compared, the first ones.

    Returns:
      Tokens `(B, N, D)`, and a dictionary of arrays `(B, N)`: "score", "size" and, if `info` has an
      index, "target". The target is the index of the token into which a token merges. A token that
      does not merge has its own index.
    """
    patches = info.is_patch if active is None else info.is_patch & active
    similar = similarity(tokens, channels)
    gamma, beta = gate
    beta = beta + config.redundancy * redundancy(similar, patches)
    score = halting.score(tokens, gamma=gamma, beta=beta, channel=config.channel)
    running = halting.keeps_running(info.cumulative + score, config.epsilon)
    merged, kept = patches & ~running, patches & running
    tokens, size = merge(tokens, info.size, similar, merged=merged, kept=kept)
    values = {"score": score, "size": size}
    if info.index is not None:
        target = jnp.take_along_axis(info.index, _target(similar, kept), axis=1, mode="clip")
        merged &= kept.any(axis=-1, keepdims=True)
        values["target"] = jnp.where(merged, target, info.index)
    return tokens, values
