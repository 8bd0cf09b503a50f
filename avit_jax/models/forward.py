"""The one forward pass over all layers. Axes as in `vit`.

An executor runs a layer: `masked` on all tokens, `Bucketed` and `Packed` on the active ones.
`AtOnce` runs all layers by one function. The executor affects neither which tokens halt, nor how
outputs are averaged, nor the fields of `Aux`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, no_type_check

import flax
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree, Shaped

from avit_jax.core import halting, merging, packed, ragged
from avit_jax.core.arrays import Array
from avit_jax.core.plan import Plan
from avit_jax.core.ragged import Inputs
from avit_jax.kernels import packed as packed_kernels
from avit_jax.models.block import Block, Gate

# (layer, params, x, values, inputs, active) -> (x, values), as `ragged.transform` without a plan.
Executor = Callable[..., tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]]


def masked(
    layer: ragged.Layer,
    params: PyTree[Array],
    x: Float[Array, "B N D"],
    values: PyTree[Float[Array, "B N"]],
    inputs: Inputs,
    active: Bool[Array, "B N"],
) -> tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]:
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

    def __call__(
        self, layer: ragged.Layer, *args: PyTree[Array]
    ) -> tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]:
        return ragged.transform(layer, self.plan, *args)


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """Runs all layers by one function, which decides which tokens halt; for inference only.

    Attributes:
      layers: maps `(block, gate, carry, params)`, as in `run`, to scores `(L, B, N)` and readout
        `(B, R, D)`. Finished images must stop. Scores of halted tokens mean nothing.
    """

    layers: Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Runs a layer on the active tokens of all images, which share one buffer; see `core.packed`.

    The tokens stay in the buffer between layers. It is for inference with layers that
    `kernels.packed.supports`, and computes them itself, without the argument `layer`.

    Attributes:
      num_heads: H.
      norm_eps: epsilon of the layer norms.
      params: of all layers, stacked; set by `run`.
    """

    num_heads: int
    norm_eps: float
    params: Any = None

    def start(self, carry: "Carry", params: Any) -> tuple["Packed", "Carry", jax.Array]:
        """Returns the executor with its parameters, the carry with a buffer, and layer indices."""
        rows = packed_kernels.num_rows(carry.x.shape[0] * carry.x.shape[1])
        carry = dataclasses.replace(carry, x=packed.buffer(carry.x, rows))
        index = jnp.arange(len(jax.tree.leaves(params)[0]), dtype=jnp.int32)
        return dataclasses.replace(self, params=params), carry, index

    def __call__(
        self,
        layer: ragged.Layer,
        params: Any,
        x: packed.PackedTokens,
        values: Any,
        inputs: Inputs,
        active: jax.Array,
    ) -> tuple[Any, Any]:
        """Runs the layer; arguments as `ragged.transform`, but `params` starts with its index."""
        del layer, inputs
        packing = packed.pack(active, len(x.rows))
        source = x.row.reshape(-1).at[packing.token].get(mode="promise_in_bounds")
        rows = packed_kernels.layer(
            self.params,
            params[0][None],
            x.rows,
            source,
            packing.first,
            num_tokens=active.shape[1],
            num_heads=self.num_heads,
            eps=self.norm_eps,
        )
        return packed.PackedTokens(rows=rows, row=packing.row), values


@no_type_check  # JAX also fills it with leaves of other types and shapes
@flax.struct.dataclass(kw_only=True)
class Aux:
    """What the network computes besides the logits.

    Without halting, the score is 0, the depth is L and the ponder cost is L + 1. `adaptive.apply`
    also stops all tokens of an image once its prefix tokens have halted, because its logits are
    final. There, `active`, `depth` and `ponder_cost` reflect this earlier stop.

    Attributes:
      score: `(L, B, N)` halting scores, at least float32. Those of halted tokens mean nothing. With
        merging, the score is 1 in the last layer.
      active: `(L, B, N)` bool, whether the token is active in the layer.
      depth: `(B, N)` int32, number of layers in which the token is active.
      ponder_cost: `(B, N)` depth + remainder, in layers.
      class_output: `(B, D)` class token, averaged over layers, before the final norm.
      distillation_output: the same for the distillation token, None without one.
      macs: `(B,)` float32, MACs of each image if halted tokens are removed, without padding; see
        `flops.image_macs`.
      macs_padded: `(B,)` float32, MACs with the padding of `adaptive.apply`: rows without a token,
        and the image's share of empty places in its bucket. So it depends on the other images of
        the batch. None for other calls.
    """

    score: Float[Array, "L B N"]
    active: Bool[Array, "L B N"]
    depth: Int32[Array, "B N"]
    ponder_cost: Float[Array, "B N"]
    class_output: Float[Array, "B D"]
    distillation_output: Float[Array, "B D"] | None = None
    macs: Float32[Array, "B"] | None = None
    macs_padded: Float32[Array, "B"] | None = None


@no_type_check  # JAX also fills it with leaves of other types and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What one layer hands to the next.

    Attributes:
      x: `(B, N, D)` tokens, or those in the buffer of `Packed`.
      state: of halting, fields `(B, N)`.
      readout: `(B, R, D)` weighted sum of the outputs of the prefix tokens over the layers so far.
      size: `(B, N)` number of patches that each token stands for; None without merging.
    """

    x: Any
    state: halting.HaltingState
    readout: Float[Array, "B R D"]
    size: Float[Array, "B N"] | None


def start(block: Block, x: Float[Array, "B N D"], num_prefix_tokens: int) -> Carry:
    """Returns the carry before the first layer, for embedded tokens `(B, N, D)`."""
    state = halting.init(x.shape[:2], x.dtype)
    shape = (x.shape[0], num_prefix_tokens, x.shape[-1])
    size = jnp.ones_like(state.remainder) if block.similarity_dim else None
    readout = jnp.zeros(shape, state.remainder.dtype)
    return Carry(x=x, state=state, readout=readout, size=size)


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
      executor: `masked`, `Bucketed(plan)`, `Packed(...)`, or a function with their signature.
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
    state, num_prefix_tokens = carry.state, carry.readout.shape[1]
    gamma, beta = jnp.asarray(gate[0]), jnp.asarray(gate[1])
    config = block.halting
    assert config is not None
    values, info, gate_of_layer = {}, None, None
    if carry.size is not None:
        is_patch = jnp.arange(carry.size.shape[1]) >= num_prefix_tokens
        info = merging.TokenInfo(
            size=carry.size,
            cumulative=state.cumulative,
            is_patch=jnp.broadcast_to(is_patch, carry.size.shape),
        )
        values = {"score": jnp.zeros_like(state.remainder), "size": carry.size}
        gate_of_layer = (gamma, beta)
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
    prefix = _prefix(x, state.active, num_prefix_tokens).astype(weight.dtype)
    readout = carry.readout + weight[:, :num_prefix_tokens, None] * prefix
    carry = Carry(x=x, state=after, readout=readout, size=values.get("size"))
    return carry, (score, state.active)


def _score(x: Any, active: jax.Array, gate: Gate, channel: int) -> jax.Array:
    """Returns the score `(B, N)` of tokens in either layout."""
    if isinstance(x, packed.PackedTokens):
        x, channel = x.channel(active, channel)[..., None], 0
    return halting.score(x, gamma=gate[0], beta=gate[1], channel=channel)


def _prefix(x: Any, active: jax.Array, num: int) -> jax.Array:
    """Returns the prefix tokens `(B, R, D)` of tokens in either layout."""
    return x.prefix(active, num) if isinstance(x, packed.PackedTokens) else x[:, :num]


def _layer(
    block: Block,
    dropout_key: PRNGKeyArray | None,
    params: PyTree[Array],
    x: Float[Array, "B N D"],
    inputs: Inputs,
    active: Bool[Array, "B N"] | None,
) -> tuple[Float[Array, "B N D"], dict[str, Float[Array, "B N"]]]:
    """The layer as `ragged.Layer`."""
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
      stop_finished: whether all tokens of an image halt once its prefix tokens have halted. Its
        logits do not change.

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
) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
    """Runs all layers by one function, then derives the state of halting from the scores."""
    config = block.halting
    assert config is not None
    score, readout = executor.layers(block, gate, carry, params)
    is_last = jnp.arange(len(score)) == len(score) - 1

    def body(carry: Carry, layer: tuple[jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
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
    """Reads out the last layer; all tokens have been active in all layers, with score 0."""
    state = dataclasses.replace(carry.state, depth=carry.state.depth + num_layers)
    readout = carry.x[:, : carry.readout.shape[1]]
    score = jnp.zeros((num_layers, *state.remainder.shape), state.remainder.dtype)
    by_layer = (score, jnp.ones(score.shape, bool))
    return dataclasses.replace(carry, state=state, readout=readout), by_layer


def _stop_finished(carry: Carry) -> Carry:
    """Halts all tokens of images whose prefix tokens have halted."""
    active = carry.state.active
    unfinished = active[:, : carry.readout.shape[1]].any(axis=1, keepdims=True)
    state = dataclasses.replace(carry.state, active=active & unfinished)
    return dataclasses.replace(carry, state=state)
