"""Exports a trained network as one file that runs without this package: see `serving`."""

import io
import json
import logging
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.data import augment
from avit_jax.inference import adaptive, serving
from avit_jax.models import flops, vit
from avit_jax.training import build, distributed, restore
from avit_jax.utils import errors, files
from avit_jax.weights import weight_files

PLATFORMS = ("cpu", "cuda", "tpu")
_logger = logging.getLogger(__name__)


def write(
    path: epath.PathLike,
    params: Any,
    model: vit.AViT,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    label_names: Sequence[str] = (),
    batch: int = 0,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes inference with removal of halted tokens, from uint8 pictures to logits and depths.

    Args:
      path: of the file; takes about as many bytes as the parameters.
      params: of the model.
      model: with or without halting.
      mean: of the pixels from 0 to 1, by channel.
      std: likewise.
      label_names: of the classes.
      batch: images at once; 0 for any number.
      platforms: where it is to run, in JAX's names.
    """
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    if any(leaf.dtype.kind != "f" for leaf in leaves):  # bfloat16 is none of NumPy's
        raise ValueError(
            "the parameters of a network that is written must be of a dtype of NumPy's, such as "
            "float32."
        )
    apply = adaptive.make_apply(
        model.clone(fused_attention=False)
    )  # the file is to run without cuDNN

    def run(leaves: list[jax.Array], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, aux = apply(
            {"params": jax.tree.unflatten(tree, leaves)}, augment.normalize(images, mean, std)
        )
        return logits, flops.patch_depth(model, aux.active)

    size = batch or jax.export.symbolic_shape("b")[0]
    images = jax.ShapeDtypeStruct((size, *model.pixels, model.channels), np.uint8)
    program = jax.export.export(jax.jit(run), platforms=platforms)(
        jax.tree.map(_shape, leaves), images
    )
    metadata = {
        "kind": serving.KIND,
        "image_size": model.pixels,
        "channels": model.channels,
        "batch": batch,
        "num_classes": model.num_classes,
        "label_names": list(label_names),
        "mean": list(mean),
        "std": list(std),
        "halting": weight_files.to_file(params, model).gate,
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    weights = io.BytesIO()
    np.savez(weights, **{str(i): leaf for i, leaf in enumerate(leaves)})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("metadata.json", json.dumps(metadata))
        archive.writestr("program", bytes(program.serialize()))
        archive.writestr("weights.npz", weights.getvalue())
    files.write(path, content.getvalue())


def from_checkpoint(
    path: epath.PathLike, config: ConfigDict, checkpoint: epath.PathLike, *, batch: int = 0
) -> None:
    """Writes a network that has been trained: its weights alone if the path ends in .safetensors;
    as `write` does if in .avit.

    Args:
      path: of the file.
      config: the recipe the network was trained with.
      checkpoint: workdir of a run, of which `config.eval.checkpoint` is taken, or a weight file.
      batch: as in `write`.

    Raises:
      errors.UserError: the checkpoint cannot be used, or the file has the name of another kind.
    """
    if not str(path).lower().endswith((".avit", ".safetensors")):
        raise errors.UserError(
            "the file must be name.avit for a program, or name.safetensors for weights; got "
            f"{path}."
        )
    config_lib.check(config)
    model = build.model(config).clone(removal=None)
    params, names = restore.trained(config, model, checkpoint)
    if not distributed.is_first():
        return
    if str(path).lower().endswith(".safetensors"):
        weight_files.write(path, params, model)
    else:
        write(
            path,
            params,
            model,
            mean=config.data.mean,
            std=config.data.std,
            label_names=names,
            batch=batch,
        )
    _logger.info("wrote %s", path)


def _shape(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
