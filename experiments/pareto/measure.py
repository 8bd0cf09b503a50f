"""What is measured of a trained row beside its accuracy: real speed, and what it does at other
budgets without training.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avit_jax.data import augment
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.tools import calibrate
from avit_jax.training import build, evaluate, train_step
from avit_jax.training import devices as devices_lib
from avit_jax.training.state import TrainState
from experiments import timing, workload
from experiments.pareto import arms, ends
from experiments.rivals import tome, unrolled

_BATCH = 256
_CHUNKS = (2, 4, 8, 16, 32, 64, 128)
_GROUPS = (
    2,
    4,
    8,
    16,
    32,
)  # images have 65 tokens: larger ones than the default, which is for DeiT-T
_BATCHES = 4  # of real images, timed together
_ROUNDS = 7
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_CONFIDENCES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_MERGES = (2, 4, 6, 8, 11, 15)


def pixels(config: ConfigDict) -> np.ndarray:
    """The first images of the evaluation split, `(_BATCH * _BATCHES, H, W, C)` uint8."""
    c = config.data
    size = tuple(config.model.image_size)
    count = _BATCH * _BATCHES
    how = {"crop_ratio": c.crop_ratio, "channels": config.model.channels}
    return workload.pixels(c.name, c.eval_split, c.dir, size=size, count=count, **how)


def images(config: ConfigDict) -> np.ndarray:
    """The same, normalised, float32."""
    return np.asarray(augment.normalize(pixels(config), config.data.mean, config.data.std))


def speed(
    model: vit.AViT, params: Any, parent: vit.AViT, parent_params: Any, images: np.ndarray
) -> dict[str, Any]:
    """Speed of a network over its static parent's, both as fast as their chunks or groups of the
    batch allow; interleaved.

    On as many devices as there are: a batch is shared out over them.

    Args:
      model: the network.
      params: its parameters.
      parent: the static network.
      parent_params: of it.
      images: `(_BATCH * _BATCHES, H, W, C)` float32, normalised.

    Returns:
      `speed_up`, median over rounds; `ideal`, by the MACs of these images; `efficiency`, their
      ratio; `images_per_second`.
    """
    removes = model.halting is not None and type(model) is vit.AViT
    devices = workload.Devices(_BATCH)
    whole = np.split(images, _BATCHES)
    batches = [devices.split(batch) for batch in whole]

    def timed(apply: Callable[..., Any], params: Any) -> Callable[[], Any]:
        variables = devices.replicate({"params": params})
        run = devices.compile(apply, variables, batches[0])
        return lambda: jax.block_until_ready([run(variables, batch) for batch in batches])

    def chunked(network: vit.AViT, params: Any, name: str) -> dict[str, Callable[[], Any]]:
        make = lambda chunk: timed(workload.chunked(network.apply, chunk), params)  # noqa: E731
        near = timing.around_the_fastest(make, {min(c, _BATCH // len(devices)) for c in _CHUNKS})
        return {f"{name} {chunk}": function for chunk, function in near.items()}

    functions = chunked(parent, parent_params, "parent")
    if removes:
        plans = {
            f"own {group}": adaptive.Plan(bucket=group, token_multiple=4, chunk=_BATCH)
            for group in _GROUPS
        }
        ours = {
            name: timed(functools.partial(_removed, model, plan), params)
            for name, plan in plans.items()
        }
    else:
        ours = chunked(model, params, "own")
    seconds = timing.interleave(functions | ours, _ROUNDS)
    best, own = (timing.fastest(seconds, names) for names in (functions, ours))
    ideal = flops.static_macs(parent) / _macs(model, params, whole, removes=removes)
    speed_up = timing.median_ratio(seconds[best], seconds[own])
    rate = len(images) / float(np.median(seconds[own]))
    speeds = {
        "speed_up": speed_up,
        "ideal": ideal,
        "efficiency": speed_up / ideal,
        "images_per_second": rate,
    }
    return timing.environment() | {"batch": _BATCH} | speeds


def _macs(model: vit.AViT, params: Any, batches: list[np.ndarray], *, removes: bool) -> float:
    counted = jax.jit(adaptive.make_apply(model) if removes else model.apply)
    aux = [counted({"params": params}, batch)[1] for batch in batches]
    return float(np.mean([each.macs for each in aux]))


def _removed(model: vit.AViT, plan: adaptive.Plan, variables: Any, images: jax.Array) -> jax.Array:
    return adaptive.apply(model, variables, images, plan=plan)[0]


def training_step(
    config: ConfigDict, model: vit.AViT, params: Any, parent: vit.AViT, parent_params: Any
) -> float:
    """Time of a training step of the network over that of its static parent, each with the
    teacher's part; interleaved.
    """
    size, device = config.train.batch_size, jax.local_devices()[:1]
    index = np.arange(size, dtype=np.int32)
    batch = {
        "image": pixels(config)[:size],
        "label": index % config.model.num_classes,
        "index": index,
    }
    batch = jax.tree.map(lambda x: x[None], batch | {"skipped": np.zeros(size, np.int32)})
    taught = devices_lib.replicate(parent_params, device)

    def steps(model: vit.AViT, params: Any) -> Callable[[], Any]:
        tx, _ = build.optimizer(config)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=params,
            opt_state=tx.init(params),
        )
        state = devices_lib.replicate(state, device)
        step = train_step.make_train_step(model, tx, build.step_options(config), parent)
        step = devices_lib.parallel(step, donate=True, devices=device)

        def run() -> None:
            nonlocal state
            state, values = step(state, batch, taught)
            jax.block_until_ready((state, values))

        return run

    seconds = timing.interleave(
        {"own": steps(model, params), "parent": steps(parent, parent_params)}, _ROUNDS
    )
    return timing.median_ratio(seconds["own"], seconds["parent"])


def early_end(model: vit.AViT, params: Any, images: np.ndarray) -> float:
    """Share of the static MACs saved as an image's other tokens stop once its class token has
    halted; on these images.
    """
    active = jax.jit(lambda params, images: model.apply({"params": params}, images)[1].active)(
        params, images
    )
    is_last = (np.arange(model.depth) == model.depth - 1)[:, None]
    going_on = (
        flops.layer_macs(active.sum(axis=-1).astype(np.float32), model, is_last).sum(axis=0).mean()
    )
    saved = flops.fixed_macs(model) + going_on - flops.image_macs(model, active).mean()
    return float(saved) / flops.static_macs(model)


def curves(
    name: str, config: ConfigDict, model: vit.AViT, params: Any
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and MACs at other budgets, of the very same weights; {} for a row that has no such
    knob.
    """
    if name in ("avit_0.6", "avit_merging_0.6", "layer_act_0.6"):
        return {"curve": _calibrated(config, model, params)}
    if name == "ends":
        return {"curve": ends.curve(config, model, params)}
    if name == "early_exit":
        each = {confidence: model.clone(confidence=confidence) for confidence in _CONFIDENCES}
    elif name == "static":
        each = {
            merges: tome.ToMe(**unrolled.attributes(model), merges=merges) for merges in _MERGES
        }
    else:
        return {}
    return {
        "curve": [
            {"knob": knob} | _evaluate(config, network, params) for knob, network in each.items()
        ]
    }


def _evaluate(config: ConfigDict, model: vit.AViT, params: Any) -> dict[str, float]:
    evaluator = evaluate.Evaluator(config, model)
    values = evaluator.measure(params)
    return {key: values[key] for key in ("top1", "macs_ratio")}


def _calibrated(config: ConfigDict, model: vit.AViT, params: Any) -> list[dict[str, float]]:
    """The gate is shifted to each budget, where it can be, on the held-out slice, and judged on the
    evaluation split.
    """
    held_out = config.copy_and_resolve_references()
    held_out.data.eval_split = arms.HELD_OUT
    start = float(params["gate"]["beta"])
    network, _ = calibrate.with_bias(model, params, start)
    search, test = evaluate.Evaluator(held_out, network), evaluate.Evaluator(config, network)

    def at(evaluator: evaluate.Evaluator, beta: float) -> dict[str, float]:
        return evaluator.measure(calibrate.with_bias(model, params, beta)[1])

    rows = []
    for budget in BUDGETS:
        try:
            beta = calibrate.find_bias(
                lambda beta: at(search, beta)["macs_ratio"], budget, start=start
            )
        except calibrate.BudgetOutOfReach:
            continue
        values = at(test, beta)
        rows.append(
            {"knob": beta, "budget": budget} | {key: values[key] for key in ("top1", "macs_ratio")}
        )
    return rows
