"""Runs an exported network: pictures in, logits and depths out.

Needs JAX, NumPy and flatbuffers, and nothing else of this package: the file may be copied to where it is wanted.

A file is a program: it computes what its author wrote. So take files from those only whose programs you would run.

Example:
  network = load("deit_tiny.avit")
  logits, depth = network(images)  # (B, H, W, C) uint8 to (B, classes) and (B, rows, columns)
  [network.metadata["label_names"][k] for k in logits.argmax(-1)]
"""

import dataclasses
import io
import json
import os
import re
import zipfile
from typing import Any, BinaryIO

import jax
import numpy as np

KIND = "avit_jax network, version 1"
_CALLS = {"shape_assertion"}  # of a batch of any size


class BadArtifact(ValueError):
    """A file that is not an exported network, or is damaged; the message is one sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """An exported network.

    Attributes:
      metadata: `image_size` (height, width), `channels`, `batch` (0: any), `num_classes`, `label_names` (empty where they are
        not known), `mean`, `std` and `halting` (None without it), for information: they are part of the program.
      shape: of the images; the first entry is a number, or a symbol for any number.
    """

    metadata: dict[str, Any]
    shape: tuple[Any, ...]
    _run: Any = dataclasses.field(repr=False)
    _weights: list[jax.Array] = dataclasses.field(repr=False)

    def __call__(self, images: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Classifies pictures; compiles at the first call of each batch size.

        Args:
          images: `(B, H, W, C)` uint8, resized and cropped to `image_size`.

        Returns:
          Logits `(B, num_classes)`, and `(B, rows, columns)` int32, the layers that each patch token has used.

        Raises:
          ValueError: the images are of another dtype or shape.
        """
        images = images if hasattr(images, "dtype") else np.asarray(images)
        batch, *expected = self.shape
        fits = images.ndim == 4 and images.shape[1:] == tuple(expected)
        fits = fits and (len(images) == batch if isinstance(batch, int) else len(images) > 0)
        if images.dtype != np.uint8 or not fits:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"images must be ({wanted}) of uint8; got {images.shape} of {images.dtype}.")
        return self._run(self._weights, images)


def load(path: os.PathLike | str) -> Network:
    """Reads an exported network onto the default device.

    Raises:
      BadArtifact: it is none, or damaged, or does not run on this kind of device or under this version of JAX.
      OSError: it cannot be read.
      ImportError: flatbuffers is not installed.
    """
    with open(path, "rb") as file:
        try:
            metadata, program, weights = _read(file)
        except ImportError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadArtifact(f"{path} is no exported network, or damaged ({line}).") from error
    here = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    if here not in program.platforms:
        raise BadArtifact(f"{path} runs on {', '.join(program.platforms)}, and not on {here}.")
    return Network(metadata=metadata, shape=program.in_avals[-1].shape, _run=jax.jit(program.call), _weights=weights)


def _read(file: BinaryIO) -> tuple[dict[str, Any], jax.export.Exported, list[jax.Array]]:
    """The parts of a file; raises anything where one of them is not as `export` writes it."""
    with zipfile.ZipFile(file) as archive:  # checks a sum of each part
        _check_stored(archive)
        metadata = json.loads(archive.read("metadata.json"))
        if metadata["kind"] != KIND:
            raise ValueError("it is of another version")
        program = jax.export.deserialize(bytearray(archive.read("program")))
        weights = io.BytesIO(archive.read("weights.npz"))
    with zipfile.ZipFile(weights) as archive:
        _check_stored(archive)
    weights.seek(0)
    with np.load(weights, allow_pickle=False) as arrays:
        arrays = [arrays[str(i)] for i in range(len(arrays.files))]
    *expected, images = program.in_avals
    if [(x.shape, x.dtype) for x in arrays] != [(x.shape, x.dtype) for x in expected]:
        raise ValueError("its weights are not those that its program asks for")
    if len(images.shape) != 4 or images.dtype != np.uint8 or len(program.out_avals) != 2:
        raise ValueError("its program does not go from pictures to logits and depths")
    calls = set(re.findall(r"custom_call @?\"?([\w.$-]+)", program.mlir_module())) - _CALLS
    if calls:
        raise ValueError(f"its program calls what no network of ours does: {', '.join(sorted(calls))}")
    return metadata, program, jax.device_put(arrays)


def _check_stored(archive: zipfile.ZipFile) -> None:
    """What is compressed, or is there several times, may be of any size when it is read."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in archive.infolist()) > archive.start_dir:
        raise ValueError("its parts lie over each other")
