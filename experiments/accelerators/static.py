"""The static network: with the flags of docs/speed.md, with the default flags, and beside PyTorch
on the same images.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import timing
from experiments.accelerators import bench


def run(rows: bench.Rows, sizes: bench.Sizes) -> None:
    """Writes a row for each way to run the static network; images are in the network's dtype and on
    the device beforehand.
    """
    if importlib.util.find_spec("torch") is None:
        rows(name="torch", error="torch is not installed: no comparison with PyTorch")
    for name, batch in sizes.static:
        model = bench.network(name, sizes.dtype).clone(halting=None)
        variables = {"params": bench.parameters(name)}
        pixels, _ = bench.images(batch)

        def apply(variables: Any, images: Any, model: Any = model) -> Any:
            return model.apply(variables, images)[0]

        compiled = functools.partial(
            bench.Program, apply, variables, jnp.asarray(pixels, sizes.dtype)
        )
        makers: dict[str, Callable[[], Any]] = {
            "default flags": compiled,
            "old flags": functools.partial(compiled, options=bench.OLD_FLAGS),
        }
        if importlib.util.find_spec("torch") is not None:
            makers |= torch_makers(model, variables["params"], pixels)
        what = {"model": name, "batch": batch, "dtype": sizes.dtype}
        made = rows.build(makers, **what)
        seconds = bench.time_all(made, sizes)
        for label, taken in seconds.items():
            row = {"images_per_second": batch / statistics.median(taken), "rounds": len(taken)}
            if "torch eager" in seconds:
                row["speed_up_over_torch_eager"] = timing.median_ratio(
                    seconds["torch eager"], taken
                )
            rows(**what, name=label, **row, **getattr(made[label], "facts", {}))


def torch_makers(model: Any, params: Any, pixels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """PyTorch with the same weights, eager and compiled."""
    from experiments.static_inference import torch_vit

    make = functools.partial(
        torch_vit.on_device,
        {name: value for name, value in params.items() if name != "gate"},
        pixels,
        width=model.width,
        num_heads=model.num_heads,
        depth=model.depth,
        dtype=jnp.dtype(model.dtype).name,
    )
    return {"torch eager": make, "torch compiled": functools.partial(make, compiled=True)}
