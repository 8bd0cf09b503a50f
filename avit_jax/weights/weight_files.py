"""Weight files of other libraries: reads them, fits them to a model, writes them; without PyTorch.

Readable are PyTorch checkpoints (`.pth`, `.pt`, `.bin`, `.ckpt`, `.pth.tar`) and `.safetensors` of
timm, DeiT, DINOv2, DINOv3 and the released A-ViT; files and folders of Hugging Face's ViT, DeiT,
MSN, I-JEPA, Dinov2, DINOv3, CLIP vision and SigLIP vision with their `config.json`, also in several
files; and `.npz` of big_vision and AugReg.

Examples:
  >>> params = load("deit_tiny_patch16_224.pth", model)
  >>> write("model.safetensors", params, model)
"""

from avit_jax.weights.fitting import describe, fit, infer, load, to_params
from avit_jax.weights.reading import WeightFile, fingerprint, read
from avit_jax.weights.writing import to_file, write

__all__ = [
    "WeightFile",
    "describe",
    "fingerprint",
    "fit",
    "infer",
    "load",
    "read",
    "to_file",
    "to_params",
    "write",
]
