"""All layers of an A-ViT as one TPU kernel: halted tokens leave an image without a round trip.

A program of the grid runs one image. Its tokens and the weights of all layers stay in VMEM, so the
kernel supports networks whose weights fit there: DeiT-T and DeiT-S, but not DeiT-B. After each
layer `core.halting` decides which tokens halt. Once the rest fits into a smaller compiled number of
tokens, a product with a matrix of zeros and ones moves it to the front. Prefix tokens always stay
in front. An image stops once its prefix tokens have halted.

Values of tokens lie along lanes, as rows `(1, n)`. Axes as in `vit`; n is a compiled number of
tokens. The kernel was compiled for TPUs and run in interpret mode; it was never run on a TPU.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from avit_jax.core import halting
from avit_jax.core.arrays import Array
from avit_jax.kernels import attention
from avit_jax.kernels.vit_tpu_layer import LANES, Sizes, dot, layer, pack

VMEM = 100 * 2**20  # bytes that the kernel may use; a core of v5e or v6e has 128 MiB


def supports(sizes: Sizes, dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether the kernel can run a network of these sizes on tokens of a dtype.

    It needs float32 or bfloat16, heads whose width divides 128 or is a multiple of it, and weights
    and tokens that fit into `VMEM`.
    """
    if dtype not in (jnp.float32, jnp.bfloat16):
        return False
    if LANES % sizes.head_width and sizes.head_width % LANES:
        return False
    weights = jax.eval_shape(functools.partial(_zero_weights, sizes, dtype)).values()
    largest = sizes.token_counts()[-1]
    # Tokens, qkv, hidden layer, and logits and weights of one head; twice for temporaries.
    lanes = 4 * sizes.width + 2 * sizes.mlp_width + 3 * largest
    return sum(x.size * x.dtype.itemsize for x in weights) + 2 * 4 * largest * lanes <= VMEM


def _zero_weights(sizes: Sizes, dtype: jax.typing.DTypeLike) -> dict[str, Array]:
    length, width, hidden = sizes.depth, sizes.width, sizes.mlp_width

    def module(*shape: int) -> dict[str, Array]:
        return {"kernel": jnp.zeros((length, *shape)), "bias": jnp.zeros((length, shape[-1]))}

    norm = {"scale": jnp.zeros((length, width)), "bias": jnp.zeros((length, width))}
    params = {"norm1": norm, "norm2": norm, "qkv": module(width, 3 * width)}
    params |= {"proj": module(width, width), "fc1": module(width, hidden)}
    return pack(params | {"fc2": module(hidden, width)}, sizes, dtype)


class _Image:
    """One image inside the kernel: references to its tokens, its state and its outputs.

    Attributes:
      tokens: `(n, D)` with n the largest compiled number.
      rows: `(L + 4 or more, lanes)` float32, what is known of each token: its score in each layer;
        cumulative and remainder; whether it is active; its index among the N tokens.
    """

    def __init__(self, sizes: Sizes, gate: Any, weights: Any, outputs: Any, scratch: Any) -> None:
        self.sizes, self.gate, self.weights = sizes, gate, weights
        self.score, self.readout = outputs
        self.tokens, self.rows = scratch

    def start(self, x: Array) -> None:
        """Writes the state before the first layer."""
        depth, num_tokens = self.sizes.depth, self.sizes.num_tokens
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, self.rows.shape, i) for i in range(2))
        exists = (lane < num_tokens).astype(jnp.float32)
        rest = jnp.where(row == depth + 3, lane.astype(jnp.float32), 0.0)
        self.rows[...] = jnp.where((row == depth + 1) | (row == depth + 2), exists, rest)
        self.tokens[...] = jnp.zeros_like(self.tokens)
        self.tokens[:num_tokens] = x
        self.readout[...] = jnp.zeros_like(self.readout)

    def run(self, num: int, smaller: int, index: Array) -> Array:
        """Runs a layer on `num` tokens, and returns how many must stay."""
        sizes, prefix = self.sizes, self.sizes.num_prefix_tokens
        rows = self.rows[:, :num]
        cumulative, remainder, active = (rows[sizes.depth + i :][:1] for i in range(3))
        state = halting.HaltingState(
            cumulative=cumulative,
            remainder=remainder,
            active=active > 0,
            depth=jnp.zeros((1, num), jnp.int32),
        )
        key_bias: Any = attention.key_bias(state.active, None)
        x = layer(self.tokens[:num], key_bias, self.weights, index, sizes)
        self.tokens[:num] = x
        score = halting.score_of_gate(self._gate_channel(x), gamma=self.gate[0], beta=self.gate[1])
        is_last = jnp.full((1, num), index, jnp.int32) == sizes.depth - 1
        state, weight = halting.accumulate(state, score, epsilon=sizes.epsilon, is_last=is_last)
        for i in range(prefix):
            self.readout[i : i + 1] += weight[:, i : i + 1] * x[i : i + 1].astype(jnp.float32)
        runs = state.active.astype(jnp.float32)
        unfinished = functools.reduce(jnp.maximum, [runs[:, i : i + 1] for i in range(prefix)])
        runs = runs * unfinished
        row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where(row == index, active * score, rows)
        for i, new in enumerate((state.cumulative, state.remainder, runs)):
            rows = jnp.where(row == sizes.depth + i, new, rows)
        self.rows[:, :num] = rows
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, num), 1)
        stays = jnp.where(lane < prefix, unfinished, runs)
        count = stays.sum().astype(jnp.int32)
        if smaller:
            move = functools.partial(self._move, stays, count, smaller)
            pl.when((count <= smaller) & (count > 0))(move)
        return count

    def _gate_channel(self, x: Array) -> Array:
        """Returns the gate channel of tokens `(n, D)` as a row `(1, n)`."""
        channel = self.sizes.channel % self.sizes.width
        first = channel // LANES * LANES
        x = x[:, first : first + LANES]
        one = jax.lax.broadcasted_iota(jnp.int32, (8, x.shape[1]), 1) == channel - first
        return dot(one.astype(x.dtype), x, transposed=True, exact=True)[:1]

    def _move(self, stays: Array, count: Array, smaller: int) -> None:
        """Moves the tokens that stay to the front, and the values of all others behind them.

        Args:
          stays: `(1, n)` float32, 1 for a token that stays.
          count: number of these.
          smaller: compiled number of tokens that holds them.
        """
        num = stays.shape[1]
        lane = jax.lax.broadcasted_iota(jnp.int32, (num, num), 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (num, num), 0)
        before = dot(jnp.broadcast_to(stays, (8, num)).astype(jnp.bfloat16), _one(row < lane))[:1]
        others = jax.lax.broadcasted_iota(jnp.int32, (1, num), 1).astype(jnp.float32) - before
        rank = jnp.where(stays > 0, before, count.astype(jnp.float32) + others)
        to_rank = row == rank.astype(jnp.int32)
        self.rows[:, :num] = _move_exactly(self.rows[:, :num], _one(to_rank))
        x = self.tokens[:num]
        moved = dot(to_rank[:smaller].astype(x.dtype), x, exact=True)
        self.tokens[:smaller] = moved.astype(x.dtype)

    def finish(self) -> None:
        """Writes the scores in the order of the N tokens."""
        depth, lanes = self.sizes.depth, self.rows.shape[1]
        place = self.rows[depth + 3 : depth + 4].astype(jnp.int32)
        token = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.num_tokens, lanes), 0)
        self.score[...] = _move_exactly(self.rows[...], _one(token == place))[:depth]


def _one(where: Array) -> Array:
    """Returns 1 where True, else 0."""
    return where.astype(jnp.bfloat16)


def _move_exactly(rows: Array, to: Array) -> Array:
    """Returns `rows @ to.T` without rounding, for a matrix with at most a 1 in each row, else 0.

    Three bfloat16 numbers hold the 24 bits of a float32. One product of all three is faster than
    one in float32.
    """
    parts, rest = [], rows
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & jnp.int32(-(2**16))
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        rest = rest - parts[-1]
    moved = dot(jnp.concatenate(parts).astype(jnp.bfloat16), to, transposed=True)
    high, middle, low = (moved[i * len(rows) : (i + 1) * len(rows)] for i in range(3))
    return high + (middle + low)


def _kernel(
    names: tuple[str, ...], sizes: Sizes, gate: Any, exists: Any, x: Any, *refs: Any
) -> None:
    """Runs one image; `names` are those of the weights, the first of `refs`."""
    weights, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    image = _Image(sizes, gate, weights, refs[:2], refs[2:])
    image.start(x[...])
    counts = (0, *sizes.token_counts())
    carry: Any = (jnp.int32(0), exists[pl.program_id(0)] * sizes.num_tokens)

    def exceeds(smaller: int, carry: tuple[Array, Array]) -> Array:
        return carry[1] > smaller

    def run_layer(num: int, smaller: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return carry[0] + 1, image.run(num, smaller, carry[0])

    # For each compiled number, from the largest on, a loop over layers, which may run none.
    for smaller, num in list(itertools.pairwise(counts))[::-1]:
        condition = functools.partial(exceeds, smaller)
        carry = jax.lax.while_loop(condition, functools.partial(run_layer, num, smaller), carry)
    image.finish()


def run(
    x: Array,
    exists: Array,
    gate: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    params: Mapping[str, Any],
    sizes: Sizes,
) -> tuple[Array, Array]:
    """Runs all layers on the tokens of a batch.

    Args:
      x: `(B, N, D)` float32 or bfloat16 tokens.
      exists: `(B,)` bool, False for padding images, which do not run.
      gate: gamma and beta.
      params: of all layers, stacked, as `AViT` holds them.
      sizes: of the network; see `supports`.

    Returns:
      Scores `(L, B, N)` float32, those of halted tokens and finished images are 0. Readout
      `(B, R, D)` float32, see `forward.Carry`.
    """
    batch, num_tokens, width = x.shape
    weights = pack(params, sizes, x.dtype)
    largest = sizes.token_counts()[-1]
    lanes = -(-largest // LANES) * LANES

    def of_image(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda i, *_: (i, 0, 0))

    # One buffer, because all programs read the same weights.
    whole = [
        pl.BlockSpec(w.shape, lambda *_: (0, 0, 0), pipeline_mode=pl.Buffered(1))
        for w in weights.values()
    ]
    rows = -(-(sizes.depth + 4) // 8) * 8
    outputs = [(sizes.depth, num_tokens), (sizes.num_prefix_tokens, width)]
    score, readout = pl.pallas_call(
        functools.partial(_kernel, tuple(weights), sizes),
        out_shape=[jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[of_image(num_tokens, width), *whole],
            out_specs=[of_image(*shape) for shape in outputs],
            scratch_shapes=[
                pltpu.VMEM((largest, width), x.dtype),
                pltpu.VMEM((rows, lanes), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        name="vit_tpu",
    )(
        jnp.stack([jnp.asarray(g, jnp.float32) for g in gate]),
        exists.astype(jnp.int32),
        x,
        *weights.values(),
    )
    return score.swapaxes(0, 1), readout
