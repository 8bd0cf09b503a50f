"""Any vision transformer on your own images, with threshold merging.

python -m avit_jax.main --config=configs/finetune.py:hf-hub:timm/vit_small_patch14_dinov2.lvd142m \
  --config.data.dir=my_images --config.model.num_classes=2 \
  --config.model.image_size='(224,224)'

After the colon stands the backbone: a weight file, hf-hub:owner/name, a network of the zoo, or the
workdir of a run. The recipe reads its sizes, its layers, its image size, mean and std. Another
image size resizes the position embeddings. The classifier is new if the number of classes differs.

The images are <dir>/train/<class>/*.jpg and <dir>/val/<class>/*.jpg. Training and augmentation are
configs/folder.py's, 300 steps of 64 images. Set --config.train.steps to what your images need.
A backbone without a gate gets the one of avit_jax.make_adaptive: similar tokens merge, and a budget
of 0.6 moves the threshold. A backbone with a gate keeps it.
Hardware: one accelerator.
Expected: depends on the images. Nobody has tried these settings on a large backbone.
"""

import dataclasses

from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax import networks
from avit_jax.inference import adapt
from avit_jax.utils import errors

_OF_TRAINING = ("num_classes", "drop_path", "dropout", "dtype", "remat")  # not of the backbone


def get_config(backbone: str = "") -> ConfigDict:
    """Returns the recipe for a backbone."""
    if not backbone:
        raise errors.UserError(
            "name the backbone after a colon, for example "
            "--config=finetune:hf-hub:timm/vit_small_patch14_dinov2.lvd142m."
        )
    network = networks.describe(backbone)
    config = config_lib.recipe(__file__, "folder")
    config.update({"init": backbone, "init_new_head": True, "budget": 0.6})
    config.data.update({key: getattr(network, key) for key in ("mean", "std", "crop_ratio")})
    keys = [key for key in config.model if key not in _OF_TRAINING]
    config.model.update({key: getattr(network, key) for key in keys})
    config.halting.update(dataclasses.asdict(network.halting or adapt.SIMILARITY_GATE))
    if config.halting.merge:  # the budget alone sets the threshold
        config.loss.update({"ponder_weight": 0.0, "prior_weight": 0.0})
    config.optimizer.layer_decay = 0.75
    config.train.adaptive = True
    return config
