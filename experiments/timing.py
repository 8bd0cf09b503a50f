"""Interleaved timing: machines drift, ratios within a round do not."""

import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping

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


def around_the_fastest(
    make: Callable[[int], Callable[[], object]], sizes: Iterable[int]
) -> dict[int, Callable[[], object]]:
    """Functions of the sizes around the fastest one, for a comparison by `interleave`.

    Sizes are tried from the smallest until two in a row are slower than the fastest so far. So the
    fastest one is never the last that was tried, unless there are no larger sizes.

    Args:
      make: makes the function of a size; each has to return when its work is done.
      sizes: from which to choose.

    Returns:
      The functions of the fastest size and of its two neighbours.
    """
    functions: dict[int, Callable[[], object]] = {}
    seconds: dict[int, float] = {}
    for size in sorted(sizes):
        functions[size] = make(size)
        seconds[size] = min(interleave({"": functions[size]}, rounds=3)[""])
        if list(seconds).index(best := min(seconds, key=seconds.__getitem__)) <= len(seconds) - 3:
            break
    tried = list(functions)
    i = tried.index(best)
    return {size: functions[size] for size in tried[max(i - 1, 0) : i + 2]}


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
