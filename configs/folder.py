"""A-ViT-T on pictures of your own, in one folder a class: <dir>/train/<class>/*.jpg and
<dir>/val/<class>/*.jpg.

python -m avit_jax.main --config=configs/folder.py --config.data.dir=my_pictures \
  --config.model.num_classes=2 --config.init=hf-hub:timm/deit_tiny_patch16_224.fb_in1k \
  --config.init_new_head=True

The recipe is configs/deit_tiny.py's, for 300 steps of 64 images: set --config.train.steps to what
your pictures need. Its prior weight of 0.1 may cost much accuracy in so few steps: in 250 steps on
CIFAR-10 it cost 6 points and brought the MACs to 0.63 (docs/study.md). The released prior
(--config.loss.prior_mode=official --config.loss.prior_weight=1e-3) cost one point there, and left
0.95.
Hardware: one accelerator. Expected: depends on the pictures.
"""

from ml_collections import ConfigDict

from configs import deit_tiny


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = deit_tiny.get_config()
    config.data.update({"name": "folder", "eval_split": "val"})
    # of 300 steps: a longer average would still hold the weights it started from
    config.optimizer.ema_decay = 0.99
    config.train.update({"batch_size": 64, "steps": 300, "eval_every": 0})
    config.eval.batch_size = 64
    return config
