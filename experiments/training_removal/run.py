"""Time, memory and gradients of a training step with halted tokens removed, against masking them.

AVIT_DATA_DIR=... python -m experiments.training_removal.run \
  --out=experiments/training_removal/result.json

DeiT-T, loss and gradients of one batch of real pictures with the paper's ponder and prior loss;
random weights, the gate shift calibrated to shares of the static network's MACs in inference. In
training the tokens of an image go on after its class token has halted, since ponder and prior loss
count them: the share of active tokens is told beside. Memory is XLA's temporaries.
"""

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import avit_jax
from avit_jax.core import plan as plan_lib
from avit_jax.inference import adaptive
from avit_jax.training import losses
from avit_jax.utils import errors
from experiments import results, timing, workload

_BATCH = flags.DEFINE_integer("batch", 32, "images a step")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the network")
_BUDGET = flags.DEFINE_multi_float(
    "budget", [0.8, 0.62, 0.4], "share of the static network's MACs in inference"
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "interleaved repeats")
_OUT = flags.DEFINE_string("out", None, "JSON file to write")


def build(model: avit_jax.AViT) -> Callable[..., Any]:
    """Loss, share of active tokens, and gradients."""

    def loss(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, aux = model.apply(variables, images, train=True)
        task = losses.cross_entropy(logits, jnp.arange(len(images)), label_smoothing=0.1)
        regular = 5e-4 * losses.ponder_loss(aux) + 1e-3 * losses.prior_loss(aux, target_depth=8.0)
        return task + regular, aux.active.mean()

    return jax.value_and_grad(loss, has_aux=True)


def difference(grads: Any, expected: Any) -> float:
    """Largest difference of a gradient, in units of the largest entry of its tensor."""
    return max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
        if jnp.abs(b).max() > 1e-12
    )


Programs = dict[
    str, tuple[Callable[..., Any], dict[str, float]]
]  # each with what compiling it took and told


def compiled(model: avit_jax.AViT, variables: Any, images: jax.Array) -> Programs:
    """Masked, masked with rematerialisation, and removed."""
    models = {
        "masked": model,
        "masked, remat": model.clone(remat=True),
        "removed": model.clone(removal=plan_lib.training_plan(model.num_tokens)),
    }
    programs = {}
    for name, each in models.items():
        started = time.monotonic()
        run = jax.jit(build(each)).lower(variables, images).compile()
        row = {"compile_seconds": time.monotonic() - started}
        programs[name] = (
            run,
            row | {"temporaries_mb": run.memory_analysis().temp_size_in_bytes / 1e6},
        )
    return programs


def measure(programs: Programs, variables: Any, images: jax.Array) -> dict[str, Any]:
    """All programs at one gate."""
    rows = {name: dict(row) for name, (_, row) in programs.items()}
    functions = {
        name: lambda run=run: jax.block_until_ready(run(variables, images))
        for name, (run, _) in programs.items()
    }
    outputs = {name: function() for name, function in functions.items()}
    seconds = timing.interleave(functions, _ROUNDS.value)
    (_, active), expected = outputs["masked"]
    for name, row in rows.items():
        row["median_seconds"] = float(np.median(seconds[name]))
        row["speed_up"] = timing.median_ratio(seconds["masked"], seconds[name])
        row["gradient_difference"] = difference(outputs[name][1], expected)
    return {"active_tokens": float(active), "rows": rows}


def main(_: list[str]) -> None:
    """Measures at every budget, prints and writes."""
    images, where = workload.load_images(_BATCH.value)
    model = avit_jax.deit_tiny(
        halting=avit_jax.HaltingConfig(learnable=True), dtype=jnp.dtype(_DTYPE.value)
    )
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    infer = jax.jit(functools.partial(adaptive.apply, model))
    macs = lambda shift: float(infer(workload.gated(params, shift), images)[1].macs.mean())  # noqa: E731
    shifts = {1.0: -1e3} | workload.calibrate(model, macs, _BUDGET.value)
    result = {
        **timing.environment(),
        "images": where,
        "dtype": _DTYPE.value,
        "batch": _BATCH.value,
        "rounds": _ROUNDS.value,
    }
    result["budgets"] = {}
    images = jax.device_put(images)
    programs = compiled(model, workload.gated(params, 0.0), images)
    for budget, shift in shifts.items():
        result["budgets"][budget] = measure(
            programs, jax.device_put(workload.gated(params, shift)), images
        )
        print(budget, json.dumps(result["budgets"][budget], indent=2), flush=True)
    if _OUT.value:
        results.save(_OUT.value, result)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
