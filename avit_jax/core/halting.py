"""The halting rule of A-ViT: pure functions over one pytree state.

Each token sums its halting scores over the layers. It is active while the sum is below
`1 - epsilon`. A token halts in the first layer in which the sum reaches `1 - epsilon`, or in the
last layer. The final output of a token is a weighted average of its outputs over the layers. The
weight of a layer is the token's score in it. The weight of the halting layer is the remainder, so
the weights sum to 1.

The functions have no parameters and work with any module library, under `jit`, `vmap`, `grad`,
`scan` and `pmap`, and with any leading batch shape `...`. In types, `*N` are the axes `(..., N)`.
Sums are at least float32, whatever the dtype of the tokens.

Reference: Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer", CVPR 2022 (arXiv
2112.07658), called [A-ViT] below; the remainder is that of Graves, "Adaptive Computation Time"
(arXiv 1603.08983).

Examples:
  >>> state = halting.init(tokens.shape[:-1])
  >>> output = 0.0
  >>> for layer in range(num_layers):
  ...   tokens = block(tokens, state.active)
  ...   score = halting.score(tokens, gamma=5.0, beta=-3.0)
  ...   is_last = layer == num_layers - 1
  ...   state, weight = halting.accumulate(state, score, epsilon=0.01, is_last=is_last)
  ...   output += weight[..., None] * tokens
"""

import dataclasses
import logging
import math
from typing import SupportsIndex, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Float32, Int32, Shaped

from avit_jax.core.arrays import Array

_LARGEST_CHANNEL = 50.0  # assumed limit of the gate channel of a token
_MANY_LAYERS = 1000  # more than any network has
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaltingConfig:
    """The gate and its threshold.

    Attributes:
      gamma: gate scale, multiplies the gate channel.
      beta: gate bias, added after scaling; negative, so that tokens are active at first.
      epsilon: a token halts once its scores sum to `1 - epsilon`; in (0, 1).
      channel: index of the token channel that the gate reads; negative counts from the end.
      learnable: whether the Flax modules hold gamma and beta as two scalar parameters, which start
        at the values above.
      merge: whether `AViT` merges a patch token that halts into the most similar one that keeps
        running, instead of dropping it; see `merging`.
      redundancy: weight of redundancy in the halting logit of patch tokens; only with merging. The
        redundancy of a token is its cosine similarity to the most similar earlier active patch
        token, in the first D / H channels. The first active patch token has -1. Redundant tokens
        halt first, roughly once the similarity exceeds `-beta / redundancy`.

    Raises:
      ValueError: epsilon is outside (0, 1); gamma or beta is not finite; redundancy is negative, or
        is positive without merging; or a value is out of the range of float32. A useless gate, see
        `explain_useless_gate`, only gives a warning in the log.
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
            raise ValueError(f"redundancy must be finite and at least 0; got {self.redundancy}.")
        if self.redundancy and not self.merge:
            raise ValueError("redundancy has an effect only with merging: set merge=True too.")
        if not (np.float32(1.0 - self.epsilon) < 1.0 and np.float32(self.epsilon) < 1.0):
            raise ValueError(
                "epsilon is too close to 0 or 1 for float32: set it between 1e-7 and 1 - 1e-7; got "
                f"{self.epsilon}."
            )
        largest = abs(self.gamma) * _LARGEST_CHANNEL + abs(self.beta) + self.redundancy
        if not largest < float(np.finfo(np.float32).max):
            raise ValueError(
                "50 * |gamma| + |beta| + redundancy must be finite in float32; got "
                f"gamma={self.gamma}, beta={self.beta}, "
                f"redundancy={self.redundancy}."
            )
        useless = explain_useless_gate(
            gamma=self.gamma, beta=self.beta, epsilon=self.epsilon, redundancy=self.redundancy
        )
        if useless:
            _logger.warning("%s", useless)


def explain_useless_gate(
    *,
    gamma: float,
    beta: float,
    epsilon: float,
    redundancy: float,
    num_layers: int = _MANY_LAYERS,
    slack: float = 0.0,
) -> str:
    """Returns why a gate is useless; "" if it is not useless.

    A gate is useless if no token can halt before the last layer, or if every image is finished
    after the first layer. The function assumes gate channels between -50 and 50.

    Args:
      gamma: as in `HaltingConfig`, and finite.
      beta: as in `HaltingConfig`, and finite.
      epsilon: as in `HaltingConfig`.
      redundancy: as in `HaltingConfig`.
      num_layers: L; default: more than any network has.
      slack: largest change of beta by the rest of the training.
    """
    score = (1.0 - epsilon) / max(num_layers - 1, 1)  # in all layers but the last
    needed = math.log(score / (1.0 - score)) - beta - redundancy
    gate, largest = f"gamma={gamma} and beta={beta}", abs(gamma) * _LARGEST_CHANNEL
    if not needed - slack <= largest:
        gate += f" and redundancy={redundancy}" * (redundancy > 0)
        return (
            f"no token can halt before the last layer with {gate}: gamma times its gate channel "
            f"would have to reach {needed:.3g}; raise beta or the magnitude of gamma."
        )
    # A token without redundancy, such as the class token, halts first of all if beta is large.
    excess = beta - math.log((1.0 - epsilon) / epsilon)
    if excess - slack >= largest:
        return (
            f"every image is finished after the first layer with {gate}: a token "
            f"continues only if gamma times its gate channel is below {-excess:.3g}; make beta "
            "negative."
        )
    return ""


@no_type_check  # JAX also fills it with leaves of other types and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HaltingState:
    """The state of each token between two layers; all fields have the shape `(..., N)`.

    Attributes:
      cumulative: at least float32, sum of the scores up to and including the halting layer.
      remainder: at least float32, in [epsilon, 1]; 1 minus the sum of the scores before the halting
        layer. It is r of [A-ViT] once the token has halted.
      active: bool, whether the token is active in the next layer.
      depth: int32, number of layers in which the token was active. It is N of [A-ViT] once the
        token has halted.
    """

    cumulative: Float[Array, "*N"]
    remainder: Float[Array, "*N"]
    active: Bool[Array, "*N"]
    depth: Int32[Array, "*N"]


def at_least_float32(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns the wider of this dtype and float32, for sums."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


@no_type_check  # a symbolic batch is no int
def init(
    shape: tuple[SupportsIndex, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> HaltingState:
    """Returns the state before the first layer: all tokens active.

    Args:
      shape: `(..., N)`, the shape of the tokens without their channels.
      dtype: of the tokens. Sums have this dtype or float32, whichever is wider.
    """
    dtype = at_least_float32(dtype)
    return HaltingState(
        cumulative=jnp.zeros(shape, dtype),
        remainder=jnp.ones(shape, dtype),
        active=jnp.ones(shape, bool),
        depth=jnp.zeros(shape, jnp.int32),
    )


def score(
    tokens: Float[Array, "*N D"],
    *,
    gamma: Shaped[ArrayLike, ""],
    beta: Shaped[ArrayLike, ""] | Shaped[ArrayLike, "*N"],
    channel: int = 0,
) -> Float[Array, "*N"]:
    """Computes the halting score h = sigmoid(gamma * t_e + beta) of each token after a layer.

    Args:
      tokens: `(..., N, D)` outputs of the layer, any float dtype.
      gamma: gate scale, a scalar; may be traced.
      beta: gate bias, a scalar or `(..., N)`; may be traced.
      channel: e, the channel that the gate reads.

    Returns:
      `(..., N)` scores in [0, 1], at least float32.

    Raises:
      ValueError: tokens have no such channel.

    Reference: [A-ViT] section 3, the definition of h_k^l.
    """
    width = tokens.shape[-1]
    if not -width <= channel < width:  # JAX would clamp the index
        raise ValueError(
            f"halting channel {channel} is not among the {width} channels of a token: set a number "
            f"from {-width} to {width - 1}."
        )
    return score_of_gate(tokens[..., channel], gamma=gamma, beta=beta)


def score_of_gate(gate: Array, *, gamma: jax.typing.ArrayLike, beta: jax.typing.ArrayLike) -> Array:
    """Computes `score` from the gate channel of the tokens, of any shape and float dtype."""
    gate = gate.astype(at_least_float32(gate.dtype))
    return jax.nn.sigmoid(gamma * gate + beta)


def keeps_running(
    cumulative: Float[Array, "*N"], epsilon: Shaped[ArrayLike, ""]
) -> Bool[Array, "*N"]:
    """Returns whether each token stays active, given the sum of its scores so far."""
    return cumulative < 1.0 - epsilon


def accumulate(
    state: HaltingState,
    score: Float[Array, "*N"],
    *,
    epsilon: Shaped[ArrayLike, ""],
    is_last: Shaped[ArrayLike, ""] | Shaped[ArrayLike, "*N"] = False,
) -> tuple[HaltingState, Float[Array, "*N"]]:
    """Adds the scores of a layer, decides which tokens halt, and weights the layer's output.

    A token whose sum is exactly `1 - epsilon` halts. A halted token keeps its state, and its weight
    is 0, whatever its score. The index of the halting layer has no gradient. The remainder has one,
    through the scores before that layer.

    Args:
      state: from `init` or the layer before.
      score: `(..., N)` scores of the layer's output, from `score`.
      epsilon: a token halts once its scores sum to `1 - epsilon`.
      is_last: whether this is the last layer, in which all scores are 1 and all tokens halt; may be
        traced.

    Returns:
      The state after the layer, and the weight p `(..., N)` of the layer's output. The weights of a
      token sum to 1 over the layers.

    Reference: [A-ViT] section 3: N_k, r_k and p_k^l.
    """
    score = jnp.where(is_last, jnp.ones_like(score), score)  # h^L = 1
    cumulative = state.cumulative + jnp.where(state.active, score, 0.0)
    active = state.active & keeps_running(cumulative, epsilon)  # l < N_k
    # p: h before the halting layer, r in it, then 0.
    weight = jnp.where(active, score, jnp.where(state.active, state.remainder, 0.0))
    remainder = state.remainder - jnp.where(active, score, 0.0)  # r = 1 - sum of h for l < N_k
    depth = state.depth + state.active.astype(state.depth.dtype)  # N_k
    after = HaltingState(cumulative=cumulative, remainder=remainder, active=active, depth=depth)
    return after, weight


def ponder_cost(state: HaltingState) -> Float[Array, "*N"]:
    """Returns the ponder cost rho = N + r `(..., N)` in layers; only r has a gradient.

    Args:
      state: after the last layer.

    Reference: [A-ViT] section 3, the ponder loss; Graves, equation 11.
    """
    return state.depth.astype(state.remainder.dtype) + state.remainder


def score_by_layer(score: Float[Array, "L *N"], active: Bool[Array, "L *N"]) -> Float[Array, "L"]:
    """Returns the mean halting score of each layer over all tokens; halted tokens count as 0.

    Args:
      score: `(L, ..., N)` scores. For H of [A-ViT], set those of the last layer to 1.
      active: `(L, ..., N)` bool, at the input of each layer.

    Returns:
      `(L,)` of the dtype of the scores. Divided by its sum, it is a distribution over depth.

    Reference: [A-ViT] section 3, the distributional prior.
    """
    return jnp.where(active, score, 0.0).mean(axis=tuple(range(1, score.ndim)))


def depth_prior(
    num_layers: int, *, center: Shaped[ArrayLike, ""], width: Shaped[ArrayLike, ""] = 1.0
) -> Float32[Array, "L"]:
    """Returns the logarithm of a discrete Gaussian over layers 1 to L, normalized to sum to 1.

    Args:
      num_layers: L.
      center: layer at which the prior peaks, counted from 1; may be fractional.
      width: standard deviation in layers, positive.

    Returns:
      `(L,)` float32; finite even if the prior itself underflows.

    Reference: [A-ViT] section 3, the distributional prior.
    """
    layer = jnp.arange(1, num_layers + 1, dtype=jnp.float32)
    return jax.nn.log_softmax(-0.5 * ((layer - center) / width) ** 2)
