"""How many tokens halt at another layer, and how many images get another class, when a trained
network computes in bfloat16, or in float32 with the tanh approximation of GELU.

python -m experiments.mixed_precision.run --config=configs/digits.py \
  --checkpoint=avit_jax/zoo/digits.safetensors --out=digits.json

Parameters and halting sums stay float32. Looks at the whole evaluation split.
"""

import json

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from avit_jax.training import build, evaluate, restore
from avit_jax.utils import errors
from experiments import results, timing
from experiments.figures import gather

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe", lock_config=True)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "workdir of a run, or a weight file", required=True
)
_OUT = flags.DEFINE_string("out", None, "file of the result", required=True)


def _means(images: gather.Images) -> dict[str, float]:
    return {
        "top1": float((images.guess == images.label).mean()),
        "macs_ratio": float(images.macs_ratio.mean()),
    }


def _changes(exact: gather.Images, other: gather.Images) -> dict[str, float]:
    difference = np.abs(exact.depth.astype(int) - other.depth)
    return {
        "tokens_of_other_depth": float((difference > 0).mean()),
        "tokens_farther_than_one_layer": float((difference > 1).mean()),
        "images_of_other_class": float((exact.guess != other.guess).mean()),
    }


def main(_: list[str]) -> None:
    """Compares, prints and writes."""
    config = _CONFIG.value
    config.model.dtype = "float32"
    model = build.model(config).clone(removal=None)
    params, _ = restore.trained(config, model, _CHECKPOINT.value)
    reader = evaluate.Evaluator(config, model).reader
    variants = {
        "float32": model,
        "bfloat16": model.clone(dtype="bfloat16"),
        "tanh": model.clone(mlp="gelu_tanh"),
    }
    seen = {
        name: gather.gather(config, variant, jax.device_put(params), reader)
        for name, variant in variants.items()
    }
    exact = seen.pop("float32")
    result = timing.environment() | {"images": len(exact.index), "float32": _means(exact)}
    result |= {name: _means(images) | _changes(exact, images) for name, images in seen.items()}
    results.save(_OUT.value, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(errors.exit_on_user_error(main))
