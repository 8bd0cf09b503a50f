"""Runs an exported network: pictures in, logits and depths out.

Needs JAX, NumPy and flatbuffers, and nothing else of this package: the file may be copied to where it is wanted.

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
    """

    metadata: dict[str, Any]
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
        expected = (*self.metadata["image_size"], self.metadata["channels"])
        batch = self.metadata["batch"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected or batch not in (0, len(images)):
            wanted = f"({batch or 'B'}, {', '.join(map(str, expected))})"
            raise ValueError(f"images must be {wanted} of uint8; got {images.shape} of {images.dtype}.")
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
            metadata = json.loads(archive.read("metadata.json"))
            if metadata["kind"] != KIND:
                raise BadArtifact(f"{path} is of another version: {metadata['kind']}.")
            program = jax.export.deserialize(bytearray(archive.read("program")))
            with np.load(io.BytesIO(archive.read("weights.npz")), allow_pickle=False) as arrays:
                weights = [arrays[str(i)] for i in range(len(arrays.files))]
    except (OSError, ImportError, BadArtifact):
        raise
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadArtifact(f"{path} is no exported network, or damaged ({line}).") from error
    here = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    if here not in program.platforms:
        raise BadArtifact(f"{path} runs on {', '.join(program.platforms)}, and not on {here}.")
    return Network(metadata=metadata, _run=jax.jit(program.call), _weights=jax.device_put(weights))
