"""What a halted token knew is not lost: it goes into the token most like it; and tokens that are
like others halt first.

A-ViT drops a token once it halts. Here it becomes part of the most similar token that goes on: the
two become their mean, weighted by how many patches each stands for, and attention counts a token as
often as it has patches. A token is missed least
where another says the same: so the halting score may look at its cosine with those before it, and
of two alike one stays. Pure functions; read-out tokens neither merge nor take in others.

Reference: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, for the mean and
for attention by size; there a fixed number of pairs merges in each layer.
"""

import flax
import jax
import jax.numpy as jnp

from avit_jax.core import halting


@flax.struct.dataclass(kw_only=True)
class Notes:
    """What merging has to know of tokens `(B, N)`, beside which are active.

    Attributes:
      size: patches that each stands for, at least float32.
      cumulative: sum of the scores so far, as in `halting.HaltingState`.
      is_patch: bool, whether it is a patch token.
    """

    size: jax.Array
    cumulative: jax.Array
    is_patch: jax.Array


def note(size: jax.Array | None, state: halting.HaltingState, num_readout: int) -> Notes | None:
    """Notes on tokens of which the first `num_readout` are no patches; None where there are no
    sizes, as they do not merge.
    """
    if size is None:
        return None
    is_patch = jnp.broadcast_to(jnp.arange(size.shape[1]) >= num_readout, size.shape)
    return Notes(size=size, cumulative=state.cumulative, is_patch=is_patch)


def pack(tokens: jax.Array, notes: Notes, score: jax.Array | None = None) -> jax.Array:
    """Tokens `(B, N, D)` with their notes and scores as more channels, `(B, N, D + 4)`, at least
    float32: they move as one.
    """
    size = notes.size
    score = jnp.zeros_like(size) if score is None else score.astype(size.dtype)
    noted = jnp.stack([size, notes.cumulative, notes.is_patch.astype(size.dtype), score], axis=-1)
    return jnp.concatenate([tokens.astype(size.dtype), noted], axis=-1)


def unpack(packed: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, Notes, jax.Array]:
    """Tokens, in their dtype, notes and scores; where no token has been packed, and all is 0, the
    size is 1.
    """
    size, cumulative, is_patch, score = jnp.unstack(packed[..., -4:], axis=-1)
    notes = Notes(size=jnp.maximum(size, 1.0), cumulative=cumulative, is_patch=is_patch > 0)
    return packed[..., :-4].astype(dtype), notes, score


def similarity(tokens: jax.Array, channels: int) -> jax.Array:
    """Cosine of each pair of tokens `(B, N, D)`, by their first channels alone; `(B, N, N)`, at
    least float32, no gradient.
    """
    x = jax.lax.stop_gradient(tokens[..., :channels])
    x = x.astype(halting.at_least_float32(x.dtype))
    x = x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + jnp.finfo(x.dtype).tiny)
    # Exactly, on every device: a gate may multiply a difference by 50.
    return jnp.matmul(x, x.swapaxes(-2, -1), precision=jax.lax.Precision.HIGHEST)


def redundancy(similar: jax.Array, active: jax.Array) -> jax.Array:
    """Cosine of each token with the most similar active one before it.

    Args:
      similar: `(B, N, N)`, of `similarity`.
      active: `(B, N)` bool, tokens that are compared.

    Returns:
      `(B, N)` from -1 (none is before it) to 1; of tokens that are not active 0.
    """
    place = jnp.arange(active.shape[-1])
    before = (place[:, None] > place[None, :])[None] & active[:, None, :]
    return jnp.where(active, jnp.where(before, similar, -1.0).max(axis=-1), 0.0)


def merge(
    tokens: jax.Array, size: jax.Array, similar: jax.Array, *, leaves: jax.Array, stays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each token that leaves goes into the most similar one that stays; if none stays, nothing
    changes.

    Args:
      tokens: `(B, N, D)`.
      size: `(B, N)` patches that each token stands for, at least float32.
      similar: `(B, N, N)`, of `similarity`.
      leaves: `(B, N)` bool.
      stays: `(B, N)` bool, tokens that take in others.

    Returns:
      Tokens and sizes afterwards; those of tokens that do not stay are as before.
    """
    similar = jnp.where(stays[:, None, :], similar, -jnp.inf)
    most = similar == similar.max(axis=-1, keepdims=True)
    into = jnp.where(most, jnp.arange(most.shape[-1]), most.shape[-1]).min(
        axis=-1
    )  # argmax, faster on CPU
    weight = jnp.where(leaves & stays.any(axis=-1, keepdims=True), size, 0.0)
    add = jax.vmap(lambda into, values: jnp.zeros_like(values).at[into].add(values))
    more, sums = add(into, weight), add(into, weight[..., None] * tokens.astype(size.dtype))
    total = size + more
    change = (sums - more[..., None] * tokens.astype(size.dtype)) / jnp.maximum(total, 1.0)[
        ..., None
    ]
    return tokens + change.astype(tokens.dtype), total
