"""Kernels of packed tokens against their twins, which are plain JAX, in Pallas's interpret mode."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from avit_jax.core import halting, packed
from avit_jax.kernels import packed as kernels
from avit_jax.kernels import packed_triton
from avit_jax.models import block

_TILES = kernels.Tiles(rows=16, part=32, columns=16, hidden=16, queries=16, keys=16)
_N, _HEADS, _LAYER = 21, 3, 1


def _params(width: int, hidden: int, dtype: Any = jnp.float32) -> Any:
    """Of two layers; the first one is poisoned, as only the second one may be read."""
    cell = block.Block(
        width=width,
        num_heads=_HEADS,
        mlp_width=hidden,
        norm_eps=1e-6,
        dropout=0.0,
        dtype=None,
        halting=halting.HaltingConfig(),
        similarity_dim=0,
        fused_attention=None,
    )
    shapes = jax.eval_shape(cell.init, jax.random.key(0), jnp.zeros((1, 1, width)))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    scale = [leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 0.5 for leaf in leaves]
    leaves = [
        jnp.stack([jnp.full(leaf.shape, jnp.nan), scale * jax.random.normal(key, leaf.shape)])
        for leaf, key, scale in zip(leaves, keys, scale, strict=True)
    ]
    return block.cast(jax.tree.unflatten(tree, leaves), dtype)


def _active(case: str) -> np.ndarray:
    counts = {"some": [13, 1, 21, 0, 17], "one image": [7], "one token": [1], "none": [0, 0]}[case]
    active = np.zeros((len(counts), _N), bool)
    for image, count in enumerate(counts):
        active[image, np.random.default_rng(image).choice(_N, count, replace=False)] = True
    return active


def _inputs(case: str, width: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Rows, source and first; rows of tokens that are not active are NaN."""
    active = jnp.asarray(_active(case))
    num_rows = kernels.num_rows(active.size, _TILES)
    x = jax.random.normal(jax.random.key(2), (*active.shape, width)).astype(dtype)
    x = jnp.where(active[..., None], x, jnp.nan)
    # The first row is the source of rows without a token.
    tokens, packing = packed.buffer(x, num_rows), packed.pack(active, num_rows)
    return tokens.rows, tokens.row.reshape(-1)[packing.token], packing.first


@pytest.mark.parametrize("case", ["some", "one image", "one token", "none"])
@pytest.mark.parametrize("width", [48, 96])  # parts of 32 and 16 channels, three of 32
def test_kernels_give_what_their_twins_give(case: str, width: int) -> None:
    params, inputs = _params(width, 64), _inputs(case, width)
    sizes = {"num_tokens": _N, "num_heads": _HEADS, "eps": 1e-6}
    index = jnp.array([_LAYER], jnp.int32)
    run = functools.partial(kernels.kernels, **sizes, tiles=_TILES, interpret=True)
    out = jax.jit(run)(params, index, *inputs)
    expected = jax.jit(functools.partial(kernels.twins, **sizes))(params, index, *inputs)
    count = int(inputs[2][-1])
    assert out.shape == expected.shape == inputs[0].shape
    assert np.isfinite(expected[:count]).all()
    np.testing.assert_allclose(out[:count], expected[:count], rtol=0, atol=2e-5)


def test_blocks_without_a_token_are_not_computed() -> None:
    params, (x, source, first) = _params(48, 64), _inputs("some", 48)
    x = jnp.nan_to_num(x)
    run = functools.partial(packed_triton.project, eps=1e-6, tiles=_TILES, interpret=True)
    heads, rows = run(params, jnp.array([_LAYER], jnp.int32), x, source, first)
    computed = kernels.num_rows(int(first[-1]), _TILES)
    assert len(rows) > computed == 64
    run = functools.partial(packed_triton.finish, eps=1e-6, tiles=_TILES, interpret=True)
    last = run(params, jnp.array([_LAYER], jnp.int32), x, x, first)
    for out in (heads, rows, last):  # interpret mode fills what no program writes with NaN
        assert np.isfinite(out[:computed]).all() and np.isnan(out[computed:]).all()


def test_an_image_does_not_see_another_one() -> None:
    """Images share blocks, but one that is not finite leaves the others as they are."""
    params, (x, source, first) = _params(48, 64), _inputs("some", 48)
    run = functools.partial(packed_triton.attend, num_tokens=_N, num_heads=_HEADS, tiles=_TILES)
    run = jax.jit(functools.partial(run, interpret=True))
    heads, _ = kernels.project_twin(jax.tree.map(lambda p: p[_LAYER], params), x, source, eps=1e-6)
    begin, end = int(first[2]), int(first[3])
    out, other = run(heads, first), run(heads.at[begin:end].set(jnp.nan), first)
    count = int(first[-1])
    outside = np.r_[:begin, end:count]
    assert np.isfinite(out[:count]).all() and np.isnan(other[begin:end]).all()
    np.testing.assert_array_equal(out[outside], other[outside])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype: Any) -> None:
    """Kernels and twins round at the same places, so they are closer than one rounding of D."""
    params, inputs = _params(96, 64, dtype), _inputs("some", 96, dtype)
    sizes = {"num_tokens": _N, "num_heads": _HEADS, "eps": 1e-6}
    index = jnp.array([_LAYER], jnp.int32)
    run = functools.partial(kernels.kernels, **sizes, tiles=_TILES, interpret=True)
    out = jax.jit(run)(params, index, *inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, inputs[0]))
    exact = kernels.twins(wide[0], index, wide[1], *inputs[1:], **sizes)
    count = int(inputs[2][-1])
    assert out.dtype == dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps) * float(np.abs(exact[:count]).max())
    np.testing.assert_allclose(
        out[:count].astype(jnp.float32), exact[:count], rtol=0, atol=tolerance / 2
    )


def test_the_twin_is_the_layer_of_the_network() -> None:
    """All tokens of all images are active, so the plain layer needs no mask."""
    width, batch = 48, 3
    params = jax.tree.map(lambda p: p[_LAYER], _params(width, 64))
    x = jax.random.normal(jax.random.key(3), (batch, _N, width))
    cell = block.Block(
        width=width,
        num_heads=_HEADS,
        mlp_width=64,
        norm_eps=1e-6,
        dropout=0.0,
        dtype=None,
        halting=None,
        similarity_dim=0,
        fused_attention=None,
    )
    expected = cell.apply({"params": params}, x, method="transform")
    tokens = packed.buffer(x, kernels.num_rows(batch * _N))
    packing = packed.pack(jnp.ones((batch, _N), bool), len(tokens.rows))
    stacked = jax.tree.map(lambda p: p[None], params)
    index = jnp.zeros(1, jnp.int32)
    sizes = {"num_tokens": _N, "num_heads": _HEADS, "eps": 1e-6}
    out = kernels.twins(stacked, index, tokens.rows, packing.token, packing.first, **sizes)
    np.testing.assert_allclose(out[: batch * _N].reshape(x.shape), expected, rtol=0, atol=1e-5)


def test_the_error_function() -> None:
    x = np.linspace(-6, 6, 20_001).astype(np.float32)
    difference = np.asarray(packed_triton.erf(x), np.float64) - scipy.special.erf(x.astype(float))
    assert np.abs(difference).max() < 5e-7  # 1.5e-7, and float32's rounding


@pytest.mark.parametrize(("size", "parts"), [(192, [128, 64]), (384, [256, 128]), (48, [32, 16])])
def test_channels_are_split_into_powers_of_two(size: int, parts: list[int]) -> None:
    split = packed_triton._split(size, 256)
    assert [n for _, n in split] == parts
    assert [a for a, _ in split] == [0, parts[0]]


def _supports(width: int = 192, heads: int = 3, dtype: Any = jnp.bfloat16, **changes: Any) -> bool:
    rows, hidden = changes.pop("rows", 256), changes.pop("hidden", 4 * width)
    params = _shapes(width, hidden) | changes
    return kernels.supports(params, jnp.dtype(dtype), heads, rows)


def _shapes(width: int, hidden: int) -> dict[str, Any]:
    norm = {name: jax.ShapeDtypeStruct((12, width), jnp.float32) for name in ("scale", "bias")}
    shapes: dict[str, Any] = {"norm1": norm, "norm2": norm}
    for name, sizes in (
        ("qkv", (width, 3 * width)),
        ("proj", (width, width)),
        ("fc1", (width, hidden)),
        ("fc2", (hidden, width)),
    ):
        shapes[name] = {
            "kernel": jax.ShapeDtypeStruct((12, *sizes), jnp.float32),
            "bias": jax.ShapeDtypeStruct((12, sizes[1]), jnp.float32),
        }
    return shapes


def test_which_layers_the_kernels_support() -> None:
    assert _supports() and _supports(384, 6) and _supports(dtype=jnp.float16)
    assert _supports(64, 4, hidden=96)
    assert not _supports(dtype=jnp.float32)  # rounded to TF32, it would decide otherwise
    assert not _supports(768, 12)  # too wide
    assert not _supports(96, 3) and not _supports(192, 2)  # width and head width
    assert not _supports(hidden=100)
    assert not _supports(rows=2**31 // 576 + 1)  # addresses overflow
    qkv = _shapes(192, 768)["qkv"]
    assert not _supports(qkv={"kernel": qkv["kernel"]})  # no bias
    assert not _supports(scale1={"scale": qkv["bias"]})  # a parameter that plain layers lack
    assert not _supports(fc1={})


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [("cpu", "", True), ("gpu", "9.0", True), ("gpu", "8.0", False), ("gpu", "gfx90a", False)],
)
def test_which_gpus_have_kernels(
    monkeypatch: pytest.MonkeyPatch, backend: str, capability: str, expected: bool
) -> None:
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert kernels.has_kernels.__wrapped__() == expected
