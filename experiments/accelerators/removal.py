# ruff: noqa: B023 - each function is called in the round of the loop that makes it
"""Halted tokens removed, at several MACs ratios, against the static network and against masking.

Removal runs with buckets ("removed") and packed ("packed"), see `adaptive.Plan`.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.inference import adaptive
from avit_jax.models import flops
from experiments import timing
from experiments.accelerators import bench

_KINDS = ("removed", "packed")
_MASKED = 0.62  # a masked network takes equally long at all ratios


def plan(batch: int, *, packed: bool = False) -> adaptive.Plan:
    """The default plan. A CPU gets the default of a GPU, so that a rehearsal runs the program that
    is measured later; but packed execution has no kernels there.
    """
    default = adaptive.default_plan(batch, "gpu" if jax.default_backend() == "cpu" else None)
    return dataclasses.replace(default, packed=packed)


def run(rows: bench.Rows, sizes: bench.Sizes, options: Mapping[str, Any] | None = None) -> None:
    """Writes a row for each program and MACs ratio; speed-ups are over the static network, within a
    round.

    Args:
      rows: to write to.
      sizes: of everything.
      options: of the compiler; None for its defaults.
    """
    for name, batch in sizes.removal:
        model, params, shifts = (
            bench.network(name, sizes.dtype),
            bench.parameters(name),
            bench.shifts(name),
        )
        pixels, where = bench.images(batch)
        images = jnp.asarray(pixels, sizes.dtype)
        compiled = functools.partial(bench.Program, options=options)
        remove = {
            kind: functools.partial(
                adaptive.apply, model, plan=plan(batch, packed=kind == "packed")
            )
            for kind in _KINDS
        }
        first = min(shifts)
        what = {"model": name, "batch": batch, "dtype": sizes.dtype, "images": where}
        static = model.clone(halting=None)
        makers = {
            "static": lambda: compiled(
                lambda v, x: static.apply(v, x)[0], {"params": params}, images
            ),
            "masked": lambda: compiled(model.apply, bench.gated(params, shifts[_MASKED]), images),
        }
        makers |= {
            kind: functools.partial(
                compiled, remove[kind], bench.gated(params, shifts[first]), images
            )
            for kind in _KINDS
        }
        made = rows.build(makers, **what)
        for kind in _KINDS:
            if (program := made.pop(kind, None)) is not None:  # one program serves all ratios
                made |= {
                    f"{kind} {ratio}": program.at(bench.gated(params, shift), images)
                    for ratio, shift in shifts.items()
                }
        for label, taken in (seconds := bench.time_all(made, sizes)).items():
            row = {"images_per_second": batch / statistics.median(taken), "rounds": len(taken)}
            if "static" in seconds:
                row["speed_up"] = timing.median_ratio(seconds["static"], taken)
            if label.startswith(_KINDS):
                macs, padded = (
                    float(np.mean(getattr(made[label].result[1], key)))
                    for key in ("macs", "macs_padded")
                )
                ideal = flops.static_macs(model) / macs
                row |= {
                    "macs_ratio": 1 / ideal,
                    "ideal_speed_up": ideal,
                    "unpadded_share": macs / padded,
                }
                if "speed_up" in row:
                    row["efficiency"] = row["speed_up"] / ideal
            rows(**what, name=label, **row, **made[label].facts)
