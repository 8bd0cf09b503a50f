"""The one forward pass over all layers. Axes as in `vit`.

An executor runs a layer, or all of them; see `executors`. The executor changes neither which tokens
halt nor how outputs are averaged.
"""

import dataclasses
import functools
from typing import Any, no_type_check

import flax
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree, Shaped

from avit_jax.core import features as features_lib
from avit_jax.core import halting, merging, packed
from avit_jax.core.arrays import Array
from avit_jax.core.ragged import Inputs
from avit_jax.models.block import Block, Gate
from avit_jax.models.executors import AtOnce, Executor, Packed


@no_type_check  # JAX also fills it with leaves of other types and shapes
@flax.struct.dataclass(kw_only=True)
class Aux:
    """What the network computes besides the logits.

    Without halting, the score is 0, the depth is L and the ponder cost is L + 1. Without
    `features`, `adaptive.apply` stops all tokens of an image once those that are read out have
    halted, because its logits are final. Its `active`, `depth` and `ponder_cost` include this stop.

    Attributes:
      score: `(L, B, N)` halting scores, at least float32. Those of halted tokens are meaningless.
        With merging, the score is 1 in the last layer.
      active: `(L, B, N)` bool, whether the token is active in the layer.
      depth: `(B, N)` int32, number of layers in which the token is active.
      ponder_cost: `(B, N)` depth + remainder, in layers.
      class_output: `(B, D)` class token, averaged over layers, before the final norm. Without
        halting, it is the class token of the last layer. With "avg" or "max", it is the mean or
        the maximum of the patch tokens, each averaged over layers with its own weights. With "map",
        it is the output of the attention pooling, which the head reads.
      distillation_output: as `class_output`, of the distillation token; None without one.
      macs: `(B,)` float32, MACs of each image if halted tokens are removed, without padding; see
        `flops.image_macs`.
      macs_padded: `(B,)` float32, MACs with the padding of `adaptive.apply`: rows without a token,
        and the image's share of empty places in its bucket. So it depends on the other images of
        the batch. None for other calls.
      features: `(B, rows, columns, D)` features of the patches; see `core.features`. They are after
        the last norm, unless the network has `fc_norm`. None if the caller does not want them.
    """

    score: Float[Array, "L B N"]
    active: Bool[Array, "L B N"]
    depth: Int32[Array, "B N"]
    ponder_cost: Float[Array, "B N"]
    class_output: Float[Array, "B D"]
    distillation_output: Float[Array, "B D"] | None = None
    macs: Float32[Array, "B"] | None = None
    macs_padded: Float32[Array, "B"] | None = None
    features: Float[Array, "B rows columns D"] | None = None


@no_type_check  # JAX also fills it with leaves of other types and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """The state between two layers.

    Attributes:
      x: `(B, N, D)` tokens, or those in the buffer of `Packed`.
      state: of halting, fields `(B, N)`.
      readout: `(B, M, D)` weighted sum of the outputs of the M tokens that are read out, over the
        layers so far.
      size: `(B, N)` number of patches that each token stands for; None without merging.
      num_prefix_tokens: R.
      first_readout: index of the first token that is read out; the others follow it.
      features: of all tokens; None if the caller does not want them.
    """

    x: Any
    state: halting.HaltingState
    readout: Float[Array, "B M D"]
    size: Float[Array, "B N"] | None
    num_prefix_tokens: int = dataclasses.field(metadata={"static": True})
    first_readout: int = dataclasses.field(metadata={"static": True})
    features: features_lib.Features | None = None

    def read_out(self, x: Array) -> Array:
        """Returns the entries `(B, M, ...)` of the tokens that are read out, of `(B, N, ...)`."""
        return x[:, self.first_readout : self.first_readout + self.readout.shape[1]]


def start(
    block: Block,
    x: Float[Array, "B N D"],
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
    params: PyTree[Array],
    *,
    is_last: Shaped[ArrayLike, ""],
    keep: Float[Array, "B 2"] | None = None,
    image_index: Int[Array, "B"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Carry, tuple[Float[Array, "B N"], Bool[Array, "B N"]]]:
    """Runs one layer and its halting step.

    Args:
      block: the layer.
      executor: `masked`, `Bucketed(plan)`, `Packed(...)`, or a function with the signature of
        `masked`.
      gate: gamma and beta.
      carry: from the layer before.
      params: of this layer.
      is_last: whether this is the last layer.
      keep: `(B, 2)` drop-path factors; None for 1.
      image_index: `(B,)` indices in the global batch, for dropout; None in evaluation.
      dropout_key: of this layer; only for `masked`.

    Returns:
      The carry; score `(B, N)` of the output of this layer, and active `(B, N)` at its input.
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
        score = _score(x, state.active, (gamma, beta), config.channel)
    else:  # with merging, the layer computes it
        score = values["score"]
    after, weight = halting.accumulate(state, score, epsilon=config.epsilon, is_last=is_last)
    outputs = _outputs(carry, x).astype(weight.dtype)
    readout = carry.readout + carry.read_out(weight)[..., None] * outputs
    features = carry.features
    if features is not None:
        features = features_lib.update(features, x, state.active, values.get("target"))
    carry = dataclasses.replace(
        carry, x=x, state=after, readout=readout, size=values.get("size"), features=features
    )
    return carry, (score, state.active)


def _score(x: Any, active: Bool[Array, "B N"], gate: Gate, channel: int) -> Float[Array, "B N"]:
    """Returns the score of tokens in either layout."""
    if isinstance(x, packed.PackedTokens):
        x, channel = x.channel(active, channel)[..., None], 0
    return halting.score(x, gamma=gate[0], beta=gate[1], channel=channel)


def _outputs(carry: Carry, x: Any) -> Float[Array, "B M D"]:
    """Returns the outputs that are read out, of tokens in either layout."""
    if isinstance(x, packed.PackedTokens):  # of plain networks, which read out the prefix tokens
        return x.prefix(carry.state.active, carry.num_prefix_tokens)
    return carry.read_out(x)


def _merging_inputs(carry: Carry) -> tuple[merging.TokenInfo | None, dict[str, Array]]:
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
    dropout_key: PRNGKeyArray | None,
    params: PyTree[Array],
    x: Float[Array, "B N D"],
    inputs: Inputs,
    active: Bool[Array, "B N"] | None,
) -> tuple[Float[Array, "B N D"], dict[str, Float[Array, "B N"]]]:
    """Runs the layer with the signature `ragged.Layer`."""
    layer_params, gate = params
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    variables = {"params": layer_params}
    run: Any = block.apply
    return run(variables, x, inputs, active, gate, rngs=rngs, method="layer")


def run(
    block: Block,
    executor: Executor | AtOnce,
    gate: Gate | None,
    carry: Carry,
    params: PyTree[Array],
    *,
    keep: Float[Array, "L B 2"] | None = None,
    image_index: Int[Array, "B"] | None = None,
    dropout_key: PRNGKeyArray | None = None,
    remat: bool = False,
    stop_finished: bool = False,
) -> tuple[Carry, tuple[Float[Array, "L B N"], Bool[Array, "L B N"]]]:
    """Runs all layers.

    Args:
      block: the layer.
      executor: runs each layer, or all of them.
      gate: gamma and beta; None for a network without halting, whose layers all run on all tokens.
      carry: from `start`.
      params: of all layers, stacked.
      keep: `(L, B, 2)` drop-path factors; None for 1.
      image_index: `(B,)` indices in the global batch, for dropout; None in evaluation.
      dropout_key: None without dropout.
      remat: recomputes each layer in the backward pass.
      stop_finished: whether all tokens of an image halt once those that are read out have halted.
        The logits do not change.

    Returns:
      The carry, and score and active `(L, B, N)`. Without halting, the score is 0 and all tokens
      are active.
    """
    if isinstance(executor, AtOnce):
        return _run_at_once(block, executor, gate, carry, params)
    num_layers = len(jax.tree.leaves(params)[0])
    keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)
    if isinstance(executor, Packed):
        executor, carry, params = executor.start(carry, params)
    layers = (params, jnp.arange(num_layers) == num_layers - 1, keep, keys)

    def body(
        carry: Carry, layer: tuple
    ) -> tuple[Carry, tuple[Float[Array, "B N"], Bool[Array, "B N"]] | None]:
        params, is_last, keep, key = layer
        noise = {"keep": keep, "image_index": image_index, "dropout_key": key}
        if gate is None:
            return _step_without_halting(block, carry, params, **noise), None
        carry, by_layer = step(block, executor, gate, carry, params, is_last=is_last, **noise)
        return _stop_finished(carry) if stop_finished else carry, by_layer

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    carry, by_layer = jax.lax.scan(body, carry, layers)
    return (carry, by_layer) if gate is not None else _end_without_halting(carry, num_layers)


def _run_at_once(
    block: Block, executor: AtOnce, gate: Gate | None, carry: Carry, params: Any
) -> tuple[Carry, tuple[Array, Array]]:
    """Runs all layers by one function, then derives the state of halting from the scores."""
    config = block.halting
    assert config is not None
    score, readout = executor.layers(gate, carry, params)
    is_last = jnp.arange(len(score)) == len(score) - 1

    def body(carry: Carry, layer: tuple[Array, Array]) -> tuple[Carry, Array]:
        score, is_last = layer
        before = carry.state
        state, _ = halting.accumulate(before, score, epsilon=config.epsilon, is_last=is_last)
        return _stop_finished(dataclasses.replace(carry, state=state)), before.active

    carry, active = jax.lax.scan(body, carry, (score, is_last))
    return dataclasses.replace(carry, readout=readout), (score, active)


def _step_without_halting(
    block: Block,
    carry: Carry,
    params: PyTree[Array],
    *,
    keep: Float[Array, "B 2"] | None,
    image_index: Int[Array, "B"] | None,
    dropout_key: PRNGKeyArray | None,
) -> Carry:
    inputs = Inputs(images=(keep, image_index))
    x, _ = _layer(block, dropout_key, (params, None), carry.x, inputs, None)
    return dataclasses.replace(carry, x=x)


def _end_without_halting(
    carry: Carry, num_layers: int
) -> tuple[Carry, tuple[Float[Array, "L B N"], Bool[Array, "L B N"]]]:
    """Reads out the last layer; all tokens count as active in all layers, with score 0."""
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
