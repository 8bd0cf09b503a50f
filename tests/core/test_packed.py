"""Packing of active tokens: every one has a row, image after image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avit_jax.core import packed


def _active(batch: int, num_tokens: int, share: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, num_tokens)) < share


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (1, 7), (4, 5), (3, 1)]),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    spare=st.sampled_from([0, 5]),
    seed=st.integers(0, 1000),
)
def test_rows_are_the_active_tokens_in_order(shape, share, spare, seed) -> None:
    active = _active(*shape, share, seed)
    packing = jax.jit(packed.pack, static_argnums=1)(jnp.asarray(active), active.size + spare)
    expected = np.flatnonzero(active)
    np.testing.assert_array_equal(packing.token[: len(expected)], expected)
    np.testing.assert_array_equal(packing.token[len(expected) :], 0)
    np.testing.assert_array_equal(
        packing.first, np.concatenate([[0], np.cumsum(active.sum(axis=1))])
    )
    row = np.asarray(packing.row)
    np.testing.assert_array_equal(row[active], np.arange(len(expected)))
    assert ((row >= 0) & (row < active.size + spare)).all()


def test_a_buffer_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="a buffer of 11 rows does not hold 12 tokens"):
        packed.pack(jnp.ones((3, 4), bool), 11)


def test_rows_without_a_token_are_never_read() -> None:
    active = jnp.asarray(_active(4, 6, 0.5).copy()).at[0].set(False).at[1, 0].set(True)
    packing = packed.pack(active, 30)
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    full = packed.buffer(x, 30)
    np.testing.assert_array_equal(full.rows[24:], 0)
    np.testing.assert_array_equal(full.rows[full.row], x)
    exists = jnp.arange(30) < packing.first[-1]
    rows = jnp.where(exists[:, None], full.rows[packing.token], jnp.nan)
    tokens = packed.PackedTokens(rows=rows, row=packing.row)
    expected = jnp.where(active[..., None], x, 0.0)
    np.testing.assert_array_equal(tokens.prefix(active, 2), expected[:, :2])
    np.testing.assert_array_equal(tokens.channel(active, 3), expected[..., 3])
    np.testing.assert_array_equal(tokens.channel(active, -1), expected[..., -1])
