"""Small trained networks that come with the package: `avit_jax.load("digits")`.

`python -m avit_jax.zoo` prints the table.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping

from avit_jax.utils import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the zoo.

    Attributes:
      about: what it is, in one sentence.
      top1: accuracy on the test split, a fraction.
      images: number of images of the test split.
      macs: mean multiply-accumulates per image.
      macs_ratio: `macs` relative to the static network.
      recipe: the recipe it was trained with.
      command: the command that trained it.
      sha256: of the file `<name>.safetensors`.
    """

    about: str
    top1: float
    images: int
    macs: float
    macs_ratio: float
    recipe: str
    command: str
    sha256: str


def read() -> dict[str, Network]:
    """Returns the networks by name, from networks.json."""
    content = json.loads(pathlib.Path(__file__).with_name("networks.json").read_text())
    return {name: Network(**values) for name, values in content.items()}


NETWORKS = read()


def file(name: str) -> pathlib.Path:
    """Returns the weight file of a network, after a comparison with its checksum.

    Raises:
      errors.UserError: there is no such network, or its file is damaged.
    """
    if name not in NETWORKS:
        raise errors.UserError(f"the zoo has no {name}: name one of {', '.join(NETWORKS)}.")
    path = pathlib.Path(__file__).with_name(f"{name}.safetensors")
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    if found != NETWORKS[name].sha256:
        raise errors.UserError(f"{path} is missing or damaged: install avit_jax again.")
    return path


def table(networks: Mapping[str, Network] = NETWORKS) -> str:
    """Returns a table of networks in Markdown."""
    lines = [
        "| name | top-1 | test images | million MACs | MACs ratio | recipe | SHA-256 starts |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    lines += [
        f"| `{name}` | {100 * one.top1:.2f}% | {one.images:,} | {one.macs / 1e6:.2f} | "
        f"{one.macs_ratio:.3f} | `{one.recipe}` | `{one.sha256[:12]}` |"
        for name, one in networks.items()
    ]
    return "\n".join(lines) + "\n"
