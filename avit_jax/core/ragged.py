"""Runs a layer on ragged batches: only on the active tokens of each image.

XLA compiles programs for fixed shapes. So the images are sorted by their number of active tokens
and put into buckets of a few images. A bucket gathers its active tokens, pads them to the smallest
compiled number of tokens that holds its fullest image, runs the layer, and puts the results back.
A bucket without active tokens does not run.

All of this is one program. The device decides how many buckets run; Python reads no value back.
This module knows nothing of the layer but its signature, `Layer`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Int32, PyTree, Shaped

from avit_jax.core.arrays import Array
from avit_jax.core.plan import Plan


@no_type_check  # JAX also fills it with leaves of other types and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of a layer that have no gradient: trees of arrays, or None.

    Attributes:
      tokens: arrays `(B, N)`, gathered with the tokens.
      images: arrays `(B, ...)`, gathered with the images.
      index: `(B, n)` indices of the tokens in their image; None if they are all N in order.
      shared: arrays of any shape, the same for all images.
    """

    tokens: PyTree[Shaped[Array, "B N"]] = None
    images: PyTree[Shaped[Array, "B ..."]] = None
    index: Int[Array, "B n"] | None = None
    shared: PyTree[Array] = None


# (params, tokens x (B, N, D), inputs, active (B, N) or None if all are) -> (x (B, N, D), values).
# The values are a tree of arrays (B, N).
Layer = Callable[
    [PyTree[Array], Float[Array, "B N D"], Inputs, Bool[Array, "B N"] | None],
    tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]],
]

_LoopState = tuple[PyTree[Array], Int32[Array, ""]]  # carry of the step, number of the next bucket
_TokensAndTree = tuple[Float[Array, "B N D"], PyTree[Array]]


@no_type_check  # JAX also fills it with leaves of other types and shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """Images sorted into M buckets of G places, those with most tokens first.

    Attributes:
      image: `(M, G)` int, index of the image in each place; B if the place is empty.
      count: `(M, G)` int, number of active tokens of that image; 0 if the place is empty.
      token: `(B, N)` int, indices of the active tokens in ascending order, then padding N - 1.
      rank: `(B, N)` int, number of active tokens before each active token; undefined for others.
    """

    image: Int[Array, "M G"]
    count: Int[Array, "M G"]
    token: Int[Array, "B N"]
    rank: Int[Array, "B N"]


def make_buckets(active: Bool[Array, "B N"], plan: Plan) -> Buckets:
    """Sorts images by their number of active tokens, and splits them into buckets of equal size.

    The size is the smallest one that gives as few buckets as `plan.bucket` does.

    Args:
      active: `(B, N)` bool.
      plan: gives the size of a bucket.
    """
    batch, num_tokens = active.shape
    ends = jnp.cumsum(active, axis=1)
    method = "compare_all" if plan.use_switch else "scan"
    search = functools.partial(jnp.searchsorted, method=method)
    token = jax.vmap(lambda ends: search(ends, jnp.arange(num_tokens) + 1))(ends)
    count = ends[:, -1]
    order = jnp.argsort(-count)
    size = plan.with_even_buckets(batch).bucket
    empty = -batch % size
    return Buckets(
        image=jnp.pad(order, (0, empty), constant_values=batch).reshape(-1, size),
        count=jnp.pad(count[order], (0, empty)).reshape(-1, size),
        token=jnp.minimum(token, num_tokens - 1),
        rank=ends - 1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bucket:
    """One bucket of g images at n tokens each.

    Attributes:
      image: `(g,)`; an empty place names any image.
      exists: `(g,)` bool, False for an empty place.
      token: `(g, n)` the active tokens of each image, then padding.
      is_token: `(g, n)` bool, False for padding; None if every image exists and has all tokens.
      active: `(g, N)` bool, the tokens of the image that the layer computes.
      rank: `(g, N)` index of each active token among the n.
      scatter: whether all tokens go back at once, not image by image.
    """

    image: Int[Array, "g"]
    exists: Bool[Array, "g"]
    token: Int[Array, "g n"]
    is_token: Bool[Array, "g n"] | None
    active: Bool[Array, "g N"]
    rank: Int[Array, "g N"]
    scatter: bool

    def gather(self, x: Shaped[Array, "B N *rest"]) -> Shaped[Array, "g n *rest"]:
        """Returns the rows `(g, n, ...)` of an array `(B, N, ...)`; padding is 0."""
        if self.is_token is None:
            return x[self.image]
        rows = x[self.image[:, None], self.token]
        is_token = self.is_token.reshape(*self.token.shape, *(1,) * (x.ndim - 2))
        return jnp.where(is_token, rows, jnp.zeros((), x.dtype))

    def put(
        self, x: Shaped[Array, "B N *rest"], rows: Shaped[Array, "g n *rest"]
    ) -> Shaped[Array, "B N *rest"]:
        """Returns the array `(B, N, ...)` with the rows `(g, n, ...)` in their places."""
        if self.scatter:
            # Empty places and padding get unique indices out of range, which mode="drop" ignores.
            image = jnp.where(self.exists, self.image, len(x) + jnp.arange(len(self.image)))
            outside = x.shape[1] + jnp.arange(self.token.shape[1])
            is_token = self.is_token
            token = self.token if is_token is None else jnp.where(is_token, self.token, outside)
            return x.at[image[:, None], token].set(rows, mode="drop", unique_indices=True)
        ones = (1,) * (x.ndim - 2)
        if self.is_token is not None:
            rank = self.rank.reshape(*self.rank.shape, *ones)
            rows = jnp.take_along_axis(rows, rank, axis=1)
        for i in range(len(self.image)):
            start: list[Array | int] = [self.image[i]] + [0] * (x.ndim - 1)
            new = rows[i : i + 1]
            if self.is_token is not None:
                old = jax.lax.dynamic_slice(x, start, (1, *x.shape[1:]))
                new = jnp.where(self.active[i : i + 1].reshape(1, -1, *ones), new, old)
            x = jax.lax.dynamic_update_slice(x, new, start)
        return x

    def gather_inputs(self, inputs: Inputs) -> Inputs:
        """Returns the inputs of the layer for the rows of this bucket."""
        return Inputs(
            tokens=jax.tree.map(self.gather, inputs.tokens),
            images=jax.tree.map(lambda x: x[self.image], inputs.images),
            index=None if self.is_token is None else self.token,
            shared=inputs.shared,
        )


def _run_buckets(
    step: Callable[[PyTree[Array], _Bucket], PyTree[Array]],
    carry: PyTree[Array],
    active: Bool[Array, "B N"],
    plan: Plan,
) -> PyTree[Array]:
    """Runs `carry = step(carry, bucket)` for every bucket that has an active token."""
    batch, num_tokens = active.shape
    buckets = make_buckets(active, plan)
    num_buckets, size = buckets.image.shape
    together = 1 if plan.use_switch else min(max(1, plan.full_bucket // size), num_buckets)
    # The zeros at the end stop the loops after the last bucket.
    largest, smallest = (jnp.pad(buckets.count[:, i], (0, together)) for i in (0, -1))

    def run(num: int, state: _LoopState, full: bool = False) -> _LoopState:
        carry, i = state
        width = together if full else 1
        place = jax.lax.dynamic_slice_in_dim(buckets.image, i, width).reshape(-1)
        image = jnp.minimum(place, batch - 1)
        exists = place < batch
        bucket = _Bucket(
            image=image,
            exists=exists,
            token=buckets.token[image, :num],
            is_token=None if full else jnp.arange(num)[None] < buckets.count[i][:, None],
            active=active[image] & exists[:, None],
            rank=jnp.clip(buckets.rank[image], 0, num - 1),
            scatter=plan.use_switch,
        )
        return step(carry, bucket), i + width

    token_counts = plan.token_counts(num_tokens)
    run_full = functools.partial(run, num_tokens, full=True)
    state: _LoopState = (carry, jnp.zeros((), jnp.int32))
    if plan.use_switch:
        return _run_by_switch(run, run_full, state, token_counts, largest, smallest)

    # Buckets run in order of decreasing size. While all of their tokens are active, several buckets
    # run as one, without padding. Then each compiled number of tokens has a loop, which runs
    # zero or more buckets.
    def is_full(state: _LoopState) -> Bool[Array, ""]:
        return smallest[state[1] + together - 1] == num_tokens

    def is_larger(fewer: int, state: _LoopState) -> Bool[Array, ""]:
        return largest[state[1]] > fewer

    state = jax.lax.while_loop(is_full, run_full, state)
    for num, fewer in zip(token_counts[::-1], (*token_counts[-2::-1], 0), strict=True):
        state = jax.lax.while_loop(
            functools.partial(is_larger, fewer), functools.partial(run, num), state
        )
    return state[0]


def _run_by_switch(
    run: Callable[[int, _LoopState], _LoopState],
    run_full: Callable[[_LoopState], _LoopState],
    state: _LoopState,
    token_counts: tuple[int, ...],
    largest: Int[Array, "M_padded"],
    smallest: Int[Array, "M_padded"],
) -> PyTree[Array]:
    """Visits every bucket; a switch selects the program for its number of tokens."""

    def skip(state: _LoopState) -> _LoopState:
        return state[0], state[1] + 1

    branches: list[Callable[[_LoopState], _LoopState]] = [
        skip,
        *(functools.partial(run, num) for num in token_counts),
        run_full,
    ]
    counts = jnp.array((0, *token_counts))

    def switch(_: Int[Array, ""], state: _LoopState) -> _LoopState:
        which = jnp.searchsorted(counts, largest[state[1]], method="compare_all")
        which = jnp.where(smallest[state[1]] == token_counts[-1], len(branches) - 1, which)
        return jax.lax.switch(which, branches, state)

    return jax.lax.fori_loop(0, len(largest) - 1, switch, state)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def transform(
    layer: Layer,
    plan: Plan,
    params: PyTree[Array],
    x: Float[Array, "B N D"],
    values: PyTree[Float[Array, "B N"]],
    inputs: Inputs,
    active: Bool[Array, "B N"],
) -> tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]:
    """Runs a layer on the active tokens. Halted tokens and their values stay as they are.

    The backward pass uses the same buckets and recomputes the layer. The only activation that it
    stores is `x`.

    Args:
      layer: the layer; its outputs have the dtypes of `x` and `values`.
      plan: sizes of the buckets.
      params: of the layer.
      x: `(B, N, D)` tokens.
      values: tree of arrays `(B, N)` like the layer's second output. Halted tokens keep these.
      inputs: arrays without a gradient.
      active: `(B, N)` bool.

    Returns:
      Tokens `(B, N, D)` and values `(B, N)` after the layer.
    """

    def step(carry: _TokensAndTree, bucket: _Bucket) -> _TokensAndTree:
        rows = bucket.gather(carry[0])
        new = layer(params, rows, bucket.gather_inputs(inputs), bucket.is_token)
        return jax.tree.map(bucket.put, carry, new)

    return _run_buckets(step, (x, values), active, plan)


def _forward(
    layer: Layer,
    plan: Plan,
    params: PyTree[Array],
    x: Float[Array, "B N D"],
    values: PyTree[Float[Array, "B N"]],
    inputs: Inputs,
    active: Bool[Array, "B N"],
) -> tuple[_TokensAndTree, tuple]:
    saved = (params, x, inputs, active)
    return transform(layer, plan, params, x, values, inputs, active), saved


def _backward(layer: Layer, plan: Plan, saved: tuple, grads: _TokensAndTree) -> tuple:
    params, x, inputs, active = saved
    grad, value_grads = grads

    def step(carry: _TokensAndTree, bucket: _Bucket) -> _TokensAndTree:
        grad, param_grads = carry
        of_rows = bucket.gather_inputs(inputs)
        run = lambda params, rows: layer(params, rows, of_rows, bucket.is_token)  # noqa: E731
        _, pull_back = jax.vjp(run, params, bucket.gather(x))
        row_grads = (bucket.gather(grad), jax.tree.map(bucket.gather, value_grads))
        new_param_grads, row_grad = pull_back(row_grads)
        return bucket.put(grad, row_grad), jax.tree.map(jnp.add, param_grads, new_param_grads)

    carry = (grad, jax.tree.map(jnp.zeros_like, params))
    grad, param_grads = _run_buckets(step, carry, active, plan)
    halted = jax.tree.map(lambda g: jnp.where(active, jnp.zeros((), g.dtype), g), value_grads)
    return param_grads, grad, halted, None, None


transform.defvjp(_forward, _backward)
