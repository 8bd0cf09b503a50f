"""How far the results of a trained model differ between masking halted tokens and removing them.

python -m experiments.exact_removal.run --config=configs/digits.py --workdir=runs/digits \
  --out=result.json

Compares, over the evaluation split of the recipe, logits (as a share of their largest), the depth
of the class token and of all tokens that have to compute, and the same with the images in reverse
order.
"""

import functools
import json

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from avit_jax import config as config_lib
from avit_jax.data import augment, loader
from avit_jax.inference import adaptive
from avit_jax.models import flops
from avit_jax.training import build, evaluate, restore
from avit_jax.utils import errors
from experiments import results

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "of the trained model", required=True)
_OUT = flags.DEFINE_string("out", None, "JSON file to write", required=True)


def main(_: list[str]) -> None:
    """Compares, prints and writes."""
    config = _CONFIG.value
    config_lib.check(config)
    model = build.model(config).clone(removal=None)
    variables = {"params": restore.params(config, model, _WORKDIR.value)[0]}
    masked, removed = jax.jit(model.apply), jax.jit(functools.partial(adaptive.apply, model))
    reader = evaluate.Evaluator(config, model).reader
    difference = scale = 0.0
    unequal = images = 0
    macs = []
    for batch in loader.eval_batches(
        reader, batch_size=config.eval.batch_size, num_threads=config.data.num_threads
    ):
        pixels = augment.normalize(batch["image"], config.data.mean, config.data.std)
        real = batch["weight"] > 0
        (logits, aux), (ours, our_aux), (flipped, flipped_aux) = jax.device_get(
            (
                masked(variables, pixels),
                removed(variables, pixels),
                removed(variables, pixels[::-1]),
            )
        )
        computes = np.asarray(flops.is_computed(aux.active, model.num_prefix_tokens))
        for other, active in ((ours, our_aux.active), (flipped[::-1], flipped_aux.active[:, ::-1])):
            difference = max(difference, float(np.abs(other - logits)[real].max()))
            unequal += int((active != computes)[:, real].any(axis=(0, 2)).sum())
        scale = max(scale, float(np.abs(logits).max()))
        images += int(real.sum())
        macs.append(our_aux.macs[real])
    result = {
        "images": images,
        "macs_ratio": float(np.concatenate(macs).mean()) / flops.static_macs(model),
        "largest_logit": scale,
        "largest_difference_over_largest_logit": difference / scale,
        "images_with_other_decisions": unequal,
    }
    print(json.dumps(result, indent=2))
    results.save(_OUT.value, result)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(errors.exit_on_user_error(main))
