"""How many tokens halt at another layer, and how many images get another class, when a trained
network computes in bfloat16.

python -m experiments.mixed_precision.run --config=configs/digits.py --checkpoint=runs/digits \
  --out=digits.json

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


def main(_: list[str]) -> None:
    """Compares, prints and writes."""
    config = _CONFIG.value
    seen = {}
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        model = build.model(config).clone(removal=None)
        params, _ = restore.trained(config, model, _CHECKPOINT.value)
        seen[dtype] = gather.gather(
            config, model, jax.device_put(params), evaluate.Evaluator(config, model).reader
        )
    exact, half = seen["float32"], seen["bfloat16"]
    top1 = {dtype: float((images.guess == images.label).mean()) for dtype, images in seen.items()}
    result = timing.environment() | {
        "images": len(exact.index),
        "top1": top1,
        "top1_difference": top1["bfloat16"] - top1["float32"],
        "macs_ratio": {dtype: float(images.macs_ratio.mean()) for dtype, images in seen.items()},
        "tokens_of_other_depth": float((exact.depth != half.depth).mean()),
        "tokens_farther_than_one_layer": float(
            (np.abs(exact.depth.astype(int) - half.depth) > 1).mean()
        ),
        "images_of_other_class": float((exact.guess != half.guess).mean()),
    }
    results.save(_OUT.value, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(errors.exit_on_user_error(main))
