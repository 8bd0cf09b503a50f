"""Interleaved timing: machines drift, ratios within a round do not."""

import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping

import jax


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Calls all functions once to warm up, then in turn, in another order each time; each has to
    return when its work is done.

    Args:
      functions: by name.
      rounds: calls of each function, at least.
      seconds: goes on for so long, at least.

    Returns:
      Wall seconds of each call, by function.
    """
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    order, began = list(functions.items()), time.perf_counter()
    while min(map(len, taken.values())) < rounds or time.perf_counter() - began < seconds:
        random.shuffle(order)  # so that none is always measured after the same one
        for name, function in order:
            start = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - start)
    return taken


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def fastest(seconds: Mapping[str, list[float]], names: Collection[str]) -> str:
    """Of these functions the one that takes least, by the median over rounds of its time over the
    first one's.
    """
    first = seconds[next(iter(names))]
    return min(names, key=lambda name: median_ratio(seconds[name], first))


def processor() -> str:
    """Name of the processor and its widest vectors, as in "AMD EPYC, avx2"; the architecture where
    Linux does not tell more.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    known = {
        key.strip(): value.split() for key, _, value in (line.partition(":") for line in lines)
    }
    name = " ".join(known.get("model name", [platform.machine()]))
    return ", ".join(
        [
            name,
            *[vectors for vectors in ("avx512f", "avx2") if vectors in known.get("flags", [])][:1],
        ]
    )


def environment() -> dict[str, str]:
    """What the figures depend on."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "processor": processor(),
    } | ({"xla_flags": os.environ["XLA_FLAGS"]} if os.environ.get("XLA_FLAGS") else {})
