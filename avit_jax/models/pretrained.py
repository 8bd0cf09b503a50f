"""A network with the preprocessing of its images and the names of its classes."""

import dataclasses
from typing import Any

from avit_jax.models import vit

# Statistics of ImageNet, which most vision transformers use.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PretrainedAViT(vit.AViT):
    """An `AViT` with the preprocessing and the class names that `avit_jax.predict` needs.

    Attributes:
      mean: mean of the pixels scaled to [0, 1], one number per channel or one for all.
      std: standard deviation of the same pixels, in the same form.
      crop_ratio: central fraction of the resized image that the network gets.
      value_range: values of black and white in grey image files of more than 8 bits; empty: from
        the file.
      sigmoid: whether each class has its own probability; otherwise the probabilities of all
        classes sum to 1.
      label_names: names of the classes; empty if unknown.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop_ratio: float = 0.875
    value_range: tuple[float, ...] = ()
    sigmoid: bool = False
    label_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)


def of_model(model: vit.AViT, **attributes: Any) -> PretrainedAViT:
    """Returns a model as a `PretrainedAViT`, with the given attributes of that class.

    Attributes that are not given keep their values or get their defaults. Without 3 channels, mean
    and std default to 0.5.
    """
    own = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    if model.channels != len(MEAN):
        own = {"mean": (0.5,), "std": (0.5,)} | own
    return PretrainedAViT(**own | attributes)
