"""A-ViT-B on ImageNet-1k; the authors published none: gate and learning rate are those of A-ViT-S,
losses the paper's.

python -m avit_jax.main --config=configs/deit_base.py --workdir=runs/deit_base \
  --config.init=hf-hub:timm/deit_base_patch16_224.fb_in1k

Hardware: meant for 8 accelerators, 48 images each. Expected: unknown; DeiT-B has 81.8% top-1 (DeiT
paper), for 17.6 GMACs by our count.
"""

from ml_collections import ConfigDict

from configs import deit_small


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = deit_small.get_config()
    config.model.update({"width": 768, "num_heads": 12})
    return config
