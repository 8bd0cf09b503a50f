"""A-ViT-B on ImageNet-1k. The authors published no such model.

python -m avit_jax.main --config=configs/deit_base.py --workdir=runs/deit_base \
  --config.init=hf-hub:timm/deit_base_patch16_224.fb_in1k

The gate and the learning rate are those of A-ViT-S; the losses are the paper's.
Hardware: meant for 8 accelerators, 48 images each.
Expected: unknown. DeiT-B has 81.8% top-1 (DeiT paper) for 17.6 GMACs, by our count.
"""

from ml_collections import ConfigDict

from avit_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = config_lib.recipe(__file__, "deit_small")
    config.model.update({"width": 768, "num_heads": 12})
    return config
