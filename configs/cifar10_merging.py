"""An A-ViT on CIFAR-10 whose halted tokens merge, tuned from a static network, at 0.6 of its MACs.

python -m avit_jax.main --config=configs/cifar10_merging.py --config.init=runs/static --workdir=runs/merging

runs/static is a run of configs/cifar10.py with --config.halting.enabled=False. Other recipes can set the same options; none
has been tried.
Hardware: two CPU cores, a quarter of an hour. Expected, from the study's parent and on 48,000 pictures: 70.0% top-1, where
the static network tuned as long has 70.3% (`merging_not_distilled` and `static_not_distilled` of the study).
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = cifar10.get_config()
    config.budget = 0.6
    config.augment.magnitude = 0.0
    config.halting.update({"merge": True, "redundancy": 50.0, "gamma": 1.0, "beta": -42.0})
    config.loss.update({"ponder_weight": 0.0, "prior_weight": 0.0})  # the budget alone says how many tokens halt
    config.optimizer.update({"learning_rate": 5e-4, "ema_decay": 0.99})
    config.train.update({"steps": 1000, "eval_every": 0, "save_every": 100, "adaptive": True})
    return config
