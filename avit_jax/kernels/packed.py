"""One transformer layer on packed tokens, by three kernels for NVIDIA GPUs; see `core.packed`.

Axes: `T` rows of the buffer, `B` images, `N` tokens, `D` width, `H` heads, `K` head width. The
kernels skip rows without a token, so halted tokens cost nothing. The number of tokens stays on the
device. Each kernel has a twin in plain JAX for other backends and for tests, which computes all
rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from avit_jax.core import halting
from avit_jax.core.arrays import Array
from avit_jax.kernels import attention

_WIDEST = 384  # the shared memory of an H100 does not hold the kernels of a wider network
_HEAD_WIDTHS = (16, 32, 64)
_NORMS = ("norm1", "norm2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the blocks that a program of a kernel computes at a time: powers of two.

    No kernel of DeiT-T or DeiT-S spills registers on an H100 with the default sizes
    (tests/experiments/test_aot_packed.py). They were never timed.

    Attributes:
      rows: of a program of `project` and `finish`.
      part: channels of a token at a time, at most.
      columns: outputs of `project`, and inputs of the projection in `finish`, at a time.
      hidden: hidden channels of the MLP at a time.
      queries: rows of a program of `attend`.
      keys: rows that these attend to, at a time.
    """

    rows: int = 64
    part: int = 256
    columns: int = 64
    hidden: int = 32
    queries: int = 64
    keys: int = 64


TILES = Tiles()


def num_rows(num_tokens: int, tiles: Tiles = TILES) -> int:
    """Returns T, the rows of a buffer for this many tokens of all images: whole blocks."""
    return -(-num_tokens // tiles.rows) * tiles.rows


@functools.cache
def has_kernels() -> bool:
    """Returns whether the kernels run on the first local device, or a twin would; starts JAX.

    On a GPU they need compute capability 9.0, the only one that they were compiled for: their
    blocks fill the shared memory of an H100.
    """
    if jax.default_backend() != "gpu":
        return True
    return getattr(jax.local_devices()[0], "compute_capability", "") == "9.0"


def supports(
    params: Any, dtype: jax.typing.DTypeLike, num_heads: int, rows: int, tiles: Tiles = TILES
) -> bool:
    """Returns whether the kernels compute layers with these parameters.

    Args:
      params: of all layers, stacked. Any parameter that a plain layer lacks is unsupported.
      dtype: of the tokens, bfloat16 or float16. Products of float32 would be rounded to TF32.
      num_heads: H.
      rows: T.
      tiles: sizes of the blocks.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return False
    shapes = jax.tree.map(lambda x: x.shape[1:], params)
    try:
        width, hidden = shapes["fc1"]["kernel"]
    except (KeyError, TypeError, ValueError):
        return False
    dense = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, hidden)}
    dense["fc2"] = (hidden, width)
    plain: dict[str, Any] = {name: {"scale": (width,), "bias": (width,)} for name in _NORMS}
    plain |= {name: {"kernel": shape, "bias": shape[1:]} for name, shape in dense.items()}
    return (
        shapes == plain
        and width % tiles.columns == 0
        and width <= _WIDEST
        and hidden % tiles.hidden == 0
        and width // num_heads in _HEAD_WIDTHS
        and rows * 3 * width < 2**31  # the kernels compute addresses as int32
    )


def layer(
    params: Any,
    index: Array,
    x: Array,
    source: Array,
    first: Array,
    *,
    num_tokens: int,
    num_heads: int,
    eps: float,
) -> Array:
    """Runs a layer on the active tokens: by kernels on an NVIDIA GPU, elsewhere by their twins.

    Args:
      params: of all layers, stacked; those of matrix products in the dtype of `x`.
      index: `(1,)` int32, which layer.
      x: `(T, D)` tokens, in any order of rows.
      source: `(T,)` int32, row of `x` that each row of the result comes from.
      first: `(B + 1,)` int32, first row of each image in the result, and the number of tokens.
      num_tokens: N, the most tokens of an image.
      num_heads: H.
      eps: of the norms.

    Returns:
      `(T, D)` tokens. Rows without a token hold anything.
    """
    run = functools.partial(kernels, num_tokens=num_tokens, num_heads=num_heads, eps=eps)
    other = functools.partial(twins, num_tokens=num_tokens, num_heads=num_heads, eps=eps)
    return jax.lax.platform_dependent(params, index, x, source, first, cuda=run, default=other)


def kernels(
    params: Any,
    index: Array,
    x: Array,
    source: Array,
    first: Array,
    *,
    num_tokens: int,
    num_heads: int,
    eps: float,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> Array:
    """`layer` by kernels; `interpret` runs them on a CPU."""
    # Imported here: not every build of JAX for another backend has Triton.
    from avit_jax.kernels import packed_triton

    how: dict[str, Any] = {"tiles": tiles, "interpret": interpret}
    heads, x = packed_triton.project(params, index, x, source, first, eps=eps, **how)
    attended = packed_triton.attend(heads, first, num_tokens=num_tokens, num_heads=num_heads, **how)
    return packed_triton.finish(params, index, attended, x, first, eps=eps, **how)


def twins(
    params: Any,
    index: Array,
    x: Array,
    source: Array,
    first: Array,
    *,
    num_tokens: int,
    num_heads: int,
    eps: float,
) -> Array:
    """`layer` in plain JAX."""
    params = jax.tree.map(lambda stacked: stacked[index[0]], params)
    heads, x = project_twin(params, x, source, eps=eps)
    attended = attend_twin(heads, first, num_tokens=num_tokens, num_heads=num_heads)
    return finish_twin(params, attended, x, eps=eps)


def project_twin(params: Any, x: Array, source: Array, *, eps: float) -> tuple[Array, Array]:
    """`project` in plain JAX."""
    rows = x[source]
    return _dense(_norm_twin(rows, params["norm1"], eps), params["qkv"]).astype(x.dtype), rows


def attend_twin(heads: Array, first: Array, *, num_tokens: int, num_heads: int) -> Array:
    """`attend` in plain JAX; rows without a token are 0."""
    images, rows = len(first) - 1, len(heads)
    row = first[:-1, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    exists = row < first[1:, None]
    each = jnp.where(exists[..., None], heads[jnp.minimum(row, rows - 1)], jnp.zeros_like(heads[0]))
    each = each.reshape(images, num_tokens, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    query, key, value = each
    out = attention.exact(query, key, value, attention.key_bias(exists, None)).swapaxes(1, 2)
    out = out.reshape(images, num_tokens, -1)
    row = jnp.where(exists, row, rows)
    return jnp.zeros((rows, out.shape[-1]), out.dtype).at[row].set(out, mode="drop")


def finish_twin(params: Any, attended: Array, x: Array, *, eps: float) -> Array:
    """`finish` in plain JAX."""
    sums = x.astype(halting.at_least_float32(x.dtype)) + _dense(attended, params["proj"])
    normed = _norm_twin(sums, params["norm2"], eps).astype(x.dtype)
    a = _dense(normed, params["fc1"])
    a = 0.5 * a * (1.0 + jax.lax.erf(a * 0.5**0.5))
    return (sums + _dense(a.astype(x.dtype), params["fc2"])).astype(x.dtype)


def _norm_twin(rows: Array, params: Any, eps: float) -> Array:
    """Layer norm in the dtype of the rows, computed in at least float32."""
    x = rows.astype(halting.at_least_float32(rows.dtype))
    x = x - x.mean(axis=1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(axis=1, keepdims=True) + eps)
    scale, bias = (params[name].astype(x.dtype)[None] for name in ("scale", "bias"))
    return (x * scale + bias).astype(rows.dtype)


def _dense(rows: Array, params: Any) -> Array:
    """A matrix product and its bias, in at least float32."""
    wide = halting.at_least_float32(rows.dtype)
    out = jnp.dot(rows, params["kernel"], preferred_element_type=wide)
    return out + params["bias"].astype(wide)[None]
