"""Threshold merging on CIFAR-10, trained from a static network, at 0.6 of its MACs.

python -m avit_jax.main --config=configs/cifar10_merging.py --config.init=runs/static \
  --workdir=runs/merging

A token merges into the most similar active one, as in ToMe, once its cosine similarity to an
earlier token exceeds a threshold. The budget moves the threshold, which is the same for all images.
No halting is learned: the gate gets no usable gradient.

runs/static is a run of configs/cifar10.py with --config.halting.enabled=False. Other recipes can
set the same options, but none has been tried.
Hardware: two CPU cores, a quarter of an hour. Expected, from the study's parent and on 48,000
images: 70.0% top-1. The static network trained as long has 70.3%, within the error
  (`merging_not_distilled` and `static_not_distilled` of the study). 2.7
epochs from an under-trained parent: a better parent may lose more.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = cifar10.get_config()
    config.budget = 0.6
    config.augment.magnitude = 0.0
    config.halting.update({"merge": True, "redundancy": 50.0, "gamma": 1.0, "beta": -42.0})
    config.loss.update(
        {"ponder_weight": 0.0, "prior_weight": 0.0}
    )  # the budget alone sets the threshold
    config.optimizer.update({"learning_rate": 5e-4, "ema_decay": 0.99})
    config.train.update({"steps": 1000, "eval_every": 0, "save_every": 100, "adaptive": True})
    return config
