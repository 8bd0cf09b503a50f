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
import zipfile
from typing import Any

import jax
import numpy as np

KIND = "avit_jax network, version 1"


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
    _run: Any
    _weights: list[jax.Array]

    def __call__(self, images: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Classifies pictures; compiles at the first call of each batch size.

        Args:
          images: `(B, H, W, C)` uint8, resized and cropped to `image_size`.

        Returns:
          Logits `(B, num_classes)`, and `(B, rows, columns)` int32, the layers that each patch token has used.

        Raises:
          ValueError: the images are of another dtype or shape.
        """
        batch, *expected = self.shape
        fits = images.ndim == 4 and images.shape[1:] == tuple(expected) and (len(images) == batch or not isinstance(batch, int))
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
    try:
        with zipfile.ZipFile(path) as archive:  # checks a sum of each part
            _check_stored(archive, path)
            metadata = json.loads(archive.read("metadata.json"))
            if metadata["kind"] != KIND:
                raise BadArtifact(f"{path} is of another version: {metadata['kind']}.")
            program = jax.export.deserialize(bytearray(archive.read("program")))
            with zipfile.ZipFile(io.BytesIO(archive.read("weights.npz"))) as weights_archive:
                _check_stored(weights_archive, path)
            with np.load(io.BytesIO(archive.read("weights.npz")), allow_pickle=False) as arrays:
                weights = [arrays[str(i)] for i in range(len(arrays.files))]
            *expected, images = program.in_avals
            if [(x.shape, x.dtype) for x in weights] != [(x.shape, x.dtype) for x in expected]:
                raise BadArtifact(f"{path} holds other weights than its program asks for.")
    except (OSError, ImportError, BadArtifact):
        raise
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadArtifact(f"{path} is no exported network, or damaged ({line}).") from error
    here = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    if here not in program.platforms:
        raise BadArtifact(f"{path} runs on {', '.join(program.platforms)}, and not on {here}.")
    return Network(metadata=metadata, shape=images.shape, _run=jax.jit(program.call), _weights=jax.device_put(weights))


def _check_stored(archive: zipfile.ZipFile, path: os.PathLike | str) -> None:
    """What is compressed may be of any size when it is read."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise BadArtifact(f"{path} is no exported network: it is compressed.")
