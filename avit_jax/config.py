"""Every configuration key with its default; a recipe in configs/ starts from `default()` and sets
what differs.
"""

import json
import math
import pathlib
import runpy
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from avit_jax.core import halting
from avit_jax.utils import errors

# Key -> least and largest value; what model and gate check themselves is not here.
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
    "train.log_every": (1, None),
    "train.eval_every": (0, None),
    "train.save_every": (1, None),
    "eval.batch_size": (1, 2**24),
    "eval.pictures": (1, 1000),
}
# What no network or run needs, and arithmetic of the sizes would overflow at; other keys: of a
# uint32 or a float32.
_LARGEST = {
    "model.patch_size": 10_000,
    "model.channels": 1000,
    "model.width": 2**16,
    "model.depth": 1000,
    "model.num_heads": 2**16,
    "model.num_classes": 2**24,
}
_CHOICES = {
    "data.bad_records": ("raise", "skip"),
    "loss.prior_mode": ("paper", "official"),
    "train.nonfinite": ("stop", "skip"),
    "distill.targets": ("hard", "soft"),
    "eval.checkpoint": ("last", "best", "init"),
}
# What a run may go on with another value of: none of it changes a number that training or
# evaluation gives.
_FREE = {
    "data.dir",
    "data.num_threads",
    "data.num_workers",
    "train.save_every",
    "eval.pictures",
    "eval.checkpoint",
    "debug.nans",
    "debug.profile",
}
_LARGEST_FLOAT = 3.4e38  # of float32
_BY_CHANNEL = ("mean", "std")
_LARGEST_SIDE = 100_000  # pixels


def default() -> ConfigDict:
    """Returns the configuration all recipes start from, locked: a misspelt key is an error."""
    start = {
        # weight file, hub name (hf-hub:owner/name) or workdir of a run to start from; empty: random
        "init": "",
        # rows and columns of patches of that file, or of --checkpoint's; empty: as it tells, or a
        # square
        "init_grid": (),
        # where it has another number of classes: the classifier starts at zero
        "init_new_head": False,
        # Share of the static network's MACs that training is to land on, by the gate's shift and
        # the depth that the prior asks for; 0: the first stays as it is, the second is
        # loss.target_depth.
        "budget": 0.0,
    }
    return ConfigDict({"seed": 0, **start, **_input(), **_network(), **_training()}).lock()


def recipe(file: str, name: str) -> ConfigDict:
    """Returns the config of the recipe `name` in the folder of `file`.

    Recipes call this instead of an import, because their package has two names: `configs` in a
    clone, and `avit_jax.configs` in an installation.
    """
    return runpy.run_path(str(pathlib.Path(file).with_name(f"{name}.py")))["get_config"]()


def _input() -> dict[str, dict[str, Any]]:
    """What is read, and how it is augmented."""
    return {
        "data": {
            "name": "digits",  # "digits", "folder", or a prepared data set of tensorflow-datasets
            # the folder, or that of tensorflow-datasets; empty: its default, ~/tensorflow_datasets
            "dir": "",
            "train_split": "train",
            "eval_split": "test",
            "mean": (0.485, 0.456, 0.406),  # of pixels from 0 to 1, one number a channel
            "std": (0.229, 0.224, 0.225),
            "crop_ratio": 0.875,  # evaluation: share of the resized picture that is seen
            "num_threads": 2,  # that read and transform, in each worker
            "num_workers": 0,  # processes that do so for training; 0: the training process itself
            # or "skip": the next record takes the place of one that cannot be read
            "bad_records": "raise",
            "max_bad_share": 0.01,  # of all records read; above, training stops all the same
        },
        # Of encoded pictures, see avit_jax/data/transforms.py and augment.py; the defaults leave
        # all but crop and flip out.
        "augment": {
            "crop_scale": (0.08, 1.0),  # share of the picture's area
            "flip": 0.5,  # probability
            "magnitude": 0.0,  # of RandAugment, up to 10; DeiT: 9
            "deviation": 0.5,  # of the magnitude
            "repeats": 1,  # differently augmented copies of an image, one after the other; DeiT: 3
            "erase": 0.0,  # probability of random erasing; DeiT: 0.25
            "mixup": 0.0,  # Beta parameter; DeiT: 0.8
            "cutmix": 0.0,  # Beta parameter; DeiT: 1
            "switch": 0.5,  # probability of cutmix where mixup is on too
        },
        # Random affine map, see avit_jax/data/augment.py; all 0: none.
        "affine": {"rotate": 0.0, "translate": 0.0, "scale": 0.0, "shear": 0.0},
    }


def _network() -> dict[str, dict[str, Any]]:
    """The network, its gate and its loss."""
    return {
        # Attributes of avit_jax.AViT, see there.
        "model": {
            "image_size": (224, 224),  # height, width
            "patch_size": 16,
            "channels": 3,
            "width": 192,
            "depth": 12,
            "num_heads": 3,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-6,  # 1e-12 for Hugging Face's weights
            "num_classes": 1000,
            "distilled": False,
            "drop_path": 0.0,
            "dropout": 0.0,
            "dtype": "float32",  # of the computation; "bfloat16" on accelerators
            "remat": False,
        },
        # avit_jax.HaltingConfig; enabled=False is the plain network.
        "halting": {
            "enabled": True,
            "gamma": 10.0,
            "beta": -30.0,
            "epsilon": 0.01,
            "channel": 0,
            "learnable": False,
            # halted tokens become part of the most similar one, in place of being gone
            "merge": False,
            # threshold merging: weight of a token's similarity to an earlier one; 50 with gamma 1,
            # beta -42
            "redundancy": 0.0,
        },
        "loss": {
            "label_smoothing": 0.0,
            "ponder_weight": 5e-4,
            "prior_weight": 0.1,  # of the paper; the released code has 1e-3, with its own prior
            "target_depth": 8.0,  # layer, counted from 1; not used with a budget
            "prior_width": 1.0,  # layers
            "prior_mode": "paper",  # or "official", to compare with released numbers
        },
        # What a teacher says of the augmented picture: for the distillation token where there is
        # one, else the class token.
        "distill": {
            "teacher": "",  # weight file, hub name, or workdir of a run; empty: none
            "targets": "hard",  # its likeliest class; or "soft": its probabilities
            "weight": 0.5,  # share of its loss; the labels have the rest
            "temperature": 1.0,  # of soft targets
        },
    }


def _training() -> dict[str, dict[str, Any]]:
    """The optimizer, the run and its evaluation."""
    return {
        "optimizer": {
            "learning_rate": 5e-4,
            "warmup": 0.05,  # share of the steps
            "warmup_learning_rate": 1e-6,
            "min_learning_rate": 1e-5,
            "weight_decay": 0.05,
            # of the learning rate, from the head to the embedding, layer by layer; for fine-tuning:
            # 0.75
            "layer_decay": 1.0,
            "clip_norm": 0.0,  # of the global gradient; 0: no clip
            "ema_decay": 0.99996,  # the averaged parameters are what is evaluated; 0: no average
        },
        "train": {
            "batch_size": 512,  # images a step, over all devices
            "steps": 1000,
            # Removes halted tokens in training too: less work, same gradients to rounding; not
            # "official". On a GPU it masks them, with remat, unless removal was measured to be
            # faster: `plan.removal_pays`.
            "adaptive": False,
            "log_every": 50,  # steps
            "eval_every": 0,  # steps; evaluates and saves; 0: only at the end
            "save_every": 500,  # steps; saves only
            # or "skip": an update with a loss or gradient that is not finite is left out, and
            # counted
            "nonfinite": "stop",
        },
        "eval": {
            "batch_size": 512,
            # Removes halted tokens, on a GPU if that was measured to be faster; see
            # `plan.removal_pays`. False: masks them.
            "adaptive": True,
            # --mode=eval: "last", "best", or "init", the weight file without any training
            "checkpoint": "last",
            "pictures": 8,  # images drawn in depth.png
        },
        "debug": {
            "nans": False,  # finds the operation that gives the first nan; slow
            # The first and the last step that `jax.profiler` traces into profile/; 0: none
            "profile": (0, 0),
        },
    }


def from_json(values: dict[str, Any]) -> ConfigDict:
    """A configuration from what JSON holds of it; raises errors.UserError where it is of another
    version of this program.
    """
    config = default()
    try:
        config.update(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise errors.UserError(
            f"a run of another version of this program cannot be used ({errors.first_line(error)})."
        ) from error
    check(config)
    return config


def flat(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """The values by their full names, such as `train.steps`."""
    sections = {
        key: value for key, value in config.items() if isinstance(value, Mapping | ConfigDict)
    }
    return {key: value for key, value in config.items() if key not in sections} | {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }


def check(config: ConfigDict) -> None:
    """Raises errors.UserError, naming the key, where a value is none that training knows what to do
    with.
    """
    values = flat(config)
    for key, usual in flat(default()).items():
        if values[key] is None:  # of another type ml_collections takes none
            raise errors.UserError(f"config.{key} must not be None; its default is {usual!r}.")
    for key, (least, largest) in _RANGES.items():
        limit = sys.float_info.max if largest is None else largest
        if not least <= values[key] <= limit:  # nan is refused too, and infinity
            limits = (
                f"at least {least}, and finite"
                if largest is None
                else f"between {least} and {largest}"
            )
            raise errors.UserError(f"config.{key} must be {limits}; got {values[key]}.")
    for key, value in values.items():
        _check_size(key, value)
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            names = " or ".join(f'"{choice}"' for choice in choices)
            raise errors.UserError(f'config.{key} must be {names}; got "{values[key]}".')
    _check_combinations(config)
    if config.halting.enabled:
        _check_halting(config)


def _check_size(key: str, value: Any) -> None:
    """Raises errors.UserError if a number, or one of several, is larger than any use of it."""
    for number in value if isinstance(value, tuple | list) else (value,):
        largest = _LARGEST.get(key, 2**32 - 1 if isinstance(number, int) else _LARGEST_FLOAT)
        if (
            isinstance(number, int | float) and abs(number) > largest
        ):  # nan is left to the check of its key
            raise errors.UserError(f"config.{key} must be at most {largest} in size; got {number}.")


def _check_combinations(config: ConfigDict) -> None:
    if config.eval.checkpoint == "init" and not config.init:
        raise errors.UserError(
            "config.eval.checkpoint=init evaluates a weight file: name it with --config.init."
        )
    if config.budget and not config.halting.enabled:
        raise errors.UserError(
            "a network without halting costs what it costs: set config.budget=0, or "
            "config.halting.enabled=True."
        )
    if config.train.adaptive and config.loss.prior_mode == "official":
        raise errors.UserError(
            'config.loss.prior_mode "official" looks at halted tokens too: set '
            "--config.train.adaptive=False to keep them."
        )
    if config.halting.merge and config.loss.prior_mode == "official" and config.loss.prior_weight:
        raise errors.UserError(
            'config.loss.prior_mode "official" looks at halted tokens too, which '
            "config.halting.merge makes part of others."
        )
    for key, numbers in (
        ("augment.crop_scale", config.augment.crop_scale),
        *((f"data.{k}", config.data[k]) for k in _BY_CHANNEL),
    ):
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise errors.UserError(f"config.{key} must hold numbers; got {numbers}.")
    sides = config.model.image_size
    if len(sides) != 2 or not all(
        isinstance(side, int) and 1 <= side <= _LARGEST_SIDE for side in sides
    ):
        raise errors.UserError(
            "config.model.image_size must be (height, width) in pixels; got "
            f"{config.model.image_size}."
        )
    if 0 <= config.model.width * config.model.mlp_ratio < 1:
        raise errors.UserError(
            "config.model.mlp_ratio is so small that the MLP would have no width."
        )
    grid = config.init_grid
    if len(grid) not in (0, 2) or not all(type(side) is int and side > 0 for side in grid):
        raise errors.UserError(
            "config.init_grid must be empty, or rows and columns of patches, such as (14,14); "
            f"got {grid}."
        )
    profile = config.debug.profile
    steps = len(profile) == 2 and all(isinstance(step, int) for step in profile)
    if not steps or (
        tuple(profile) != (0, 0) and not 1 <= profile[0] <= profile[1] <= config.train.steps
    ):
        raise errors.UserError(
            f"config.debug.profile must be the first and the last step to trace; got {profile}."
        )
    scale = config.augment.crop_scale
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise errors.UserError(
            f"config.augment.crop_scale must be two rising shares up to 1; got {scale}."
        )
    if not all(std > 0 for std in config.data.std):
        raise errors.UserError(f"config.data.std must be above 0; got {config.data.std}.")
    for key in _BY_CHANNEL:
        if len(config.data[key]) not in (1, config.model.channels):
            raise errors.UserError(
                f"config.data.{key} must hold one number for each of the {config.model.channels} "
                "channels."
            )
    for key in ("warmup_learning_rate", "min_learning_rate"):
        if config.optimizer[key] > config.optimizer.learning_rate:
            raise errors.UserError(
                f"config.optimizer.{key} {config.optimizer[key]} must not be above the learning "
                "rate, "
                f"{config.optimizer.learning_rate}."
            )


def _check_halting(config: ConfigDict) -> None:
    """A gate by which nothing halts before the last layer, or all in the first; a depth that the
    network does not have.
    """
    depth = config.model.depth
    if config.budget and config.loss.prior_mode == "official":
        raise errors.UserError(
            'config.loss.prior_mode="official" is of the released recipe, which has no '
            "config.budget."
        )
    if (
        not config.budget and not 1 <= config.loss.target_depth <= depth
    ):  # a budget says what depth is asked for
        raise errors.UserError(
            f"config.loss.target_depth must lie between 1 and the network's depth, {depth}; got "
            f"{config.loss.target_depth}."
        )
    numbers = {key: config.halting[key] for key in ("gamma", "beta", "epsilon", "redundancy")}
    if not (0 < 1 - numbers["epsilon"] < 1 and all(map(math.isfinite, numbers.values()))):
        return  # the gate's own check tells what is wrong
    # With a budget each step moves beta by the share of the MACs that is off, by less than 1.
    fault = halting.explain_useless_gate(
        **numbers, num_layers=depth, slack=config.train.steps if config.budget else 0.0
    )
    if fault:
        raise errors.UserError(f"config.halting: {fault}")


def of_then(before: dict[str, Any]) -> dict[str, Any]:
    """The values, by their full names, of a configuration that JSON holds; what it did not know yet
    has its default.
    """
    return flat(json.loads(default().to_json_best_effort())) | flat(before)


def changes(config: ConfigDict, before: dict[str, Any]) -> str:
    """What differs of the values that would give other numbers, by name; empty where nothing does.

    Args:
      config: of now.
      before: of then, as JSON holds it.
    """
    now, then = flat(json.loads(config.to_json_best_effort())), of_then(before)
    keys = sorted((now.keys() | then.keys()) - _FREE)
    differing = [
        key for key in keys if json.dumps(now.get(key)) != json.dumps(then.get(key))
    ]  # of which nan equals nan
    return ", ".join(
        f"{key} from {then.get(key, 'nothing')} to {now.get(key, 'nothing')}" for key in differing
    )


def check_same(config: ConfigDict, before: dict[str, Any]) -> None:
    """Raises errors.UserError where a run was begun with another configuration; see `changes`."""
    differing = changes(config, before)
    if differing:
        raise errors.UserError(
            f"the run in this workdir was begun with another configuration; changed: {differing}. "
            "Go back to it, set another "
            "--workdir, or go on all the same with --allow_changed_config."
        )
