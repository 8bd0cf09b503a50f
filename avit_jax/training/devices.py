"""The local devices: the only module that knows `pmap`, its axis and the leading device axis.

Inside a function that `parallel` runs, AXIS is the name of the axis over all devices of all
processes. Outside, replicated and distributed arrays have one row per local device.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import jax_utils

AXIS = "devices"
_PREFETCH = 2  # batches that are copied to the devices ahead of their step


def parallel(
    function: Callable[..., Any],
    *,
    devices: list[jax.Device] | None = None,
    donate: bool = False,
) -> Callable[..., Any]:
    """Compiles a function to run on all devices, each with its row of every argument.

    Args:
      function: maps one device's arguments to its results; it may use AXIS.
      devices: devices to run on; None: all.
      donate: reuses the memory of the first argument, which the caller must not use again.

    Returns:
      The compiled function. Its arguments and results have a first axis of local devices:
      `(devices, ...)`.
    """
    donated = (0,) if donate else ()
    return jax.pmap(function, axis_name=AXIS, devices=devices, donate_argnums=donated)


def mean(tree: Any) -> Any:
    """Returns the mean over all devices, inside a parallel function."""
    return jax.lax.pmean(tree, AXIS)


def total(tree: Any) -> Any:
    """Returns the sum over all devices, inside a parallel function."""
    return jax.lax.psum(tree, AXIS)


def gather(tree: Any) -> Any:
    """Returns the arrays of all devices, concatenated, inside a parallel function."""
    return jax.lax.all_gather(tree, AXIS, tiled=True)


def replicate(tree: Any, devices: list[jax.Device] | None = None) -> Any:
    """Copies a tree to each local device, or to the given ones, along a new first axis.

    The placement equals that of `parallel`'s outputs. `flax.jax_utils.replicate` places arrays
    differently, so a step that receives its own output would compile twice.

    Returns:
      The tree with arrays `(devices, ...)`.
    """
    devices = devices or jax.local_devices()
    copies = jax.tree.map(
        lambda x: np.broadcast_to(x, (len(devices), *x.shape)), jax.device_get(tree)
    )
    return jax.device_put(copies, _sharding(devices))


def first(tree: Any) -> Any:
    """Returns one copy of a replicated tree."""
    return jax.tree.map(lambda x: x[0], tree)


def split(batch: Any, devices: list[jax.Device] | None = None) -> Any:
    """Distributes a batch of arrays `(B, ...)` over the local devices, or over the given ones.

    Returns:
      The batch with arrays `(devices, B / devices, ...)`.
    """
    devices = devices or jax.local_devices()
    return jax.device_put(_rows(batch, len(devices)), _sharding(devices))


def prefetch(batches: Iterator[Any]) -> Iterator[Any]:
    """Distributes batches over the local devices ahead of their use, as `split` does."""
    rows = (_rows(batch, jax.local_device_count()) for batch in batches)
    return jax_utils.prefetch_to_device(rows, _PREFETCH)


def _rows(batch: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def _sharding(devices: list[jax.Device]) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(devices, (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
