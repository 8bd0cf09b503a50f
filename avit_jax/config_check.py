"""Checks of the configuration's values: ranges, choices and combinations."""

import math
import sys
from collections.abc import Iterator
from typing import Any

from avit_jax.core import halting
from avit_jax.utils import errors

# Smallest and largest value by key. The model and the gate check their own values.
_RANGES = {
    "seed": (0, 2**32 - 1),
    "budget": (0, 1),
    "data.num_threads": (1, 256),
    "data.num_workers": (0, 256),
    "data.max_bad_share": (0, 1),
    "data.crop_ratio": (0.01, 1),
    "augment.flip": (0, 1),
    "augment.magnitude": (0, 10),
    "augment.deviation": (0, None),
    "augment.repeats": (1, 1000),
    "augment.erase": (0, 1),
    "augment.mixup": (0, None),
    "augment.cutmix": (0, None),
    "augment.switch": (0, 1),
    "loss.label_smoothing": (0, 1),
    "affine.rotate": (0, 180),
    "affine.translate": (0, 1),
    "affine.scale": (0, None),
    "affine.shear": (0, 89),
    "model.depth": (1, None),
    "model.mlp_ratio": (0.01, 100),
    "model.norm_eps": (1e-20, 1),
    "model.num_classes": (0, 2**24),
    "loss.ponder_weight": (0, None),
    "loss.prior_weight": (0, None),
    "loss.prior_width": (1e-3, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.warmup_learning_rate": (0, None),
    "optimizer.min_learning_rate": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.clip_norm": (0, None),
    "optimizer.warmup": (0, 0.999),
    "optimizer.ema_decay": (0, 1),
    "optimizer.layer_decay": (0.01, 1),
    "distill.weight": (0, 1),
    "distill.temperature": (0.01, 1000),
    "train.steps": (1, 2**31 - 1),
    "train.batch_size": (1, 2**24),
    "train.accumulate": (1, 2**24),
    "train.log_every": (1, None),
    "train.eval_every": (0, None),
    "train.save_every": (1, None),
    "eval.batch_size": (1, 2**24),
    "eval.pictures": (1, 1000),
}
# Largest absolute value by key. Larger ones are useless, and arithmetic of sizes would overflow.
_LARGEST = {
    "model.patch_size": 10_000,
    "model.channels": 1000,
    "model.width": 2**16,
    "model.depth": 1000,
    "model.num_heads": 2**16,
    "model.num_registers": 1000,
}
_LARGEST_INTEGER, _LARGEST_FLOAT = 2**32 - 1, 3.4e38  # of uint32 and float32, for other keys
_LARGEST_SIDE = 100_000  # pixels
_CHOICES = {
    "data.bad_records": ("raise", "skip"),
    "loss.prior_mode": ("paper", "official"),
    "train.nonfinite": ("stop", "skip"),
    "distill.targets": ("hard", "soft"),
    "eval.checkpoint": ("last", "best", "init"),
}
_PER_CHANNEL = ("data.mean", "data.std")


def check(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises errors.UserError, which names the key, if a value is not usable.

    Args:
      values: by full name, such as `train.steps`.
      defaults: default values by full name.
    """
    for faults in (_value_faults(values, defaults), _shape_faults(values), _mismatches(values)):
        for fault in faults:
            raise errors.UserError(fault)
    if values["halting.enabled"]:
        for fault in _halting_faults(values):
            raise errors.UserError(fault)


def _value_faults(values: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with single values."""
    for key, default in defaults.items():
        if values[key] is None:  # ml_collections refuses other types itself
            yield f"config.{key} must not be None; its default is {default!r}."
    for key, (least, largest) in _RANGES.items():
        limit = sys.float_info.max if largest is None else largest
        if not least <= values[key] <= limit:  # nan and infinity fail too
            limits = f"at least {least}, and finite"
            if largest is not None:
                limits = f"between {least} and {largest}"
            yield f"config.{key} must be {limits}; got {values[key]}."
    for key, value in values.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            usual = _LARGEST_INTEGER if isinstance(number, int) else _LARGEST_FLOAT
            largest = _LARGEST.get(key, usual)
            if isinstance(number, int | float) and abs(number) > largest:  # nan passes here
                yield f"config.{key} must be at most {largest} in absolute value; got {number}."
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            names = " or ".join(f'"{choice}"' for choice in choices)
            yield f'config.{key} must be {names}; got "{values[key]}".'


def _shape_faults(values: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with values that hold several numbers."""
    for key in ("augment.crop_scale", *_PER_CHANNEL):
        numbers = values[key]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            yield f"config.{key} must hold numbers; got {numbers}."
    sides = values["model.image_size"]
    if len(sides) != 2 or not all(
        isinstance(side, int) and 1 <= side <= _LARGEST_SIDE for side in sides
    ):
        yield f"config.model.image_size must be (height, width) in pixels; got {sides}."
    grid = values["init_grid"]
    if len(grid) not in (0, 2) or not all(type(side) is int and side > 0 for side in grid):
        yield (
            "config.init_grid must be empty, or rows and columns of patches, such as (14,14); got "
            f"{grid}."
        )
    profile, steps = values["debug.profile"], values["train.steps"]
    is_pair = len(profile) == 2 and all(isinstance(step, int) for step in profile)
    if not is_pair or not (tuple(profile) == (0, 0) or 1 <= profile[0] <= profile[1] <= steps):
        yield (
            "config.debug.profile must be (0, 0), or first <= last step within 1 to train.steps; "
            f"got {profile}."
        )
    scale = values["augment.crop_scale"]
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        yield (
            "config.augment.crop_scale must be (smallest, largest) with "
            f"0 < smallest <= largest <= 1; got {scale}."
        )
    limits = values["data.range"]
    if limits and not (
        len(limits) == 2
        and all(isinstance(limit, int | float) for limit in limits)
        and -math.inf < limits[0] < limits[1] < math.inf
    ):
        yield (
            "config.data.range must be empty, or (black, white) with black < white, such as "
            f"(0,4095); got {limits}."
        )
    if not all(std > 0 for std in values["data.std"]):
        yield f"config.data.std must be above 0; got {values['data.std']}."
    weights, num_classes = values["loss.class_weights"], values["model.num_classes"]
    if len(weights) not in (0, num_classes) or not all(
        isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights
    ):
        yield (
            "config.loss.class_weights must be empty, or hold a number of at least 0 for each of "
            f"the {num_classes} classes."
        )
    channels = values["model.channels"]
    for key in _PER_CHANNEL:
        if len(values[key]) not in (1, channels):
            yield f"config.{key} must hold one number, or one for each of the {channels} channels."


def _mismatches(values: dict[str, Any]) -> Iterator[str]:
    """Yields which values do not fit together."""
    official = values["loss.prior_mode"] == "official"
    if values["eval.checkpoint"] == "init" and not values["init"]:
        yield "config.eval.checkpoint=init evaluates a weight file: name it with --config.init."
    if values["budget"] and not values["halting.enabled"]:
        yield (
            "the cost of a network without halting is fixed: set config.budget=0, or "
            "config.halting.enabled=True."
        )
    if values["train.adaptive"] and official:
        yield (
            'config.loss.prior_mode "official" reads the scores of halted tokens: keep the tokens '
            "with --config.train.adaptive=False."
        )
    if values["halting.merge"] and official and values["loss.prior_weight"]:
        yield (
            'config.loss.prior_mode "official" reads the scores of halted tokens; with '
            "config.halting.merge these tokens are merged: set one of the two only."
        )
    if 0 <= values["model.width"] * values["model.mlp_ratio"] < 1:
        yield "config.model.mlp_ratio is too small, so the MLP would have no width: raise it."
    rate = values["optimizer.learning_rate"]
    for key in ("optimizer.warmup_learning_rate", "optimizer.min_learning_rate"):
        if values[key] > rate:
            yield f"config.{key} {values[key]} must not be above the learning rate, {rate}."


def _halting_faults(values: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the gate and with the depth that the prior asks for."""
    num_layers, target, budget = (
        values[key] for key in ("model.depth", "loss.target_depth", "budget")
    )
    if budget and values["loss.prior_mode"] == "official":
        yield (
            'config.loss.prior_mode "official" reproduces the released recipe, which has no '
            "config.budget: set one of the two only."
        )
    if not budget and not 1 <= target <= num_layers:
        yield (
            "config.loss.target_depth must lie between 1 and the network's depth, "
            f"{num_layers}; got {target}."
        )
    gate = {key: values[f"halting.{key}"] for key in ("gamma", "beta", "epsilon", "redundancy")}
    if not (0 < 1 - gate["epsilon"] < 1 and all(map(math.isfinite, gate.values()))):
        return  # HaltingConfig reports it
    # With a budget, each step moves beta by the error of the MACs ratio, which is below 1.
    slack = values["train.steps"] if budget else 0.0
    fault = halting.explain_useless_gate(**gate, num_layers=num_layers, slack=slack)
    if fault:
        yield f"config.halting: {fault}"
