"""A-ViT-T on your own images, in one folder per class.

python -m avit_jax.main --config=configs/folder.py --config.data.dir=my_images \
  --config.model.num_classes=2 --config.init=hf-hub:timm/deit_tiny_patch16_224.fb_in1k \
  --config.init_new_head=True

The images are <dir>/train/<class>/*.jpg and <dir>/val/<class>/*.jpg.

The recipe is configs/deit_tiny.py's, for 300 steps of 64 images. Set --config.train.steps to what
your images need. The prior weight of 0.1 may cost much accuracy in so few steps. On CIFAR-10 it
cost 6 points in 250 steps, and gave a MACs ratio of 0.63 (docs/study.md). The released prior
(--config.loss.prior_mode=official --config.loss.prior_weight=1e-3) cost one point there, and gave
0.95.
Hardware: one accelerator.
Expected: depends on the images.
"""

from ml_collections import ConfigDict

from avit_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = config_lib.recipe(__file__, "deit_tiny")
    config.data.update({"name": "folder", "eval_split": "val"})
    # For 300 steps: a longer average would still contain the initial weights.
    config.optimizer.ema_decay = 0.99
    config.train.update({"batch_size": 64, "steps": 300, "eval_every": 0})
    config.eval.batch_size = 64
    return config
