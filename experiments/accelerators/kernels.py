"""Each kernel of packed execution alone: at several shares of the tokens, with several tiles."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.kernels import packed, packed_triton
from avit_jax.models import block
from experiments.accelerators import bench

_SHARES = (1.0, 0.6, 0.3)
_TILES: dict[str, tuple[dict[str, int], ...]] = {  # for each kernel, what differs from the default
    "project": ({}, {"rows": 128}, {"columns": 32}),
    "attend": ({}, {"queries": 128}, {"keys": 32}),
    "finish": ({}, {"rows": 128}, {"hidden": 64}, {"columns": 32}),
}


def run(rows: bench.Rows, sizes: bench.Sizes) -> None:
    """Writes a row for each network, kernel, tiles and share of the tokens."""
    for name, batch in sizes.kernels:
        for kernel, tiles, first, program in _programs(name, batch, sizes):
            what = {"model": name, "batch": batch, "kernel": kernel, "tiles": tiles}
            makers = {f"{share}": functools.partial(program, first[share]) for share in _SHARES}
            made = rows.build(makers, **what)
            for label, taken in bench.time_all(made, sizes).items():
                microseconds = 1e6 * statistics.median(taken)
                rows(**what, name=f"{label} of the tokens", microseconds=microseconds)


def _programs(
    name: str, batch: int, sizes: bench.Sizes
) -> Iterator[tuple[str, str, dict[float, jax.Array], Callable[[jax.Array], bench.Program]]]:
    """Yields kernel, tiles, the first rows of the images at each share, and what compiles it."""
    model = bench.network(name, "bfloat16")
    num, width = model.num_tokens, model.width
    first = {
        share: jnp.arange(batch + 1, dtype=jnp.int32) * max(1, round(share * num))
        for share in _SHARES
    }
    params = block.cast(bench.parameters(name)["layers"], jnp.bfloat16)
    index = jnp.zeros(1, jnp.int32)
    for kernel, tiles in ((k, t) for k, all_tiles in _TILES.items() for t in all_tiles):
        of: dict[str, Any] = {"tiles": dataclasses.replace(packed.TILES, **tiles)}
        of["interpret"] = jax.default_backend() == "cpu"
        rows = packed.num_rows(batch * num, of["tiles"])
        x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, width)), jnp.bfloat16)
        source = jnp.arange(rows, dtype=jnp.int32)
        if kernel == "project":
            function = functools.partial(packed_triton.project, eps=model.norm_eps, **of)
            arguments = (params, index, x, source)
        elif kernel == "attend":
            heads = {"num_tokens": num, "num_heads": model.num_heads}
            function = functools.partial(packed_triton.attend, **heads, **of)
            arguments = (jnp.concatenate([x, x, x], axis=1),)
        else:
            function = functools.partial(packed_triton.finish, eps=model.norm_eps, **of)
            arguments = (params, index, x, x)
        yield (
            kernel,
            " ".join(f"{k}={v}" for k, v in tiles.items()),
            first,
            _Once(function, arguments),
        )


class _Once:
    """Compiles a function once, and makes a program for each value of its last argument."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._program: bench.Program | None = None

    def __call__(self, last: jax.Array) -> bench.Program:
        if self._program is None:
            self._program = bench.Program(self._function, *self._arguments, last)
        return self._program.at(*self._arguments, last)
