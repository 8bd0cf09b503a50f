"""Three kernels for NVIDIA GPUs that compute a layer on packed tokens, in Pallas for Triton.

`packed` calls them and holds their twins in plain JAX. The kernels compute norms, softmax, GELU and
sums in float32, and round where they write.

The grid of a kernel covers the whole buffer. A program whose rows hold no token returns at once. In
the last block that holds tokens, rows without one are computed too. They hold anything, also NaN,
and no other row reads them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from avit_jax.core.arrays import Array
from avit_jax.kernels.packed import Tiles

_LOWEST = -1e30  # logit of a masked key; its weight underflows to exactly 0
_LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A parameter of one layer.

    The kernels read it from the parameters of all layers, because XLA would copy a slice of them.

    Attributes:
      ref: of all layers, stacked.
      index: of the layer.
    """

    ref: Any
    index: Array

    def load(self, *at: Any) -> Array:
        return triton.load(self.ref.at[self.index, *at])


def project(
    params: Any,
    index: Array,
    x: Array,
    source: Array,
    first: Array,
    *,
    eps: float,
    tiles: Tiles,
    interpret: bool,
) -> tuple[Array, Array]:
    """Gathers tokens, and computes their norm, queries, keys and values.

    Arguments as in `layer`.

    Returns:
      Queries, keys and values `(T, 3 D)`, and the gathered tokens `(T, D)`.
    """
    width, out_width = params["qkv"]["kernel"].shape[1:]
    parts = _split(width, tiles.part)

    def kernel(first: Any, index: Any, source: Any, x: Any, *refs: Any) -> None:
        scale, bias, weight, offset = (_Layer(ref, index[0]) for ref in refs[:4])
        heads, rows = refs[4:]

        @pl.when(pl.program_id(0) * tiles.rows < first[first.shape[0] - 1])
        def _() -> None:
            where = source[...][:, None]
            tokens = [triton.load(x.at[where, (a + _arange(n))[None]]) for a, n in parts]
            for (a, n), token in zip(parts, tokens, strict=True):
                triton.store(rows.at[:, pl.ds(a, n)], token)
            normed = _norm([token.astype(jnp.float32) for token in tokens], scale, bias, parts, eps)
            normed = [a.astype(x.dtype) for a in normed]

            def body(j: Array, _: None) -> None:
                at = pl.ds(j * tiles.columns, tiles.columns)
                out = _product(normed, weight, parts, at) + _vector(offset, at)
                triton.store(heads.at[:, at], out.astype(heads.dtype))

            jax.lax.fori_loop(0, out_width // tiles.columns, body, None)

    norm, qkv = params["norm1"], params["qkv"]
    arrays = [first, index, source, x, norm["scale"], norm["bias"], qkv["kernel"], qkv["bias"]]
    specs = [*map(_whole, arrays)]
    specs[2] = _block(tiles, source)
    outs = [jax.ShapeDtypeStruct((len(source), n), x.dtype) for n in (out_width, width)]
    heads, rows = pl.pallas_call(
        kernel,
        grid=(len(source) // tiles.rows,),
        in_specs=specs,
        out_specs=[_block(tiles, out) for out in outs],
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="packed_project",
    )(*arrays)
    return heads, rows


def attend(
    heads: Array,
    first: Array,
    *,
    num_tokens: int,
    num_heads: int,
    tiles: Tiles,
    interpret: bool,
) -> Array:
    """Computes attention of each image's tokens to each other.

    A program computes a head of a block of queries of one image, so it reads no row of another one.

    Args:
      heads: `(T, 3 D)` queries, keys and values.
      first: as in `layer`.
      num_tokens: as in `layer`.
      num_heads: H.
      tiles: sizes of the blocks.
      interpret: runs the kernel on a CPU.

    Returns:
      `(T, D)`; rows without a token hold anything.
    """
    width = heads.shape[1] // 3
    size = width // num_heads

    def kernel(first: Any, heads: Any, out: Any) -> None:
        head, image = pl.program_id(1), pl.program_id(2)
        begin, end = first[image], first[image + 1]
        start = begin + pl.program_id(0) * tiles.queries

        @pl.when(start < end)
        def _() -> None:
            row = start + _arange(tiles.queries)
            exists = (row < end)[:, None]
            column = (head * size + _arange(size))[None]
            query = triton.load(heads.at[row[:, None], column], mask=exists, other=0.0)

            result = _weigh(query, heads, column, begin, end, tiles).astype(out.dtype)
            triton.store(out.at[row[:, None], column], result, mask=exists)

    shape = jax.ShapeDtypeStruct((len(heads), width), heads.dtype)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_tokens, tiles.queries), num_heads, len(first) - 1),
        in_specs=[_whole(first), _whole(heads)],
        out_specs=_whole(shape),
        out_shape=shape,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="packed_attend",
    )(first, heads)


def _weigh(
    query: Array, heads: Any, column: Array, begin: Array, end: Array, tiles: Tiles
) -> Array:
    """Attends from queries `(rows, K)` to the rows from `begin` to `end`; float32 `(rows, K)`.

    It takes the keys block by block, and keeps the largest logit and the sum of weights so far.
    """
    rows, size = query.shape
    width = heads.shape[1] // 3

    def body(j: Array, carry: tuple) -> tuple:
        out, highest, total = carry
        place = begin + j * tiles.keys + _arange(tiles.keys)
        is_key = (place < end)[:, None]
        key, value = (
            triton.load(heads.at[place[:, None], column + i], mask=is_key, other=0.0)
            for i in (width, 2 * width)
        )
        logits = _dot(query, key.T) * (size**-0.5 * _LOG2_E)
        logits = jnp.where((place < end)[None], logits, _LOWEST)
        new = jnp.maximum(highest, logits.max(axis=1))
        weight, old = jnp.exp2(logits - new[:, None]), jnp.exp2(highest - new)
        out = out * old[:, None] + _dot(weight.astype(value.dtype), value)
        return out, new, total * old + weight.sum(axis=1)

    highest = jnp.full((rows,), _LOWEST, jnp.float32)
    carry = (jnp.zeros((rows, size), jnp.float32), highest, highest * 0.0)
    out, _, total = jax.lax.fori_loop(0, pl.cdiv(end - begin, tiles.keys), body, carry)
    return out / total[:, None]


def finish(
    params: Any,
    index: Array,
    attended: Array,
    x: Array,
    first: Array,
    *,
    eps: float,
    tiles: Tiles,
    interpret: bool,
) -> Array:
    """Adds the projected attention, then the MLP, to the tokens `(T, D)`; arguments as in `layer`.

    Args:
      attended: `(T, D)` from `attend`.
      x: `(T, D)` tokens from `project`.
    """
    width, hidden = params["fc1"]["kernel"].shape[1:]
    parts, deep = _split(width, tiles.part), tiles.columns

    def kernel(first: Any, index: Any, attended: Any, x: Any, *refs: Any) -> None:
        of_layer = [_Layer(ref, index[0]) for ref in refs[:-1]]
        scale, bias, proj, proj_bias, fc1, fc1_bias, fc2, fc2_bias = of_layer
        out = refs[-1]

        def project(j: Array, sums: list) -> list:
            at = pl.ds(j * deep, deep)
            return _add(sums, triton.load(attended.at[:, at]), proj, at, parts)

        @pl.when(pl.program_id(0) * tiles.rows < first[first.shape[0] - 1])
        def _() -> None:
            sums = []
            for at in (pl.ds(*part) for part in parts):
                token = triton.load(x.at[:, at]).astype(jnp.float32)
                sums.append(token + _vector(proj_bias, at))
            sums = jax.lax.fori_loop(0, width // deep, project, sums)
            normed = [a.astype(x.dtype) for a in _norm(sums, scale, bias, parts, eps)]

            def mlp(j: Array, sums: list) -> list:
                at = pl.ds(j * tiles.hidden, tiles.hidden)
                a = _product(normed, fc1, parts, at) + _vector(fc1_bias, at)
                return _add(sums, _gelu(a).astype(x.dtype), fc2, at, parts)

            sums = jax.lax.fori_loop(0, hidden // tiles.hidden, mlp, sums)
            for at, s in zip((pl.ds(*part) for part in parts), sums, strict=True):
                triton.store(out.at[:, at], (s + _vector(fc2_bias, at)).astype(out.dtype))

    weights = [params["norm2"][name] for name in ("scale", "bias")]
    weights += [params[m][name] for m in ("proj", "fc1", "fc2") for name in ("kernel", "bias")]
    rows = _block(tiles, x)
    return pl.pallas_call(
        kernel,
        grid=(len(x) // tiles.rows,),
        in_specs=[_whole(first), _whole(index), rows, rows, *map(_whole, weights)],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="packed_finish",
    )(first, index, attended, x, *weights)


def erf(x: Array) -> Array:
    """Computes the error function to 1.5e-7, as Triton has none.

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    t = 1.0 / (1.0 + 0.3275911 * jnp.abs(x))
    y = jnp.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = y * t + coefficient
    y = 1.0 - y * t * jnp.exp(-x * x)
    return jnp.where(x < 0, -y, y)


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + erf(x * 0.5**0.5))


def _arange(size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)


def _split(width: int, most: int) -> list[tuple[int, int]]:
    """Splits channels into parts `(begin, size)`: Triton's sizes are powers of two."""
    parts, begin = [], 0
    while begin < width:
        parts.append((begin, min(most, 2 ** ((width - begin).bit_length() - 1))))
        begin += parts[-1][1]
    return parts


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _product(rows: list[Array], weight: _Layer, parts: list, at: Any) -> Array:
    """Multiplies rows, given in parts, with some columns of a weight; float32."""
    pieces = [weight.load(pl.ds(a, n), at) for a, n in parts]
    return functools.reduce(jnp.add, map(_dot, rows, pieces))


def _add(sums: list[Array], rows: Array, weight: _Layer, at: Any, parts: list) -> list[Array]:
    """Adds the product of rows with some rows of a weight to sums, given in parts; float32."""
    pieces = [weight.load(at, pl.ds(a, n)) for a, n in parts]
    return [s + _dot(rows, piece) for s, piece in zip(sums, pieces, strict=True)]


def _vector(ref: _Layer, at: Any) -> Array:
    return ref.load(at).astype(jnp.float32)[None]


def _norm(rows: list[Array], scale: _Layer, bias: _Layer, parts: list, eps: float) -> list[Array]:
    """Layer norm of float32 rows, given in parts."""
    width = sum(n for _, n in parts)

    def mean(values: list[Array]) -> Array:
        return functools.reduce(jnp.add, [v.sum(axis=1) for v in values])[:, None] / width

    center = mean(rows)
    rows = [row - center for row in rows]
    factor = jax.lax.rsqrt(mean([row * row for row in rows]) + eps)
    return [
        row * factor * _vector(scale, pl.ds(a, n)) + _vector(bias, pl.ds(a, n))
        for row, (a, n) in zip(rows, parts, strict=True)
    ]


def _whole(x: Any) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def _block(tiles: Tiles, x: Any) -> pl.BlockSpec:
    """A block of rows in each program."""
    return pl.BlockSpec((tiles.rows, *x.shape[1:]), lambda i: (i,) + (0,) * (len(x.shape) - 1))
