"""A-ViT-S with DeiT's distillation token on ImageNet-1k.

python -m avit_jax.main --config=configs/deit_small_distilled.py --config.data.dir=... \
  --config.init=hf-hub:timm/deit_small_distilled_patch16_224.fb_in1k

The authors announced such models and released none. The teacher is that of
configs/deit_tiny_distilled.py.
Hardware: meant for 8 accelerators, 48 images each.
Expected: unknown, as nobody has trained it. The target depth of the prior is 8 of 12 layers, a MACs
ratio of about 0.67 (3.1 GMACs). The paper reports 80.7% at 3.6 GMACs with other settings.
"""

from ml_collections import ConfigDict

from avit_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = config_lib.recipe(__file__, "deit_small")
    tiny = config_lib.recipe(__file__, "deit_tiny_distilled")
    config.model.distilled = tiny.model.distilled
    config.distill.update(tiny.distill)
    return config
