"""Converts a network to ONNX by jax2onnx: a program for runtimes without JAX.

Halted tokens are masked, not removed: the file computes all tokens, and gives the same logits and
depths.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.data import augment
from avit_jax.models import flops, vit
from avit_jax.utils import errors

# As in setup.cfg. jax2onnx 0.17.1 requires an orbax-checkpoint older than ours; it does not use it.
_INSTALL = "pip install onnx 'onnx-ir>=1' && pip install --no-deps 'jax2onnx>=0.17.1'"
_OPSET = 18  # of 2022; most runtimes know it
_LARGEST = 2**31 - 2**24  # a protobuf file holds less than 2 GiB; the program needs some of it


def check_installed() -> None:
    """Raises errors.UserError if the converter is not installed."""
    try:
        import jax2onnx  # noqa: F401
        import onnx_ir  # noqa: F401
    except ImportError as error:
        raise errors.UserError(
            f"an .onnx file needs a converter ({errors.first_line(error)}): run `{_INSTALL}`."
        ) from error


def convert(
    model: vit.AViT,
    params: Any,
    metadata: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch: int = 0,
) -> bytes:
    """Returns the content of an .onnx file, whose program computes in float32.

    Its input is "images" `(B, H, W, C)` uint8. Its outputs are "logits" `(B, num_classes)` float32
    and "depth" `(B, rows, columns)` int32, the layers in which each patch token is active.

    Args:
      model: with or without halting.
      params: parameters of the model, NumPy arrays.
      metadata: values by name, which JSON can hold; the file's metadata holds each one as JSON.
      mean: mean of the pixels scaled to [0, 1], one number per channel or one for all.
      std: standard deviation of the same pixels, in the same form.
      batch: images per call; 0 allows any number.

    Raises:
      errors.UserError: the converter is not installed, or the parameters exceed 2 GiB.
    """
    check_installed()
    import jax2onnx
    import onnx_ir

    network = model.clone(dtype=None, fused_attention=False, removal=None)
    apply: Any = network.apply
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > _LARGEST:
        raise errors.UserError(
            f"an .onnx file holds at most 2 GiB, and the parameters need {size / 2**30:.1f} GiB: "
            "write name.avit instead."
        )

    def run(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        normalized = augment.normalize(images, tuple(mean), tuple(std))
        logits, aux = apply({"params": params}, normalized)
        return logits, flops.patch_depth(model, aux.active)

    images: Any = jax.ShapeDtypeStruct((batch or "B", *model.pixels, model.channels), jnp.uint8)
    # With merging, jax2onnx 0.17.1 converts the loop over layers wrongly, so it is unrolled.
    merges = model.halting is not None and model.halting.merge
    with _quiet("jax2onnx", "onnx_ir"), jax.disable_jit(merges):
        program = jax2onnx.to_onnx(
            run,
            [images],
            opset=_OPSET,
            return_mode="ir",
            input_names=["images"],
            output_names=["logits", "depth"],
        )
        _remove_unused(program)
        for key, value in metadata.items():
            program.metadata_props[key] = json.dumps(value)
        return onnx_ir.to_proto(program).SerializeToString()


def _remove_unused(program: Any) -> None:
    """Removes constants that jax2onnx leaves behind; onnxruntime warns of each one."""
    for graph in program.graphs():
        constants = graph.initializers
        for name in [name for name, value in constants.items() if not value.uses()]:
            del constants[name]


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Hides warnings of these loggers, such as tracebacks about libraries that are missing."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
