"""A-ViT-S on ImageNet-1k: DeiT-S fine-tuned for 100 epochs with the paper's losses.

python -m avit_jax.main --config=configs/deit_small.py --workdir=runs/deit_small \
  --config.init=hf-hub:timm/deit_small_patch16_224.fb_in1k

The gate is the released one for this size. The prior and its weight are those of
configs/deit_tiny.py, which gives the reason, and their cost in a short comparison. That comparison
did not try this gate.
Hardware: meant for 8 accelerators, 48 images each.
Expected: unknown, as nobody has trained it. The target depth of the prior is 8 of 12 layers, a MACs
ratio of about 0.67: 3.1 GMACs of DeiT-S's 4.6. The paper reports 78.6% at 3.6 GMACs with other
settings.
"""

from ml_collections import ConfigDict

from avit_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = config_lib.recipe(__file__, "deit_tiny")
    config.model.update({"width": 384, "num_heads": 6})
    config.halting.beta = -75.0
    tiny_batch, config.train.batch_size = config.train.batch_size, 384
    config.optimizer.learning_rate = 3e-4 * config.train.batch_size / 512
    config.train.steps = config.train.steps * tiny_batch // config.train.batch_size
    config.train.eval_every = config.train.eval_every * tiny_batch // config.train.batch_size
    return config
