"""A-ViT-T with DeiT's distillation token on ImageNet-1k.

python -m avit_jax.main --config=configs/deit_tiny_distilled.py --config.data.dir=... \
  --config.init=hf-hub:timm/deit_tiny_distilled_patch16_224.fb_in1k

The authors announced such models and released none. The teacher is DeiT-B from the hub
(`pip install huggingface_hub`), unless --config.distill.teacher names a file. DeiT's own teacher
was a RegNetY-16GF, which is no vision transformer.
Hardware: meant for 8 accelerators, 64 images each.
Expected: unknown. DeiT-T with its token has 74.5% top-1 (DeiT paper).
"""

from ml_collections import ConfigDict

from avit_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = config_lib.recipe(__file__, "deit_tiny")
    config.model.distilled = True
    config.distill.update(
        {"teacher": "hf-hub:timm/deit_base_patch16_224.fb_in1k", "targets": "hard", "weight": 0.5}
    )
    return config
