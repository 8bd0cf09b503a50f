"""The price of a `lax.switch` in a loop: the same work with a switch around it, and without."""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.accelerators import bench

_BRANCHES = 6  # as many as removal has for 197 tokens
_PASSES = 20  # through the loop, for each repeat


def run(rows: bench.Rows, sizes: bench.Sizes) -> None:
    """Writes microseconds of a pass through the loop, for little work and for a matrix product, and
    what the switch adds.
    """
    dtype = jnp.dtype(sizes.dtype)
    side = sizes.product // 4
    passes = _PASSES * sizes.repeats
    works: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "little work": lambda x, y: -x,
        "a product": lambda x, y: x @ y,
    }
    x = jax.random.normal(jax.random.key(0), (side, side), dtype) / side**0.5
    arguments = {"little work": x[:8, :8] if side > 8 else x, "a product": x}
    for label, work in works.items():

        def plain(x: jax.Array, y: jax.Array, which: jax.Array, work: Callable = work) -> jax.Array:
            return jax.lax.fori_loop(
                0, passes, lambda i, x: work(x, y) * (1 + which[i % _BRANCHES]).astype(x.dtype), x
            )

        def switched(
            x: jax.Array, y: jax.Array, which: jax.Array, work: Callable = work
        ) -> jax.Array:
            branches = [
                lambda x, k=k: work(x, y) * jnp.asarray(1 + k, x.dtype) for k in range(_BRANCHES)
            ]
            return jax.lax.fori_loop(
                0, passes, lambda i, x: jax.lax.switch(which[i % _BRANCHES], branches, x), x
            )

        of = arguments[label], arguments[label], jnp.zeros(_BRANCHES, jnp.int32)
        makers = {
            "without": lambda of=of, plain=plain: bench.Program(plain, *of),
            "with a switch": lambda of=of, switched=switched: bench.Program(switched, *of),
        }
        made = rows.build(makers, work=label)
        each = {
            name: 1e6 * statistics.median(taken) / passes
            for name, taken in bench.time_all(made, sizes).items()
        }
        for name, microseconds in each.items():
            row = {"microseconds": microseconds}
            if len(each) == len(makers) and name != "without":
                row["microseconds_added"] = microseconds - each["without"]
            rows(work=label, name=name, **row)
