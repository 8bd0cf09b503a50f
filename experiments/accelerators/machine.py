"""What the machine can do: its versions, how fast it copies, and how fast it multiplies large
matrices.
"""

import importlib.metadata
import statistics
import subprocess

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.accelerators import bench

_PACKAGES = ("jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cublas", "torch", "triton")


def versions() -> dict[str, str]:
    """Of everything that the figures depend on, as far as it is installed."""
    found = timing.environment()
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,memory.total",
            "--format=csv,noheader",
        ]
        found["driver, clock, memory"] = subprocess.run(
            query, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def run(rows: bench.Rows, sizes: bench.Sizes) -> None:
    """Writes the rows: bytes are counted as read and as written, operations as two for each
    multiply-accumulate.
    """
    rows(name="versions", **versions())
    dtype, repeats = jnp.dtype(sizes.dtype), sizes.repeats
    flat = jnp.ones((sizes.copied,), dtype)
    matrix = (
        jax.random.normal(jax.random.key(0), (sizes.product, sizes.product), dtype)
        / sizes.product**0.5
    )

    def copy(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: -x, x)

    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, x: x @ y, x)

    makers = {
        "copy": lambda: bench.Program(copy, flat),
        "product": lambda: bench.Program(multiply, matrix, matrix),
    }
    made = rows.build(makers)
    for name, seconds in bench.time_all(made, sizes).items():
        each = statistics.median(seconds) / repeats
        if name == "copy":
            rows(name=name, dtype=sizes.dtype, tb_per_second=2 * flat.nbytes / each / 1e12)
        else:
            rows(name=name, dtype=sizes.dtype, tflop_per_second=2 * sizes.product**3 / each / 1e12)
