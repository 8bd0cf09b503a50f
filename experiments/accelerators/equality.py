"""Whether removal gives the logits and the decisions of masking on this device.

With buckets it does so in float32, with exact products. Packed execution has kernels for bfloat16,
in which roundings differ, so a token near the threshold may be decided otherwise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.inference import adaptive
from avit_jax.models import flops
from experiments.accelerators import bench, removal

_RATIO = 0.62  # of the MACs
_DTYPES = {"removed": "float32", "packed": "bfloat16"}


def run(rows: bench.Rows, sizes: bench.Sizes) -> None:
    """Writes rows for each configuration: the largest difference of logits, as a share of the
    largest logit, and decisions.
    """
    for name, batch in sizes.equality:
        for kind, dtype in _DTYPES.items():
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                _compare(rows, name, batch, kind, dtype)


def _compare(rows: bench.Rows, name: str, batch: int, kind: str, dtype: str) -> None:
    model = bench.network(name, dtype)
    pixels, where = bench.images(batch)
    arguments = (
        bench.gated(bench.parameters(name), bench.shifts(name)[_RATIO]),
        jnp.asarray(pixels, dtype),
    )
    compiled = functools.partial(bench.Program, options=bench.OLD_FLAGS)  # they compile faster
    plan = removal.plan(batch, packed=kind == "packed")
    makers = {
        "masked": functools.partial(compiled, model.apply, *arguments),
        kind: functools.partial(
            compiled, functools.partial(adaptive.apply, model, plan=plan), *arguments
        ),
    }
    what = {"model": name, "batch": batch, "dtype": dtype, "images": where}
    made = rows.build(makers, **what)
    if len(made) < len(makers):
        return
    (masked, masked_aux), (removed, removed_aux) = (
        jax.device_get(made[label].result) for label in makers
    )
    masked, removed = (np.asarray(x, np.float32) for x in (masked, removed))
    computing = np.asarray(
        flops.is_computed(jnp.asarray(masked_aux.active), model.num_prefix_tokens)
    )
    rows(
        **what,
        name=f"{kind} against masked",
        logit_difference=float(np.abs(removed - masked).max() / np.abs(masked).max()),
        decisions=computing.size,
        other_decisions=int((computing != removed_aux.active).sum()),
        macs_ratio=float(np.mean(removed_aux.macs)) / flops.static_macs(model),
    )
