"""Whether removal gives the logits and the decisions of masking on this device, in float32 with
exact products.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.inference import adaptive
from avit_jax.models import flops
from experiments.accelerators import bench, removal

_RATIO = 0.62  # of the MACs


def run(rows: bench.Rows, sizes: bench.Sizes) -> None:
    """Writes a row for each configuration: the largest difference of logits, as a share of the
    largest logit, and decisions.
    """
    with jax.default_matmul_precision("highest"):
        for name, batch in sizes.equality:
            model = bench.network(name, "float32")
            pixels, where = bench.images(batch)
            arguments = (
                bench.gated(bench.parameters(name), bench.shifts(name)[_RATIO]),
                jnp.asarray(pixels),
            )
            compiled = functools.partial(
                bench.Program, options=bench.OLD_FLAGS
            )  # they compile faster
            remove = functools.partial(adaptive.apply, model, plan=removal.plan(batch))
            makers = {
                "masked": functools.partial(compiled, model.apply, *arguments),
                "removed": functools.partial(compiled, remove, *arguments),
            }
            what = {"model": name, "batch": batch, "dtype": "float32", "images": where}
            made = rows.build(makers, **what)
            if len(made) < len(makers):
                continue
            (masked, masked_aux), (removed, removed_aux) = (
                jax.device_get(made[label].result) for label in makers
            )
            computing = np.asarray(
                flops.is_computed(jnp.asarray(masked_aux.active), model.num_prefix_tokens)
            )
            rows(
                **what,
                name="removed against masked",
                logit_difference=float(np.abs(removed - masked).max() / np.abs(masked).max()),
                decisions=computing.size,
                other_decisions=int((computing != removed_aux.active).sum()),
                macs_ratio=float(np.mean(removed_aux.macs)) / flops.static_macs(model),
            )
