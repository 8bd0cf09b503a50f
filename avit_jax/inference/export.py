"""Exports a trained network as one file, for `serving` or for runtimes of ONNX."""

import dataclasses
import functools
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
from avit_jax import run_config
from avit_jax.data import augment
from avit_jax.inference import adapt, adaptive, export_onnx, serving
from avit_jax.models import flops, vit
from avit_jax.training import build, distributed, restore
from avit_jax.utils import errors, files
from avit_jax.weights import writing

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
    sigmoid: bool = False,
    value_range: Sequence[float] = (),
    crop_ratio: float = 0.0,
    batch: int = 0,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a network as a program from uint8 images to logits and depths.

    In the program, LayerScale is folded into the layers before it.

    Args:
      path: of the file, which is about as large as the parameters. With the ending .onnx, the
        program masks halted tokens; see `export_onnx.convert`. Otherwise, the file is for
        `serving`, and the program removes halted tokens.
      params: parameters of the model, of a float dtype that NumPy has without other libraries.
      model: with or without halting.
      mean: mean of the pixels scaled to [0, 1], one number per channel or one for all.
      std: standard deviation of the same pixels, in the same form.
      label_names: names of the classes; empty if unknown.
      sigmoid: whether each class has its own probability, the sigmoid of its logit; otherwise the
        probabilities are the softmax of the logits. The program gives logits in both cases.
      value_range: values of black and white in grey image files of more than 8 bits, which become
        0 and 255; empty: not known. For information, as `sigmoid`.
      crop_ratio: visible fraction of the resized image's shorter side; 0: not known. As `sigmoid`.
      batch: images per call; 0 allows any number.
      platforms: JAX's names of the platforms that run the program; unused for .onnx.

    Raises:
      ValueError: the parameters have another dtype, such as bfloat16.
      errors.UserError: the path ends in .onnx, and `export_onnx.convert` cannot convert it.
    """
    model, params = adapt.fold_layer_scale(model, params)
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    if any(leaf.dtype.kind != "f" for leaf in leaves):  # bfloat16 has the kind "V"
        raise ValueError("convert the parameters to one of NumPy's float dtypes, such as float32.")
    colors = {"mean": list(mean), "std": list(std)}
    names = {"label_names": list(label_names), "sigmoid": sigmoid}
    metadata = _sizes(params, model) | names | colors
    metadata |= {"batch": batch, "value_range": list(value_range), "crop_ratio": crop_ratio}
    if str(path).lower().endswith(".onnx"):
        params = jax.tree.unflatten(tree, leaves)
        files.write(path, export_onnx.convert(model, params, metadata, batch=batch, **colors))
        return
    program = _program(leaves, tree, model, mean, std, batch, platforms)
    metadata |= {"kind": serving.KIND, "platforms": list(platforms)}
    weights, content = io.BytesIO(), io.BytesIO()
    np.savez(weights, **{str(i): leaf for i, leaf in enumerate(leaves)})
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("metadata.json", json.dumps(metadata))
        archive.writestr("program", bytes(program.serialize()))
        archive.writestr("weights.npz", weights.getvalue())
    files.write(path, content.getvalue())


def _sizes(params: Any, model: vit.AViT) -> dict[str, Any]:
    """Returns the part of the metadata that follows from a network."""
    return {
        "image_size": model.pixels,
        "channels": model.channels,
        "num_classes": model.num_classes,
        "halting": writing.gate_of(params, model),
        "jax": jax.__version__,
    }


def _program(
    leaves: list[np.ndarray],
    tree: jax.tree_util.PyTreeDef,
    model: vit.AViT,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int,
    platforms: Sequence[str],
) -> jax.export.Exported:
    """Exports (leaves of the parameters, images) -> (logits, depths)."""
    network = model.clone(fused_attention=False)  # the program must not need cuDNN
    apply: Any = network.apply
    if model.halting is not None:
        plan = adaptive.default_plan(batch or None)
        # JAX cannot lower a kernel for one of several platforms.
        plan = dataclasses.replace(plan, one_kernel=plan.one_kernel and len(platforms) == 1)
        apply = functools.partial(adaptive.apply, network, plan=plan)

    def run(leaves: list[jax.Array], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = {"params": jax.tree.unflatten(tree, leaves)}
        logits, aux = apply(variables, augment.normalize(images, tuple(mean), tuple(std)))
        return logits, flops.patch_depth(model, aux.active)

    size = batch or jax.export.symbolic_shape("b")[0]
    images = jax.ShapeDtypeStruct((size, *model.pixels, model.channels), np.uint8)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return jax.export.export(jax.jit(run), platforms=platforms)(shapes, images)


def from_checkpoint(
    path: epath.PathLike, config: ConfigDict, checkpoint: epath.PathLike, *, batch: int = 0
) -> None:
    """Exports a trained network.

    Args:
      path: of the file. The endings .avit and .onnx give a program, see `write`; .safetensors
        gives the weights alone.
      config: the recipe of the network.
      checkpoint: a weight file, or the workdir of a run; `config.eval.checkpoint` selects the
        checkpoint.
      batch: as in `write`.

    Raises:
      errors.UserError: the checkpoint cannot be read or does not fit, the path has another ending,
        or the network cannot be converted to ONNX.
    """
    ending = str(path).lower()
    if not ending.endswith((".avit", ".onnx", ".safetensors")):
        raise errors.UserError(
            "the file must be name.avit or name.onnx for a program, or name.safetensors for "
            f"weights; got {path}."
        )
    if ending.endswith(".onnx"):
        export_onnx.check_installed()
    config_lib.check(config)
    model = build.model(config).clone(removal=None)
    params, names = restore.trained(config, model, checkpoint)
    if not distributed.is_first():
        return
    if ending.endswith(".safetensors"):
        run_config.write_weights(path, params, model, config, names)
    else:
        colors = {"mean": config.data.mean, "std": config.data.std}
        more = {"sigmoid": config.loss.sigmoid, "value_range": tuple(config.data.range)}
        more |= {"label_names": names, "crop_ratio": config.data.crop_ratio}
        write(path, params, model, batch=batch, **more, **colors)
    _logger.info("wrote %s", path)
