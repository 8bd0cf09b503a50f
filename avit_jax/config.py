"""Every configuration key with its default. A recipe in configs/ starts from `default()`."""

import json
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from avit_jax import config_check
from avit_jax.utils import errors

# Keys that do not affect training. A run may resume with other values of them.
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


def default() -> ConfigDict:
    """Returns the configuration that all recipes start from. It is locked: unknown keys fail."""
    start = {
        # Initial weights: a weight file, hf-hub:owner/name, or the workdir of a run; empty: random.
        "init": "",
        # Rows and columns of patches in `init` or --checkpoint; empty: from the file, or a square.
        "init_grid": (),
        # Starts the classifier at 0 if `init` has none or has another number of classes.
        "init_new_head": False,
        # Target MACs ratio of training, reached by moving the gate bias; 0: no budget.
        # With a budget, the prior's target depth follows from it and loss.target_depth is unused.
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
    """The data set and its augmentation."""
    return {
        "data": {
            "name": "digits",  # "digits", "folder", or a prepared data set of tensorflow-datasets
            # The image folder, or the data folder of tensorflow-datasets; empty: TFDS's default.
            "dir": "",
            "train_split": "train",
            "eval_split": "test",
            "mean": (0.485, 0.456, 0.406),  # per channel, of pixels scaled to [0, 1]
            "std": (0.229, 0.224, 0.225),
            "crop_ratio": 0.875,  # evaluation: central fraction of the resized image
            "num_threads": 2,  # reading and transforming threads, per worker
            "num_workers": 0,  # reading processes for training; 0: the training process reads
            "bad_records": "raise",  # unreadable record: "raise" an error, or "skip" to the next
            # Training or evaluation stops if a larger fraction of records is unreadable.
            "max_bad_share": 0.01,
        },
        # See avit_jax/data/transforms.py and augment.py. By default: crop and flip only.
        "augment": {
            "crop_scale": (0.08, 1.0),  # fraction of the image's area
            "flip": 0.5,  # probability
            "magnitude": 0.0,  # of RandAugment, up to 10; DeiT: 9
            "deviation": 0.5,  # standard deviation of the magnitude
            "repeats": 1,  # consecutive copies of an image, each augmented separately; DeiT: 3
            "erase": 0.0,  # probability of random erasing; DeiT: 0.25
            "mixup": 0.0,  # Beta parameter; DeiT: 0.8
            "cutmix": 0.0,  # Beta parameter; DeiT: 1
            "switch": 0.5,  # probability of cutmix if mixup is on too
        },
        # Random affine map, see avit_jax/data/augment.py; all 0: off.
        "affine": {"rotate": 0.0, "translate": 0.0, "scale": 0.0, "shear": 0.0},
    }


def _network() -> dict[str, dict[str, Any]]:
    """The network, its gate and its loss."""
    return {
        "model": {  # attributes of avit_jax.AViT
            "image_size": (224, 224),  # height, width
            "patch_size": 16,
            "channels": 3,
            "width": 192,
            "depth": 12,
            "num_heads": 3,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-6,  # 1e-12 for weights of Hugging Face
            "num_classes": 1000,
            "distilled": False,
            "pool": "token",  # what the head reads: "token", or "avg", "max" or "map" of patches
            "class_token": True,
            "num_registers": 0,  # register tokens, as in DINOv2
            "position_class": True,  # False: only patches have position embeddings
            "pre_norm": False,  # a norm before the first layer, as in CLIP
            "fc_norm": False,  # the last norm follows pooling
            "mlp": "gelu",  # or "gelu_tanh", "quick_gelu", "swiglu"
            "qkv_bias": True,
            "qk_norm": False,  # norms of queries and keys
            "layer_scale": False,  # learned scales of both branches of a layer
            "drop_path": 0.0,
            "dropout": 0.0,
            "dtype": "float32",  # of the computation; "bfloat16" on accelerators
            "remat": False,
        },
        "halting": {  # attributes of avit_jax.HaltingConfig
            "enabled": True,  # False: the static network
            "gamma": 10.0,
            "beta": -30.0,
            "epsilon": 0.01,
            "channel": 0,
            "learnable": False,
            "merge": False,  # merges a halted token into the most similar active token
            # Weight of the similarity to earlier tokens in the gate, with merge; for example 50
            # with gamma 1 and beta -42.
            "redundancy": 0.0,
        },
        "loss": {
            "label_smoothing": 0.0,
            "sigmoid": False,  # binary cross entropy of each class, as in DeiT-III; not softmax
            "class_weights": (),  # factor of each class's term; empty: 1
            "ponder_weight": 5e-4,
            "prior_weight": 0.1,  # the paper's; the released code uses 1e-3 with its own prior
            "target_depth": 8.0,  # layer, counted from 1; unused with a budget
            "prior_width": 1.0,  # layers
            "prior_mode": "paper",  # "official" reproduces the released code
        },
        # The teacher supervises the distillation token, or the class token if there is none.
        "distill": {
            "teacher": "",  # weight file, hf-hub:owner/name, or workdir of a run; empty: none
            "targets": "hard",  # "hard": its most likely class; "soft": its probabilities
            "weight": 0.5,  # of the teacher's loss; the label loss has 1 - weight
            "temperature": 1.0,  # of soft targets
        },
    }


def _training() -> dict[str, dict[str, Any]]:
    """The optimizer, the schedule of the run and its evaluation."""
    return {
        "optimizer": {
            "learning_rate": 5e-4,
            "warmup": 0.05,  # fraction of the steps
            "warmup_learning_rate": 1e-6,
            "min_learning_rate": 1e-5,
            "weight_decay": 0.05,
            "layer_decay": 1.0,  # factor of the learning rate per layer; fine-tuning: 0.75
            "clip_norm": 0.0,  # largest global norm of the gradient; 0: off
            "ema_decay": 0.99996,  # evaluation uses the averaged parameters; 0: no average
        },
        "train": {
            "batch_size": 512,  # images per step, over all devices
            "accumulate": 1,  # parts of a device's batch that run in turn, in less memory
            "steps": 1000,
            # Removes halted tokens in training: less work, the same gradients up to rounding.
            # On a GPU, removes tokens only if `plan.removal_pays`; otherwise masks them with
            # remat. Removal needs dropout 0. Not with prior_mode "official".
            "adaptive": False,
            "log_every": 50,  # steps
            "eval_every": 0,  # steps between evaluations, each with a checkpoint; 0: at the end
            "save_every": 500,  # steps between checkpoints
            "nonfinite": "stop",  # "skip": leaves non-finite updates out and counts them
        },
        "eval": {
            "batch_size": 512,
            # Removes halted tokens; on a GPU only if `plan.removal_pays`, otherwise masks them.
            # False: masks them.
            "adaptive": True,
            # Checkpoint that every mode but train reads: "last", "best", or "init" (the weights
            # of `init`).
            "checkpoint": "last",
            "pictures": 8,  # images in depth.png
        },
        "debug": {
            "nans": False,  # finds the operation that returns the first nan; slow
            "profile": (0, 0),  # first and last step that the profiler records; (0, 0): none
        },
    }


def from_json(values: dict[str, Any]) -> ConfigDict:
    """Returns the configuration that a checkpoint holds.

    Raises:
      errors.UserError: another version of this program wrote it.
    """
    config = default()
    try:
        config.update(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise errors.UserError(
            "the run is of another version of this program and cannot be used "
            f"({errors.first_line(error)})."
        ) from error
    check(config)
    return config


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration in types that JSON can hold."""
    return json.loads(config.to_json_best_effort())


def flat(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Returns the values by their full names, such as `train.steps`."""
    values = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            values |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            values[key] = value
    return values


def check(config: ConfigDict) -> None:
    """Raises errors.UserError, which names the key, if a value is not usable."""
    config_check.check(flat(config), flat(default()))


def saved_values(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a saved configuration by full name; missing keys get their defaults."""
    return flat(to_json(default())) | flat(saved)


def changes(current: dict[str, Any], saved: dict[str, Any]) -> str:
    """Returns the keys that changed, except the keys in `_FREE`; empty if none changed.

    Args:
      current: the configuration of this run, from `to_json`.
      saved: the configuration to compare with, from `to_json` too.
    """
    now, before = flat(current), saved_values(saved)
    changed = [
        f"{key} from {before.get(key, 'nothing')} to {now.get(key, 'nothing')}"
        for key in sorted((now.keys() | before.keys()) - _FREE)
        if json.dumps(now.get(key)) != json.dumps(before.get(key))  # so that nan equals nan
    ]
    return ", ".join(changed)


def check_same(current: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises errors.UserError if a run started with another configuration; see `changes`."""
    changed = changes(current, saved)
    if changed:
        raise errors.UserError(
            f"the run in this workdir started with another configuration; changed: {changed}. Use "
            "the old values, set another --workdir, or continue with --allow_changed_config."
        )
