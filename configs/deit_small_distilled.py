"""A-ViT-S with DeiT's distillation token on ImageNet-1k; the authors announced such models and
released none.

python -m avit_jax.main --config=configs/deit_small_distilled.py --config.data.dir=... \
  --config.init=hf-hub:timm/deit_small_distilled_patch16_224.fb_in1k

Teacher as in configs/deit_tiny_distilled.py.
Hardware: meant for 8 accelerators, 48 images each. Expected: unknown, as nobody has trained it. The
prior aims at a depth of 8 of 12 layers, about 0.67 of the MACs (3.1 GMACs). The paper reports 80.7%
at 3.6 GMACs with other settings.
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
