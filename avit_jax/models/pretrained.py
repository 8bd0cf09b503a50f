"""A network that knows how its images are prepared and what its classes are called."""

import dataclasses
from typing import Any

from avit_jax.models import vit

# Of ImageNet, as most vision transformers use them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PretrainedAViT(vit.AViT):
    """An `AViT` with what `avit_jax.predict` needs beside the network.

    Attributes:
      mean: mean of the pixels scaled to [0, 1], one number per channel or one for all.
      std: standard deviation of the same pixels, in the same form.
      crop_ratio: central fraction of the resized image that the network sees.
      value_range: values of black and white in grey image files of more than 8 bits; empty: as the
        file says.
      sigmoid: whether each class has its own probability; else those of all classes sum to 1.
      label_names: names of the classes; empty if unknown.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop_ratio: float = 0.875
    value_range: tuple[float, ...] = ()
    sigmoid: bool = False
    label_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)


def of_model(model: vit.AViT, **attributes: Any) -> PretrainedAViT:
    """Returns a network with more attributes; those that are missing get their defaults."""
    own = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    if model.channels != len(MEAN):
        own = {"mean": (0.5,), "std": (0.5,)} | own
    return PretrainedAViT(**own | attributes)
