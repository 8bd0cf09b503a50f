"""Runs an exported network: images in, logits and depths out.

This module needs only JAX, NumPy and flatbuffers. You may copy it to another machine.

An exported file is a program: it computes what its author wrote. Run only files of authors whom you
trust.

Examples:
  >>> network = load("deit_tiny.avit")
  >>> logits, depth = network(images)  # (B, H, W, C) uint8 to (B, classes) and (B, rows, columns)
  >>> [network.metadata["label_names"][k] for k in logits.argmax(-1)]
"""

import dataclasses
import io
import json
import math
import os
import re
import zipfile
from typing import Any, BinaryIO

import jax
import numpy as np

KIND = "avit_jax network, version 1"
_ALLOWED_CALLS = {"shape_assertion"}  # checks a batch of any size


class BadArtifact(ValueError):
    """A file is not an exported network, or is damaged; the message is one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """An exported network.

    Attributes:
      metadata: `image_size` (height, width), `channels`, `batch` (0: any), `num_classes` and
        `label_names` (empty if unknown); `sigmoid`: whether probabilities are the sigmoid of each
        logit (several classes per image), or their softmax; `value_range`: values of black and
        white in grey image files of more than 8 bits, which become 0 and 255 (empty if unknown);
        `crop_ratio`: visible fraction of the resized image's shorter side (0 if unknown). Files of
        older versions may lack the last three. Also `mean`, `std` and `halting` (None
        without halting), for information: the program contains them. It maps pixels from 0 to 255
        to (pixel / 255 - mean) / std.
      shape: `(B, H, W, C)` of the images; B is a number, or a symbol if any number is allowed.
    """

    metadata: dict[str, Any]
    shape: tuple[Any, ...]
    _run: Any = dataclasses.field(repr=False)
    _weights: list[jax.Array] = dataclasses.field(repr=False)

    def __call__(self, images: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Classifies images; the first call of each batch size compiles.

        Args:
          images: `(B, H, W, C)` uint8, resized and cropped to `image_size`.

        Returns:
          Logits `(B, num_classes)`; and depths `(B, rows, columns)` int32, the number of layers in
          which each patch token is computed.

        Raises:
          ValueError: the images have another dtype or shape.
        """
        array: Any = images if hasattr(images, "dtype") else np.asarray(images)
        batch, *expected = self.shape
        fits = array.ndim == 4 and array.shape[1:] == tuple(expected)
        fits = fits and (len(array) == batch if isinstance(batch, int) else len(array) > 0)
        if array.dtype != np.uint8 or not fits:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(
                f"images must be ({wanted}) of uint8; got {array.shape} of {array.dtype}."
            )
        return self._run(self._weights, array)


def load(path: os.PathLike | str) -> Network:
    """Loads an exported network onto the default device.

    Raises:
      BadArtifact: the file is not an exported network, is damaged, has parts that do not fit
        together, or does not run on this device or with this version of JAX.
      OSError: the file cannot be read.
      ImportError: flatbuffers is not installed.
    """
    with open(path, "rb") as file:
        try:
            metadata, program, weights = _read(file)
        except ImportError:
            raise
        except Exception as error:
            raise BadArtifact(
                f"{path} is no exported network, or damaged ({_first_line(error)}): export the "
                "network again."
            ) from error
    here = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    if here not in program.platforms:
        raise BadArtifact(
            f"{path} runs on {', '.join(program.platforms)}, and not on {here}: use another device."
        )
    run, images = jax.jit(program.call), program.in_avals[-1]
    shape = (metadata["batch"] or 1, *images.shape[1:])
    try:  # all steps except compilation
        run.lower(weights, jax.ShapeDtypeStruct(shape, images.dtype))
    except Exception as error:
        raise BadArtifact(
            f"{path} does not run ({_first_line(error)}): export it with this version of JAX."
        ) from error
    return Network(metadata=metadata, shape=images.shape, _run=run, _weights=weights)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(file: BinaryIO) -> tuple[dict[str, Any], jax.export.Exported, list[jax.Array]]:
    """Reads the parts of a file; raises any exception if one is not as `export` writes it."""
    with zipfile.ZipFile(file) as archive:  # compares checksums
        _check_archive(archive)
        metadata = json.loads(archive.read("metadata.json"))
        if metadata["kind"] != KIND:
            raise ValueError(f"its kind is not {KIND!r}")
        program = jax.export.deserialize(bytearray(archive.read("program")))
        weights = io.BytesIO(archive.read("weights.npz"))
    with zipfile.ZipFile(weights) as archive:
        _check_archive(archive)
    weights.seek(0)
    with np.load(weights, allow_pickle=False) as arrays:
        arrays = [arrays[str(i)] for i in range(len(arrays.files))]
    *expected, _ = program.in_avals
    if [(x.shape, x.dtype) for x in arrays] != [(x.shape, x.dtype) for x in expected]:
        raise ValueError("its weights do not have the shapes and dtypes of its program")
    if not all(np.isfinite(x).all() for x in arrays):
        raise ValueError("its weights hold NaN or infinity")
    calls = set(re.findall(r"custom_call @?\"?([\w.$-]+)", program.mlir_module()))
    if calls - _ALLOWED_CALLS:
        unknown = ", ".join(sorted(calls - _ALLOWED_CALLS))
        raise ValueError(f"its program calls functions that no exported network needs: {unknown}")
    _check_program(program, len(arrays))
    _check_metadata(metadata, program)
    return metadata, program, jax.device_put(arrays)


def _check_program(program: jax.export.Exported, num_weights: int) -> None:
    """Raises ValueError unless the program maps weights and images to logits and depths."""
    images, outputs = program.in_avals[-1], program.out_avals
    trees = jax.tree.structure((([0] * num_weights, 0), {})), jax.tree.structure((0, 0))
    fits = (
        (program.in_tree, program.out_tree, program.nr_devices) == (*trees, 1)
        and len(images.shape) == 4
        and images.dtype == np.uint8
        and all(isinstance(size, int) and size > 0 for size in images.shape[1:])
        and [len(x.shape) for x in outputs] == [2, 3]
        and {x.shape[0] for x in outputs} == {images.shape[0]}
        and np.dtype(outputs[0].dtype).kind in "fV"  # bfloat16 has the kind "V"
        and outputs[1].dtype == np.int32
    )
    if not fits:
        raise ValueError("its program does not map images to logits and depths")


def _check_metadata(metadata: dict[str, Any], program: jax.export.Exported) -> None:
    """Raises ValueError if the metadata lacks an entry or contradicts the program."""
    batch, *sides, channels = program.in_avals[-1].shape
    num_classes = program.out_avals[0].shape[1]
    expected = {
        "image_size": sides,
        "channels": channels,
        "batch": batch if isinstance(batch, int) else 0,
        "num_classes": num_classes,
    }
    # JSON tells 1 from True and 1.0.
    valid = {key: json.dumps(metadata.get(key)) == json.dumps(expected[key]) for key in expected}
    names: Any = metadata.get("label_names")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    valid["label_names"] = are_names and len(names) in (0, num_classes)
    valid["halting"] = "halting" in metadata and isinstance(metadata["halting"], dict | None)
    valid["sigmoid"] = isinstance(metadata.get("sigmoid", False), bool)
    values: Any = metadata.get("value_range", [])
    valid["value_range"] = isinstance(values, list) and len(values) in (0, 2)
    valid["value_range"] = valid["value_range"] and all(map(_is_number, values))
    ratio: Any = metadata.get("crop_ratio", 0)
    valid["crop_ratio"] = _is_number(ratio) and 0 <= ratio <= 1
    for key in ("mean", "std"):
        values = metadata.get(key)
        valid[key] = isinstance(values, list) and len(values) in (1, channels)
        valid[key] = valid[key] and all(map(_is_number, values))
        valid[key] = valid[key] and (key == "mean" or min(values) > 0)
    wrong = [key for key, fits in valid.items() if not fits]
    if wrong:
        raise ValueError(f"its metadata does not fit its program: {', '.join(wrong)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_archive(archive: zipfile.ZipFile) -> None:
    """Raises ValueError if a part may be larger than the file: compressed, or overlapping."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in archive.infolist()) > archive.start_dir:
        raise ValueError("its parts overlap")
