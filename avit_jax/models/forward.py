"""The one forward pass over all layers. Axes as in `vit`.

An executor runs a layer: `masked` on all tokens, `Bucketed` on the active ones. The executor
affects neither which tokens halt, nor how outputs are averaged, nor the fields of `Aux`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from avit_jax.core import features as features_lib
from avit_jax.core import halting, merging, ragged
from avit_jax.core.plan import Plan
from avit_jax.core.ragged import Inputs
from avit_jax.models.block import Block, Gate

# (layer, params, x, values, inputs, active) -> (x, values), as `ragged.transform` without a plan.
Executor = Callable[..., tuple[jax.Array, Any]]


def masked(
    layer: ragged.Layer,
    params: Any,
    x: jax.Array,
    values: Any,
    inputs: Inputs,
    active: jax.Array,
) -> tuple[jax.Array, Any]:
    """Sets halted tokens to 0, then runs a layer on all tokens; arguments as `ragged.transform`.

    Outputs and values of halted tokens mean nothing.
    """
    del values
    # Straight-through: the gradient of halted tokens is not set to 0, as in the released code. It
    # is 0 anyway, unless the "official" prior reads halted tokens.
    x = x + jax.lax.stop_gradient(jnp.where(active[..., None], 0.0, -x).astype(x.dtype))
    return layer(params, x, inputs, active)


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """Runs a layer on the active tokens only; see `ragged.transform`.

    Attributes:
      plan: sizes of the buckets.
    """

    plan: Plan

    def __call__(self, layer: ragged.Layer, *args: Any) -> tuple[jax.Array, Any]:
        return ragged.transform(layer, self.plan, *args)


@flax.struct.dataclass(kw_only=True)
class Aux:
    """What the network computes besides the logits.

    Without halting, the score is 0, the depth is L and the ponder cost is L + 1. `adaptive.apply`
    also stops all tokens of an image once those that are read out have halted, because its logits
    are final. There, `active`, `depth` and `ponder_cost` reflect this earlier stop.

    Attributes:
      score: `(L, B, N)` halting scores, at least float32. Those of halted tokens mean nothing. With
        merging, the score is 1 in the last layer.
      active: `(L, B, N)` bool, whether the token is active in the layer.
      depth: `(B, N)` int32, number of layers in which the token is active.
      ponder_cost: `(B, N)` depth + remainder, in layers.
      class_output: `(B, D)` class token, averaged over layers, before the final norm. With pooling,
        the pooled patch tokens, each averaged over layers with its own weights; with "map" that is
        what the head reads.
      distillation_output: the same for the distillation token, None without one.
      macs: `(B,)` float32, MACs of each image if halted tokens are removed, without padding; see
        `flops.image_macs`.
      macs_padded: `(B,)` float32, MACs with the padding of `adaptive.apply`: rows without a token,
        and the image's share of empty places in its bucket. So it depends on the other images of
        the batch. None for other calls.
      features: `(B, rows, columns, D)` features of the patches, after the last norm unless the
        network has `fc_norm`; see `core.features`. None if not asked for.
    """

    score: jax.Array
    active: jax.Array
    depth: jax.Array
    ponder_cost: jax.Array
    class_output: jax.Array
    distillation_output: jax.Array | None = None
    macs: jax.Array | None = None
    macs_padded: jax.Array | None = None
    features: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What one layer hands to the next.

    Attributes:
      x: `(B, N, D)` tokens.
      state: of halting, fields `(B, N)`.
      readout: `(B, M, D)` weighted sum of the outputs of the M tokens that are read out, over the
        layers so far.
      size: `(B, N)` number of patches that each token stands for; None without merging.
      num_prefix_tokens: R.
      first_readout: index of the first token that is read out; the others follow it.
      features: of all tokens; None if not asked for.
    """

    x: jax.Array
    state: halting.HaltingState
    readout: jax.Array
    size: jax.Array | None
    num_prefix_tokens: int = dataclasses.field(metadata={"static": True})
    first_readout: int = dataclasses.field(metadata={"static": True})
    features: features_lib.Features | None = None

    def read_out(self, x: jax.Array) -> jax.Array:
        """Returns the entries `(B, M, ...)` of the tokens that are read out, of `(B, N, ...)`."""
        return x[:, self.first_readout : self.first_readout + self.readout.shape[1]]


def start(
    block: Block,
    x: jax.Array,
    num_prefix_tokens: int,
    readout: slice | None = None,
    *,
    features: bool = False,
) -> Carry:
    """Returns the carry before the first layer.

    Args:
      block: the layer.
      x: `(B, N, D)` embedded tokens.
      num_prefix_tokens: R.
      readout: which tokens are read out, as `AViT.readout`; None for the prefix tokens.
      features: whether the features of all tokens are needed.
    """
    state = halting.init(x.shape[:2], x.dtype)
    first, stop, _ = (readout or slice(num_prefix_tokens)).indices(x.shape[1])
    size = jnp.ones_like(state.remainder) if block.similarity_dim else None
    return Carry(
        x=x,
        state=state,
        readout=jnp.zeros((x.shape[0], stop - first, x.shape[-1]), state.remainder.dtype),
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        first_readout=first,
        features=features_lib.init(x) if features else None,
    )


def step(
    block: Block,
    executor: Executor,
    gate: Gate,
    carry: Carry,
    params: Any,
    *,
    is_last: jax.typing.ArrayLike,
    keep: jax.Array | None = None,
    image_index: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """Runs one layer and its halting step.

    Args:
      block: the layer.
      executor: `masked`, `Bucketed(plan)`, or a function with their signature.
      gate: gamma and beta.
      carry: from the layer before.
      params: of this layer.
      is_last: whether this is the last layer.
      keep: `(B, 2)` drop-path factors; None for 1.
      image_index: `(B,)` indices in the global batch, for dropout; None in evaluation.
      dropout_key: of this layer; only for `masked`.

    Returns:
      The carry, and score and active `(B, N)` of this layer; active at its input.
    """
    state = carry.state
    gamma, beta = jnp.asarray(gate[0]), jnp.asarray(gate[1])
    config = block.halting
    assert config is not None
    info, values = _merging_inputs(carry)
    gate_of_layer = None if info is None else (gamma, beta)
    inputs = Inputs(tokens=info, images=(keep, image_index), shared=jnp.asarray(is_last))
    x, values = executor(
        functools.partial(_layer, block, dropout_key),
        (params, gate_of_layer),
        carry.x,
        values,
        inputs,
        state.active,
    )
    if info is None:
        score = halting.score(x, gamma=gamma, beta=beta, channel=config.channel)
    else:  # with merging, the layer computes it
        score = values["score"]
    after, weight = halting.accumulate(state, score, epsilon=config.epsilon, is_last=is_last)
    outputs = carry.read_out(x).astype(weight.dtype)
    readout = carry.readout + carry.read_out(weight)[..., None] * outputs
    features = carry.features
    if features is not None:
        features = features_lib.update(features, x, state.active, values.get("target"))
    carry = dataclasses.replace(
        carry, x=x, state=after, readout=readout, size=values.get("size"), features=features
    )
    return carry, (score, state.active)


def _merging_inputs(carry: Carry) -> tuple[merging.TokenInfo | None, dict[str, jax.Array]]:
    """Returns what merging needs to know of each token, and its values before the layer."""
    if carry.size is None:
        return None, {}
    is_patch = jnp.arange(carry.size.shape[1]) >= carry.num_prefix_tokens
    info = merging.TokenInfo(
        size=carry.size,
        cumulative=carry.state.cumulative,
        is_patch=jnp.broadcast_to(is_patch, carry.size.shape),
    )
    values = {"score": jnp.zeros_like(carry.state.remainder), "size": carry.size}
    if carry.features is not None:
        index = features_lib.token_index(carry.x).astype(carry.size.dtype)
        info, values["target"] = dataclasses.replace(info, index=index), index
    return info, values


def _layer(
    block: Block,
    dropout_key: jax.Array | None,
    params: Any,
    x: jax.Array,
    inputs: Inputs,
    active: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The layer as `ragged.Layer`."""
    layer_params, gate = params
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    variables = {"params": layer_params}
    run: Any = block.apply
    return run(variables, x, inputs, active, gate, rngs=rngs, method="layer")


def run(
    block: Block,
    executor: Executor,
    gate: Gate | None,
    carry: Carry,
    params: Any,
    *,
    keep: jax.Array | None = None,
    image_index: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    remat: bool = False,
    stop_finished: bool = False,
) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """Runs all layers.

    Args:
      block: the layer.
      executor: runs each layer.
      gate: gamma and beta; None for a network without halting, whose layers all run on all tokens.
      carry: from `start`.
      params: of all layers, stacked.
      keep: `(L, B, 2)` drop-path factors; None for 1.
      image_index: `(B,)` indices in the global batch, for dropout; None in evaluation.
      dropout_key: None without dropout.
      remat: recomputes each layer in the backward pass.
      stop_finished: whether all tokens of an image halt once those that are read out have halted.
        Its logits do not change.

    Returns:
      The carry, and score and active `(L, B, N)`. Without halting, the score is 0 and all tokens
      are active.
    """
    num_layers = len(jax.tree.leaves(params)[0])
    keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)
    layers = (params, jnp.arange(num_layers) == num_layers - 1, keep, keys)

    def body(carry: Carry, layer: tuple) -> tuple[Carry, tuple[jax.Array, jax.Array] | None]:
        params, is_last, keep, key = layer
        noise = {"keep": keep, "image_index": image_index, "dropout_key": key}
        if gate is None:
            return _step_without_halting(block, carry, params, **noise), None
        carry, by_layer = step(block, executor, gate, carry, params, is_last=is_last, **noise)
        return _stop_finished(carry) if stop_finished else carry, by_layer

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    carry, by_layer = jax.lax.scan(body, carry, layers)
    return (carry, by_layer) if gate is not None else _end_without_halting(carry, num_layers)


def _step_without_halting(
    block: Block,
    carry: Carry,
    params: Any,
    *,
    keep: jax.Array | None,
    image_index: jax.Array | None,
    dropout_key: jax.Array | None,
) -> Carry:
    inputs = Inputs(images=(keep, image_index))
    x, _ = _layer(block, dropout_key, (params, None), carry.x, inputs, None)
    return dataclasses.replace(carry, x=x)


def _end_without_halting(
    carry: Carry, num_layers: int
) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """Reads out the last layer; all tokens have been active in all layers, with score 0."""
    state = dataclasses.replace(carry.state, depth=carry.state.depth + num_layers)
    readout = carry.read_out(carry.x)
    score = jnp.zeros((num_layers, *state.remainder.shape), state.remainder.dtype)
    by_layer = (score, jnp.ones(score.shape, bool))
    features = None if carry.features is None else features_lib.init(carry.x)
    carry = dataclasses.replace(carry, state=state, readout=readout, features=features)
    return carry, by_layer


def _stop_finished(carry: Carry) -> Carry:
    """Halts all tokens of images whose tokens that are read out have halted."""
    active = carry.state.active
    unfinished = carry.read_out(active).any(axis=1, keepdims=True)
    state = dataclasses.replace(carry.state, active=active & unfinished)
    return dataclasses.replace(carry, state=state)
