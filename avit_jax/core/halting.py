"""The halting rule of A-ViT: pure functions over one pytree state.

Every token carries a running sum of its halting scores. While the sum stays below `1 - epsilon` the
token computes; at the layer where it gets there (or at the last layer) the token halts, and the
share of the output that is still missing, the remainder, goes to that layer. The functions hold no
parameters and know no module library: use them under `jit`, `vmap`, `grad`, `scan` or `pmap`, with
any leading batch shape `...`. Sums are float32 (float64 for float64 tokens), whatever the dtype of
the tokens.

Reference: Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer", CVPR 2022 (arXiv
2112.07658), called [A-ViT] below; the remainder is that of Graves, "Adaptive Computation Time"
(arXiv 1603.08983).

Example:
  state = halting.init(tokens.shape[:-1])
  output = 0.0
  for layer in range(num_layers):
    tokens = block(tokens, state.active)
    score = halting.score(tokens, gamma=5.0, beta=-3.0)
    state, weight = halting.accumulate(state, score, epsilon=0.01, is_last=layer == num_layers - 1)
    output += weight[..., None] * tokens
"""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FARTHEST = 50.0  # value of a token's gate channel that no network reaches
_MANY_LAYERS = 1000  # more than any network has
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaltingConfig:
    """The gate and its threshold.

    Attributes:
      gamma: gate scale, multiplies the gate channel.
      beta: gate shift, added after the scale; negative, so that tokens start by computing.
      epsilon: threshold slack in (0, 1): a token halts once its scores sum to `1 - epsilon`.
      channel: index of the token channel that is the gate; negative counts from the end.
      learnable: whether the Flax modules hold gamma and beta as two scalar parameters that start at
        the values above.
      merge: whether a patch token that halts becomes part of the most similar one that goes on, in
        place of being gone; of `AViT`, see `merging`.
      redundancy: what the gate of a patch token gains for each unit of its cosine with the most
        similar one before it, by the first K channels, where tokens merge. A token then halts about
        where the cosine passes -beta / redundancy; the class token, to which nothing is added,
        hardly ever does before the last layer.

    Raises:
      ValueError: epsilon outside (0, 1), gamma or beta not finite, redundancy below 0, or above it
        without merging; or values that float32 cannot hold. A gate by which nothing or everything
        halts is legal, and warned about.
    """

    gamma: float = 10.0
    beta: float = -30.0
    epsilon: float = 0.01
    channel: int = 0
    learnable: bool = False
    merge: bool = False
    redundancy: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(
                f"epsilon must lie between 0 and 1, both excluded; got {self.epsilon}."
            )
        if not (math.isfinite(self.gamma) and math.isfinite(self.beta)):
            raise ValueError(
                f"gamma and beta must be finite; got gamma={self.gamma}, beta={self.beta}."
            )
        if not (self.redundancy >= 0.0 and math.isfinite(self.redundancy)):
            raise ValueError(f"redundancy must be at least 0, and finite; got {self.redundancy}.")
        if self.redundancy and not self.merge:
            raise ValueError("redundancy is for tokens that merge: set merge=True too.")
        if not (np.float32(1.0 - self.epsilon) < 1.0 and np.float32(self.epsilon) < 1.0):
            raise ValueError(
                "epsilon must lie between 1e-7 and 1 - 1e-7, else float32 rounds it off; got "
                f"{self.epsilon}."
            )
        largest = abs(self.gamma) * _FARTHEST + abs(self.beta) + self.redundancy
        if not largest < float(np.finfo(np.float32).max):
            raise ValueError(
                "gamma * 50 + beta + redundancy must be finite in float32; got "
                f"gamma={self.gamma}, beta={self.beta}, "
                f"redundancy={self.redundancy}."
            )
        useless = fault(
            gamma=self.gamma, beta=self.beta, epsilon=self.epsilon, redundancy=self.redundancy
        )
        if useless:
            _logger.warning("%s", useless)


def fault(
    *,
    gamma: float,
    beta: float,
    epsilon: float,
    redundancy: float,
    num_layers: int = _MANY_LAYERS,
    slack: float = 0.0,
) -> str:
    """What makes a gate useless, whatever the weights of the network; empty if nothing.

    Args:
      gamma: as in `HaltingConfig`, like the next three, and finite.
      beta: see there.
      epsilon: see there.
      redundancy: see there.
      num_layers: L; default: more than any network has.
      slack: how far training may still move beta.
    """
    score = (1.0 - epsilon) / max(num_layers - 1, 1)  # in every layer but the last
    needed = math.log(score / (1.0 - score)) - beta - redundancy
    gate, farthest = f"gamma={gamma} and beta={beta}", abs(gamma) * _FARTHEST
    if not needed - slack <= farthest:
        gate += f" and redundancy={redundancy}" * (redundancy > 0)
        return (
            f"no token can ever halt with {gate}: its gate channel would have to reach "
            f"{needed / abs(gamma) if gamma else math.inf:.3g}; make beta less negative or gamma "
            "larger."
        )
    # The class token has no redundancy, and once it has halted the image is finished.
    excess = beta - math.log((1.0 - epsilon) / epsilon)
    if excess - slack >= farthest:
        return (
            f"every image is finished after the first layer with {gate}: to go on, the gate "
            "channel of its class token would "
            f"have to reach {excess / abs(gamma) if gamma else math.inf:.3g}; make beta negative."
        )
    return ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HaltingState:
    """What halting remembers of each token between layers; all fields have the shape `(..., N)`.

    Attributes:
      cumulative: float32, sum of the scores so far, up to and including the halting layer.
      remainder: float32 in [epsilon, 1], 1 minus the scores before the halting layer; r of [A-ViT]
        once the token has halted.
      active: bool, whether the token still computes in the next layer.
      depth: int32, layers the token has been through; N of [A-ViT] once the token has halted.
    """

    cumulative: jax.Array
    remainder: jax.Array
    active: jax.Array
    depth: jax.Array


def at_least_float32(dtype: jax.typing.DTypeLike) -> Any:
    """The dtype of sums over values of a dtype, also if JAX is told to promote no dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def init(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> HaltingState:
    """Returns the state before the first layer: all tokens active.

    Args:
      shape: `(..., N)`, the shape of the tokens without their channels.
      dtype: dtype of the tokens; sums have it, but at least float32.
    """
    dtype = at_least_float32(dtype)
    return HaltingState(
        cumulative=jnp.zeros(shape, dtype),
        remainder=jnp.ones(shape, dtype),
        active=jnp.ones(shape, bool),
        depth=jnp.zeros(shape, jnp.int32),
    )


def score(
    tokens: jax.Array, *, gamma: jax.typing.ArrayLike, beta: jax.typing.ArrayLike, channel: int = 0
) -> jax.Array:
    """Halting score h = sigmoid(gamma * t_e + beta) of each token after a layer.

    Args:
      tokens: `(..., N, D)` outputs of the layer, any float dtype.
      gamma: gate scale, a scalar; may be traced, for a gate that learns.
      beta: gate shift, a scalar, or `(..., N)`; may be traced.
      channel: e, the one channel that is read.

    Returns:
      `(..., N)` scores in (0, 1), at least float32.

    Raises:
      ValueError: tokens have no such channel.

    Reference: [A-ViT] section 3, the definition of h_k^l.
    """
    width = tokens.shape[-1]
    if not -width <= channel < width:  # an index beyond would be clamped
        raise ValueError(f"halting channel {channel} is not among the {width} channels of a token.")
    gate = tokens[..., channel]
    gate = gate.astype(at_least_float32(gate.dtype))
    return jax.nn.sigmoid(gamma * gate + beta)


def goes_on(cumulative: jax.Array, epsilon: float) -> jax.Array:
    """Whether a token whose scores sum to `cumulative` goes on."""
    return cumulative < 1.0 - epsilon


def accumulate(
    state: HaltingState, score: jax.Array, *, epsilon: float, is_last: jax.typing.ArrayLike = False
) -> tuple[HaltingState, jax.Array]:
    """One layer of halting: adds the scores, halts who is done and weighs the layer's output.

    A sum of exactly `1 - epsilon` halts. Of a token that has halted, neither the state nor the
    weight (0) depends on `score` any more. The layer at which a token halts has no gradient; the
    remainder has, through the scores before that layer.

    Args:
      state: state before the layer, from `init` or the layer before.
      score: `(..., N)` scores of the layer's output, from `score`.
      epsilon: threshold slack in (0, 1).
      is_last: whether this is the last layer, where every score counts as 1 and all halt; may be
        traced.

    Returns:
      The state after the layer, and the weight p `(..., N)` of the layer's output for each token.
      Over the layers the weights of a token sum to 1.

    Reference: [A-ViT] section 3: N_k, r_k and p_k^l.
    """
    score = jnp.where(is_last, jnp.ones_like(score), score)  # h^L = 1
    cumulative = state.cumulative + jnp.where(state.active, score, 0.0)
    active = state.active & goes_on(cumulative, epsilon)  # l < N_k
    weight = jnp.where(
        active, score, jnp.where(state.active, state.remainder, 0.0)
    )  # p: h, then r, then 0
    remainder = state.remainder - jnp.where(active, score, 0.0)  # r = 1 - sum of h for l < N_k
    depth = state.depth + state.active.astype(
        state.depth.dtype
    )  # N_k = the number of layers entered
    return HaltingState(
        cumulative=cumulative, remainder=remainder, active=active, depth=depth
    ), weight


def ponder_cost(state: HaltingState) -> jax.Array:
    """Ponder cost rho = N + r `(..., N)` after the last layer, in layers; only r has a gradient.

    Reference: [A-ViT] section 3, the ponder loss; Graves, equation 11.
    """
    return state.depth.astype(state.remainder.dtype) + state.remainder


def score_by_layer(score: jax.Array, active: jax.Array) -> jax.Array:
    """Mean halting score of each layer over all tokens, those that have halted counting as 0.

    Args:
      score: `(L, ..., N)` raw scores.
      active: `(L, ..., N)` bool, active at the layer's input.

    Returns:
      `(L,)`; divided by its sum it is H, the distribution over depth that the prior looks at.

    Reference: [A-ViT] section 3, the distributional prior.
    """
    return jnp.where(active, score, 0.0).mean(axis=tuple(range(1, score.ndim)))


def depth_prior(num_layers: int, *, center: float, width: float = 1.0) -> jax.Array:
    """Gaussian over layers 1..L, normalised to sum 1.

    Args:
      num_layers: L.
      center: layer at which the prior peaks, counted from 1; need not be whole.
      width: standard deviation, in layers, above 0.

    Returns:
      Logarithm of the prior `(L,)`, float32: finite even where the prior itself underflows.

    Reference: [A-ViT] section 3, the distributional prior.
    """
    layer = jnp.arange(1, num_layers + 1, dtype=jnp.float32)
    return jax.nn.log_softmax(-0.5 * ((layer - center) / width) ** 2)
