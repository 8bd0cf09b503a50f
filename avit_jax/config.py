"""Every configuration key with its default. A recipe in configs/ starts from `default()`."""

import json
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from avit_jax import config_check, config_help
from avit_jax.utils import errors

# Keys that do not affect training. A run may resume with other values of them.
_FREE = {
    "data.dir",
    "data.num_threads",
    "data.num_workers",
    "train.save_every",
    "train.wandb",
    "eval.pictures",
    "eval.checkpoint",
    "debug.nans",
    "debug.profile",
}


def default() -> ConfigDict:
    """Returns the configuration that all recipes start from. It is locked: unknown keys fail."""
    start = {
        "seed": 0,  # of all random numbers: parameters, order of the images, augmentation
        # Initial weights: a weight file, hf-hub:owner/name, or the workdir of a run; empty: random.
        "init": "",
        # Rows and columns of patches in `init` or --checkpoint; empty: from the file, or a square.
        "init_grid": (),
        # Reads the moving average (EMA) of the weights from a checkpoint of PyTorch.
        "init_ema": False,
        # Resizes position embeddings as timm does, with antialiasing, and not as PyTorch's default.
        "init_antialias": False,
        # Starts the classifier at 0 if `init` has none or has another number of classes.
        "init_new_head": False,
        # Target MACs ratio of training, reached by moving the gate bias; 0: no budget.
        # With a budget, the prior's target depth follows from it and loss.target_depth is unused.
        "budget": 0.0,
    }
    return ConfigDict({**start, **_input(), **_network(), **_losses(), **_training()}).lock()


def recipe(file: str, name: str) -> ConfigDict:
    """Returns the config of the recipe `name` in the folder of `file`.

    Recipes call this instead of an import, because their package has two names: `configs` in a
    clone, and `avit_jax.configs` in an installation.
    """
    return runpy.run_path(str(pathlib.Path(file).with_name(f"{name}.py")))["get_config"]()


def _input() -> dict[str, dict[str, Any]]:
    """The data set and its augmentation."""
    return {
        "data": {  # the data set and how it is read
            # "digits", "folder", or a prepared data set of tensorflow-datasets; empty: none.
            "name": "digits",
            # The image folder, or the data folder of tensorflow-datasets; empty: TFDS's default.
            "dir": "",
            "train_split": "train",  # a name, or a part of it such as "train[:90%]"
            "eval_split": "test",  # measured during and after training
            "mean": (0.485, 0.456, 0.406),  # of each channel, for pixels scaled to [0, 1]
            "std": (0.229, 0.224, 0.225),  # standard deviation of the same pixels
            # Black and white of grey images of more than 8 bits, such as (0, 4095) for 12 bits;
            # empty: as the file says.
            "range": (),
            "crop_ratio": 0.875,  # evaluation: central fraction of the resized image
            "num_threads": 2,  # reading and transforming threads, per worker
            "num_workers": 0,  # reading processes for training; 0: the training process reads
            "bad_records": "raise",  # unreadable record: "raise" an error, or "skip" to the next
            # Training or evaluation stops if a larger fraction of records is unreadable.
            "max_bad_share": 0.01,
        },
        # Augmentation of training images. By default: crop and flip only.
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
        # Random affine map of each training image; all 0: off.
        "affine": {
            "rotate": 0.0,  # largest angle, in degrees
            "translate": 0.0,  # largest shift, as a fraction of the image's side
            "scale": 0.0,  # largest log2 of the zoom
            "shear": 0.0,  # largest angle, in degrees
        },
    }


def _network() -> dict[str, dict[str, Any]]:
    """The network and its gate."""
    return {
        "model": {  # attributes of avit_jax.AViT
            "image_size": (224, 224),  # height, width
            "patch_size": 16,  # side of a patch, in pixels
            "channels": 3,  # of an image: 1 for grey, 3 for RGB
            "width": 192,  # channels of a token
            "depth": 12,  # number of layers
            "num_heads": 3,  # of the attention; divides the width
            "mlp_ratio": 4.0,  # width of the MLP's hidden layer, relative to `width`
            "norm_eps": 1e-6,  # 1e-12 for ViT and DeiT of Hugging Face
            "num_classes": 1000,  # of the data set
            "distilled": False,  # adds DeiT's distillation token and its classifier
            "pool": "token",  # what the head reads: "token", or "avg", "max" or "map" of patches
            "class_token": True,  # False: no class token; then pool must not be "token"
            "num_registers": 0,  # register tokens, as in DINOv2
            "position_class": True,  # False: only patches have position embeddings
            "pre_norm": False,  # a norm before the first layer, as in CLIP
            "fc_norm": False,  # the last norm follows pooling
            "mlp": "gelu",  # or "gelu_tanh", "quick_gelu", "swiglu"
            "qkv_bias": True,  # biases of queries, keys and values
            "qk_norm": False,  # norms of queries and keys
            "layer_scale": False,  # learned scales of both branches of a layer
            "rope_theta": 0.0,  # above 0: rotary position embeddings of this base; DINOv3: 100
            "drop_path": 0.0,  # probability that training skips a branch of the last layer
            "dropout": 0.0,  # probability in training
            "dtype": "float32",  # of the computation; "bfloat16" on accelerators
            "remat": False,  # recomputes layers in the backward pass: less memory, mostly more time
        },
        "halting": {  # attributes of avit_jax.HaltingConfig
            "enabled": True,  # False: the static network
            "gamma": 10.0,  # gate scale: score = sigmoid(gamma * token[channel] + beta)
            "beta": -30.0,  # gate bias: a larger one halts tokens earlier
            "epsilon": 0.01,  # a token halts once its summed scores reach 1 - epsilon
            "channel": 0,  # channel of the token that the gate reads
            "learnable": False,  # trains gamma and beta too
            "merge": False,  # merges a halted token into the most similar active token
            # Weight of the similarity to earlier tokens in the gate, with merge; for example 50
            # with gamma 1 and beta -42.
            "redundancy": 0.0,
        },
    }


def _losses() -> dict[str, dict[str, Any]]:
    """The loss and the teacher."""
    return {
        "loss": {  # weights of the loss terms, and the depth prior
            "label_smoothing": 0.0,  # probability spread over all classes
            "sigmoid": False,  # binary cross entropy of each class, as in DeiT-III; not softmax
            "class_weights": (),  # factor of each class's term; empty: 1
            "ponder_weight": 5e-4,  # of the ponder loss, which shortens computation
            "prior_weight": 0.1,  # the paper's; the released code uses 1e-3 with its own prior
            "target_depth": 8.0,  # layer, counted from 1; unused with a budget
            "prior_width": 1.0,  # standard deviation of the prior, in layers
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
        "optimizer": {  # AdamW, with a cosine schedule after a warmup
            "learning_rate": 5e-4,  # at its maximum, after the warmup
            "warmup": 0.05,  # fraction of the steps
            "warmup_learning_rate": 1e-6,  # at the first step
            "min_learning_rate": 1e-5,  # at the end
            "weight_decay": 0.05,  # of AdamW; kernels only
            "layer_decay": 1.0,  # factor of the learning rate per layer; fine-tuning: 0.75
            "clip_norm": 0.0,  # largest global norm of the gradient; 0: off
            "ema_decay": 0.99996,  # evaluation uses the averaged parameters; 0: no average
        },
        "train": {  # the length of the run, and what it writes
            "batch_size": 512,  # images per step, over all devices
            "accumulate": 1,  # gradient accumulation: parts of a batch that run in turn
            "steps": 1000,  # of the whole run
            # Removes halted tokens in training: less work, the same gradients up to rounding.
            # On a GPU, removes tokens only if `plan.removal_pays`; otherwise masks them with
            # remat. Removal needs dropout 0. Not with prior_mode "official".
            "adaptive": False,
            "log_every": 50,  # steps between two rows of the log
            "eval_every": 0,  # steps between evaluations, each with a checkpoint; 0: at the end
            "save_every": 500,  # steps between checkpoints
            "nonfinite": "stop",  # "skip": leaves non-finite updates out and counts them
            # Project of Weights & Biases that gets the metrics too; empty: none.
            "wandb": "",
        },
        "eval": {  # evaluation, and what the other modes read
            "batch_size": 512,  # images per batch, over all devices
            # Removes halted tokens; on a GPU only if `plan.removal_pays`, otherwise masks them.
            # False: masks them.
            "adaptive": True,
            # Checkpoint that every mode but train reads: "last", "best", or "init" (the weights
            # of `init`).
            "checkpoint": "last",
            "pictures": 8,  # images in depth.png
        },
        "debug": {  # aids for finding errors and slow steps
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
            "another version of this program wrote the run's configuration "
            f"({errors.first_line(error)}): use that version, or set another --workdir."
        ) from error
    check(config)
    return config


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration in types that JSON can hold."""
    return json.loads(config.to_json_best_effort())


def describe() -> list[config_help.Key]:
    """Returns every key with its default and the comment beside it in this file."""
    return config_help.keys(pathlib.Path(__file__).read_text(), flat(default()))


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
