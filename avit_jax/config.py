"""Every configuration key with its default; a recipe in configs/ starts from `default()` and sets what differs."""

import math
from typing import Any

from ml_collections import ConfigDict

from avit_jax import errors

# Key -> least and largest value; what model and gate check themselves is not here.
_RANGES = {
    "seed": (0, None),
    "data.num_threads": (1, None),
    "data.num_workers": (0, None),
    "data.max_bad_share": (0, 1),
    "data.crop_ratio": (0.01, 1),
    "augment.flip": (0, 1),
    "augment.magnitude": (0, 10),
    "augment.deviation": (0, None),
    "augment.repeats": (1, None),
    "augment.erase": (0, 1),
    "augment.mixup": (0, None),
    "augment.cutmix": (0, None),
    "augment.switch": (0, 1),
    "loss.label_smoothing": (0, 1),
    "loss.prior_width": (1e-3, None),
    "optimizer.warmup": (0, 0.999),
    "optimizer.ema_decay": (0, 1),
    "train.steps": (1, None),
    "train.log_every": (1, None),
    "train.eval_every": (0, None),
    "eval.pictures": (1, None),
}
_CHOICES = {
    "data.bad_records": ("raise", "skip"),
    "loss.prior_mode": ("paper", "official"),
    "eval.checkpoint": ("last", "best"),
}


def default() -> ConfigDict:
    """Returns the configuration all recipes start from, locked: a misspelt key is an error."""
    return ConfigDict({"seed": 0, **_input(), **_network(), **_training()}).lock()


def _input() -> dict[str, dict[str, Any]]:
    """What is read, and how it is augmented."""
    return {
        "data": {
            "name": "digits",  # "digits", "folder", or a prepared data set of tensorflow-datasets
            "dir": "",  # the folder, or that of tensorflow-datasets; empty: its default, ~/tensorflow_datasets
            "train_split": "train",
            "eval_split": "test",
            "mean": (0.485, 0.456, 0.406),  # of pixels from 0 to 1, one number a channel
            "std": (0.229, 0.224, 0.225),
            "crop_ratio": 0.875,  # evaluation: share of the resized picture that is seen
            "num_threads": 2,  # that read and transform, in each worker
            "num_workers": 0,  # processes that do so for training; 0: the training process itself
            "bad_records": "raise",  # or "skip": the next record takes the place of one that cannot be read
            "max_bad_share": 0.01,  # of all records read; above, training stops all the same
        },
        # Of encoded pictures, see avit_jax/data/transforms.py and augment.py; the defaults leave all but crop and flip out.
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
            "num_classes": 1000,
            "distilled": False,
            "drop_path": 0.0,
            "dropout": 0.0,
            "dtype": "float32",  # of the computation; "bfloat16" on accelerators
            "remat": False,
        },
        # avit_jax.HaltingConfig; enabled=False is the plain network.
        "halting": {"enabled": True, "gamma": 10.0, "beta": -30.0, "epsilon": 0.01, "channel": 0, "learnable": False},
        "loss": {
            "label_smoothing": 0.0,
            "ponder_weight": 5e-4,
            "prior_weight": 1e-3,
            "target_depth": 8.0,  # layer, counted from 1
            "prior_width": 1.0,  # layers
            "prior_mode": "paper",  # or "official", to compare with released numbers
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
            "clip_norm": 0.0,  # of the global gradient; 0: no clip
            "ema_decay": 0.99996,  # the averaged parameters are what is evaluated; 0: no average
        },
        "train": {
            "batch_size": 512,  # images a step, over all devices
            "steps": 1000,
            "adaptive": False,  # halted tokens are removed in training too: the same gradients for less work; not "official"
            "log_every": 50,  # steps
            "eval_every": 0,  # steps; evaluates and saves; 0: only at the end
        },
        "eval": {
            "batch_size": 512,
            "adaptive": True,  # halted tokens are removed; False: masked, for comparison
            "checkpoint": "last",  # --mode=eval: "last" or "best"
            "pictures": 8,  # images drawn in depth.png
        },
    }


def check(config: ConfigDict) -> None:
    """Raises errors.UserError, naming the key, where a value is none that training knows what to do with."""
    flat = {"seed": config.seed} | {
        f"{section}.{key}": value
        for section in ("data", "augment", "loss", "optimizer", "train", "eval")
        for key, value in config[section].items()
    }
    for key, (least, largest) in _RANGES.items():
        if not (flat[key] >= least and flat[key] <= (math.inf if largest is None else largest)):  # nan is refused too
            limits = f"at least {least}" if largest is None else f"between {least} and {largest}"
            raise errors.UserError(f"config.{key} must be {limits}; got {flat[key]}.")
    for key, choices in _CHOICES.items():
        if flat[key] not in choices:
            raise errors.UserError(f'config.{key} must be "{choices[0]}" or "{choices[1]}"; got "{flat[key]}".')
    if config.train.adaptive and config.loss.prior_mode == "official":
        raise errors.UserError(
            'config.loss.prior_mode "official" looks at halted tokens too: set --config.train.adaptive=False to keep them.'
        )
    scale = flat["augment.crop_scale"]
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise errors.UserError(f"config.augment.crop_scale must be two rising shares up to 1; got {scale}.")
    if not all(std > 0 for std in flat["data.std"]):
        raise errors.UserError(f"config.data.std must be above 0; got {flat['data.std']}.")
    for key in ("data.mean", "data.std"):
        if len(flat[key]) not in (1, config.model.channels):
            raise errors.UserError(f"config.{key} must hold one number for each of the {config.model.channels} channels.")
