"""Threshold merging on CIFAR-10, trained from a static network, at a MACs ratio of 0.6.

python -m avit_jax.main --config=configs/cifar10_merging.py --config.init=runs/static \
  --workdir=runs/merging

A token merges into the most similar active one, as in ToMe, once its cosine similarity to an
earlier token exceeds a threshold. The budget moves the threshold, which is the same for all images.
No halting is learned: the gate gets no usable gradient.

runs/static is a run of configs/cifar10.py with --config.halting.enabled=False. Other recipes can
set the same options, but nobody has tried them.
Hardware: two CPU cores, a quarter of an hour.
Expected: 70.0% top-1, from the study's parent and on 48,000 images. The static network has 70.3%
after as many steps, which is within the error (`merging_not_distilled` and `static_not_distilled`
of the study). Training takes 2.7 epochs and starts from an under-trained parent. A better parent
may lose more.
"""

from ml_collections import ConfigDict

from avit_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = config_lib.recipe(__file__, "cifar10")
    config.budget = 0.6
    config.augment.magnitude = 0.0
    config.halting.update({"merge": True, "redundancy": 50.0, "gamma": 1.0, "beta": -42.0})
    # The budget alone sets the threshold.
    config.loss.update({"ponder_weight": 0.0, "prior_weight": 0.0})
    config.optimizer.update({"learning_rate": 5e-4, "ema_decay": 0.99})
    config.train.update({"steps": 1000, "eval_every": 0, "save_every": 100, "adaptive": True})
    return config
