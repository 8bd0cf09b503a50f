"""A-ViT-S with DeiT's distillation token on ImageNet-1k; the authors announced such models and released none.

python -m avit_jax.main --config=configs/deit_small_distilled.py --config.data.dir=... \
  --config.init=hf-hub:timm/deit_small_distilled_patch16_224.fb_in1k

Teacher as in configs/deit_tiny_distilled.py.
Hardware: meant for 8 accelerators, 48 images each. Expected (paper, not yet ours): 80.7% top-1 at 3.6 GMACs.
"""

from ml_collections import ConfigDict

from configs import deit_small, deit_tiny_distilled


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = deit_small.get_config()
    tiny = deit_tiny_distilled.get_config()
    config.model.distilled = tiny.model.distilled
    config.distill.update(tiny.distill)
    return config
