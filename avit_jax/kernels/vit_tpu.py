"""All layers of an A-ViT as one TPU kernel: halted tokens leave an image without a round trip.

A program of the grid runs one image. Its tokens and the weights of all layers stay in VMEM, so the
kernel supports networks whose weights fit there: DeiT-T and DeiT-S, but not DeiT-B. After each
layer `core.halting` decides which tokens halt. Once the rest fits into a smaller compiled number of
tokens, a product with a matrix of zeros and ones moves it to the front. Prefix tokens always stay
in front. An image stops once its prefix tokens have halted.

Values of tokens lie along lanes, as rows `(1, n)`. Axes as in `vit`; n is a compiled number of
tokens. The kernel was compiled for TPUs and run in interpret mode; it was never run on a TPU.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from avit_jax.core import halting
from avit_jax.kernels import attention

_LANES = 128
VMEM = 100 * 2**20  # bytes that the kernel may use; a core of v5e or v6e has 128 MiB
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and constants of a network that are compiled into the kernel.

    Attributes:
      num_tokens: N.
      num_prefix_tokens: R.
      width: D.
      num_heads: H.
      mlp_width: channels of the MLP's hidden layer.
      depth: L.
      norm_eps: epsilon of the layer norms.
      epsilon: of halting.
      channel: that the gate reads; negative counts from the end.
      token_multiple: the kernel is compiled for multiples of it, see `token_counts`.
    """

    num_tokens: int
    num_prefix_tokens: int
    width: int
    num_heads: int
    mlp_width: int
    depth: int
    norm_eps: float
    epsilon: float
    channel: int
    token_multiple: int = 32

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.num_heads

    @property
    def group_width(self) -> int:
        """Lanes of a group of heads, which are padded to whole groups."""
        return max(self.head_width, _LANES)

    @property
    def num_groups(self) -> int:
        """Groups of heads."""
        return -(-self.num_heads * self.head_width // self.group_width)

    def token_counts(self) -> tuple[int, ...]:
        """Returns the compiled numbers of tokens in ascending order; the last one holds N."""
        largest = -(-self.num_tokens // 16) * 16
        step = self.token_multiple * -(-largest // 256)
        return (*range(step, largest - step // 2 + 1, step), largest)


def why_not(sizes: Sizes, dtype: jax.typing.DTypeLike) -> str:
    """Returns why the kernel cannot run a network in a dtype, or "" if it can."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 or bfloat16, not {dtype}"
    if _LANES % sizes.head_width and sizes.head_width % _LANES:
        return f"the width of a head must divide {_LANES} or be a multiple of it"
    shapes = jax.eval_shape(functools.partial(_zero_weights, sizes, dtype))
    largest = sizes.token_counts()[-1]
    # Tokens, qkv, hidden layer, and logits and weights of one head; twice for temporaries.
    lanes = 4 * sizes.width + 2 * sizes.mlp_width + 3 * largest
    needed = sum(x.size * x.dtype.itemsize for x in shapes.values()) + 2 * 4 * largest * lanes
    if needed > VMEM:
        return f"weights and tokens need about {needed >> 20} MiB of {VMEM >> 20} MiB of VMEM"
    return ""


def _zero_weights(sizes: Sizes, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    length, width, hidden = sizes.depth, sizes.width, sizes.mlp_width

    def module(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.zeros((length, *shape)), "bias": jnp.zeros((length, shape[-1]))}

    norm = {"scale": jnp.zeros((length, width)), "bias": jnp.zeros((length, width))}
    params = {"norm1": norm, "norm2": norm, "qkv": module(width, 3 * width)}
    params |= {"proj": module(width, width), "fc1": module(width, hidden)}
    return pack(params | {"fc2": module(hidden, width)}, sizes, dtype)


def pack(
    params: Mapping[str, Any], sizes: Sizes, dtype: jax.typing.DTypeLike
) -> dict[str, jax.Array]:
    """Returns the parameters of all layers as the kernel reads them.

    Heads are padded to whole groups. Queries are scaled by `K ** -0.5`, which is exact if K is a
    power of 4.

    Args:
      params: of all layers, stacked, as `AViT` holds them.
      sizes: of the network.
      dtype: of the products; norms and biases are float32.
    """
    heads, head_width = sizes.num_heads, sizes.head_width
    missing = sizes.num_groups * sizes.group_width // head_width - heads

    def pad(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], heads, head_width, *x.shape[axis + 1 :])
        widths = [(0, 0)] * len(shape)
        widths[axis] = (0, missing)
        x = jnp.pad(x.reshape(shape), widths)
        return x.reshape(*shape[:axis], -1, *shape[axis + 2 :])

    def pad_qkv(x: jax.Array) -> jax.Array:
        query, key, value = jnp.split(x.astype(jnp.float32), 3, axis=-1)
        parts = (query * head_width**-0.5, key, value)
        return jnp.concatenate([pad(part, part.ndim - 1) for part in parts], axis=-1)

    weights: dict[str, jax.Array] = {}
    for name in ("qkv", "proj", "fc1", "fc2"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        if name == "qkv":
            kernel, bias = pad_qkv(kernel), pad_qkv(bias)
        if name == "proj":
            kernel = pad(kernel, 1)
        weights |= {name: kernel.astype(dtype), f"{name}_bias": bias}
    for name in ("norm1", "norm2"):
        weights |= {f"{name}_scale": params[name]["scale"], f"{name}_bias": params[name]["bias"]}
    rows = {name: x[:, None].astype(jnp.float32) for name, x in weights.items() if x.ndim == 2}
    return weights | rows


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False, precision: Any = None) -> jax.Array:
    """Returns a @ b, or a @ b.T, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * (jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale) + bias


def layer(
    x: jax.Array, key_bias: jax.Array, weights: Mapping[str, Any], index: jax.Array, sizes: Sizes
) -> jax.Array:
    """Runs a layer on the tokens `(n, D)` of an image, inside a kernel.

    Args:
      x: float32 or bfloat16.
      key_bias: `(1, n)` bias of each key.
      weights: from `pack`, or references to them.
      index: of the layer.
      sizes: of the network.
    """
    w = {name: functools.partial(ref.__getitem__, index) for name, ref in weights.items()}
    dtype = x.dtype
    a = _norm(x, w["norm1_scale"](), w["norm1_bias"](), sizes.norm_eps).astype(dtype)
    qkv = (_dot(a, w["qkv"]()) + w["qkv_bias"]()).astype(dtype)
    a = _dot(_attend(qkv, key_bias, sizes), w["proj"]()) + w["proj_bias"]()
    x = (x.astype(jnp.float32) + a).astype(dtype)
    a = _norm(x, w["norm2_scale"](), w["norm2_bias"](), sizes.norm_eps).astype(dtype)
    a = _dot(a, w["fc1"]()) + w["fc1_bias"]()
    a = (0.5 * a * (1.0 + jax.lax.erf(a * 0.5**0.5))).astype(dtype)
    return (x.astype(jnp.float32) + _dot(a, w["fc2"]()) + w["fc2_bias"]()).astype(dtype)


def _attend(qkv: jax.Array, key_bias: jax.Array, sizes: Sizes) -> jax.Array:
    """Attention of all heads. The heads of a group share its lanes and differ by masks."""
    width, heads_of_group = sizes.group_width, sizes.group_width // sizes.head_width
    third = sizes.num_groups * width
    # Mosaic compiles `//` only if it knows the chip, which it does not on a machine without a TPU.
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    head = jax.lax.div(lane, jnp.full_like(lane, sizes.head_width))
    outputs = []
    for first in range(0, third, width):
        query, key, value = (qkv[:, i + first : i + first + width] for i in (0, third, 2 * third))
        out = jnp.zeros((), jnp.float32)
        for i in range(min(heads_of_group, sizes.num_heads - first // sizes.head_width)):
            own = head == i
            masked = query if heads_of_group == 1 else jnp.where(own, query, jnp.zeros_like(query))
            logits = _dot(masked, key, transposed=True) + key_bias
            weight = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
            total = weight.sum(axis=-1, keepdims=True)
            values = _dot(weight.astype(value.dtype), value) * (1.0 / total)
            out = jnp.where(own, values, out) if i else values
        outputs.append(out.astype(qkv.dtype))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


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

    def start(self, x: jax.Array) -> None:
        """Writes the state before the first layer."""
        depth, num_tokens = self.sizes.depth, self.sizes.num_tokens
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, self.rows.shape, i) for i in range(2))
        exists = (lane < num_tokens).astype(jnp.float32)
        rest = jnp.where(row == depth + 3, lane.astype(jnp.float32), 0.0)
        self.rows[...] = jnp.where((row == depth + 1) | (row == depth + 2), exists, rest)
        self.tokens[...] = jnp.zeros_like(self.tokens)
        self.tokens[:num_tokens] = x
        self.readout[...] = jnp.zeros_like(self.readout)

    def run(self, num: int, smaller: int, index: jax.Array) -> jax.Array:
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

    def _gate_channel(self, x: jax.Array) -> jax.Array:
        """Returns the gate channel of tokens `(n, D)` as a row `(1, n)`."""
        channel = self.sizes.channel % self.sizes.width
        first = channel // _LANES * _LANES
        x = x[:, first : first + _LANES]
        one = jax.lax.broadcasted_iota(jnp.int32, (8, x.shape[1]), 1) == channel - first
        precision = _EXACT if x.dtype == jnp.float32 else None
        return _dot(one.astype(x.dtype), x, transposed=True, precision=precision)[:1]

    def _move(self, stays: jax.Array, count: jax.Array, smaller: int) -> None:
        """Moves the tokens that stay to the front, and the values of all others behind them.

        Args:
          stays: `(1, n)` float32, 1 for a token that stays.
          count: number of these.
          smaller: compiled number of tokens that holds them.
        """
        num = stays.shape[1]
        lane = jax.lax.broadcasted_iota(jnp.int32, (num, num), 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (num, num), 0)
        before = _dot(jnp.broadcast_to(stays, (8, num)).astype(jnp.bfloat16), _one(row < lane))[:1]
        others = jax.lax.broadcasted_iota(jnp.int32, (1, num), 1).astype(jnp.float32) - before
        rank = jnp.where(stays > 0, before, count.astype(jnp.float32) + others)
        to_rank = row == rank.astype(jnp.int32)
        self.rows[:, :num] = _move_exactly(self.rows[:, :num], _one(to_rank))
        x = self.tokens[:num]
        precision = _EXACT if x.dtype == jnp.float32 else None
        moved = _dot(to_rank[:smaller].astype(x.dtype), x, precision=precision)
        self.tokens[:smaller] = moved.astype(x.dtype)

    def finish(self) -> None:
        """Writes the scores in the order of the N tokens."""
        depth, lanes = self.sizes.depth, self.rows.shape[1]
        place = self.rows[depth + 3 : depth + 4].astype(jnp.int32)
        token = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.num_tokens, lanes), 0)
        self.score[...] = _move_exactly(self.rows[...], _one(token == place))[:depth]


def _one(where: jax.Array) -> jax.Array:
    """Returns 1 where True, else 0."""
    return where.astype(jnp.bfloat16)


def _move_exactly(rows: jax.Array, to: jax.Array) -> jax.Array:
    """Returns `rows @ to.T` without rounding, for a matrix with at most a 1 in each row, else 0.

    Three bfloat16 numbers hold the 24 bits of a float32. One product of all three is faster than
    one in float32.
    """
    parts, rest = [], rows
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & jnp.int32(-(2**16))
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        rest = rest - parts[-1]
    moved = _dot(jnp.concatenate(parts).astype(jnp.bfloat16), to, transposed=True)
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

    def exceeds(smaller: int, carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return carry[1] > smaller

    def run_layer(
        num: int, smaller: int, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return carry[0] + 1, image.run(num, smaller, carry[0])

    # For each compiled number, from the largest on, a loop over layers, which may run none.
    for smaller, num in list(itertools.pairwise(counts))[::-1]:
        condition = functools.partial(exceeds, smaller)
        carry = jax.lax.while_loop(condition, functools.partial(run_layer, num, smaller), carry)
    image.finish()


def run(
    x: jax.Array,
    exists: jax.Array,
    gate: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    params: Mapping[str, Any],
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    """Runs all layers on the tokens of a batch.

    Args:
      x: `(B, N, D)` float32 or bfloat16 tokens.
      exists: `(B,)` bool, False for padding images, which do not run.
      gate: gamma and beta.
      params: of all layers, stacked, as `AViT` holds them.
      sizes: of the network; `why_not` must be "".

    Returns:
      Scores `(L, B, N)` float32, those of halted tokens and finished images are 0. Readout
      `(B, R, D)` float32, see `forward.Carry`.
    """
    batch, num_tokens, width = x.shape
    weights = pack(params, sizes, x.dtype)
    largest = sizes.token_counts()[-1]
    lanes = -(-largest // _LANES) * _LANES

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
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=VMEM, dimension_semantics=("arbitrary",)
        ),
        name="vit_tpu",
    )(
        jnp.stack([jnp.asarray(g, jnp.float32) for g in gate]),
        exists.astype(jnp.int32),
        x,
        *weights.values(),
    )
    return score.swapaxes(0, 1), readout
