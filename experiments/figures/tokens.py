"""The first figure of the README: which tokens of CIFAR-10 images each layer still computes.

python -m experiments.figures.tokens --data_dir=...

The network is the static parent of the study with threshold merging, without any training. The gate
bias was calibrated to a MACs ratio of 0.6 on held-out images and rounded; experiments/README.md has
the command.
The images were chosen for clear objects, among the first 48 of the test split. Writes tokens.png.
"""

import functools

import jax
import numpy as np
from absl import app, flags

from avit_jax.data import augment
from avit_jax.inference import adaptive
from avit_jax.models import flops
from avit_jax.training import build, evaluate
from avit_jax.utils import errors, visualize
from avit_jax.weights import weight_files
from configs import cifar10_merging
from experiments.figures import draw

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_OUT = flags.DEFINE_string("out", "experiments/figures/tokens.png", "file to write")
_PARENT = "experiments/pareto/parent.safetensors"
_BETA = -42.9
_CHOSEN = (24, 28, 29, 31, 35, 46)
_LAYERS = (2, 3, 6)


def main(_: list[str]) -> None:
    """Runs the network and draws."""
    config = cifar10_merging.get_config()
    config.update({"budget": 0.0, "halting": {"beta": _BETA}, "data": {"dir": _DATA_DIR.value}})
    model = build.model(config).clone(removal=None)
    reader = evaluate.Evaluator(config, model).reader
    images = np.stack([reader(i)["image"] for i in _CHOSEN])
    normal = augment.normalize(images, config.data.mean, config.data.std)
    params = weight_files.load(_PARENT, model)
    _, aux = jax.jit(functools.partial(adaptive.apply, model))({"params": params}, normal)
    depth = np.asarray(flops.patch_depth(model, aux.active))
    visualize.write(draw.remaining(images, depth, _LAYERS, model.depth), _OUT.value)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
