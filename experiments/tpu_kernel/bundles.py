"""Counts the instruction bundles of a TPU kernel, and estimates how fast its images run.

A bundle holds what a core issues in a cycle. In straight-line code a bundle takes about a cycle.
Waits for memory are left out, so the result is an estimate.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from avit_jax.kernels import vit_tpu_layer

# Address, label of a block, depth in loops, instructions.
_LINE = re.compile(r"\s*0x[0-9a-f]+\s*([A-Z]+)?\s*:\s*(>*)\s*\{(.*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Bundles of a turn of a loop over layers: with the first branch taken, and what it skips."""

    layer: int
    move: int


def read(text: str) -> tuple[list[Loop], int]:
    """Returns the loops over layers in the order of the program, and an image's bundles outside.

    Args:
      text: the compiler's dump of the final bundles. The grid is its outer loop.
    """
    loops: list[list[int]] = []  # for each loop the bundles between branches and labels
    outside = depth = 0
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        label, marks, instructions = match.groups()
        # A branch takes effect some bundles later; these have no marks.
        depth = len(marks) if marks or not instructions.strip().startswith("}") else depth
        if depth == 1:
            outside += 1
        if depth != 2:
            continue
        if label == "LB":
            loops.append([0])
        elif label == "PF":
            loops[-1].append(0)
        loops[-1][-1] += 1
        if "sbr.rel" in instructions and len(loops[-1]) == 1:
            loops[-1].append(0)
    found = []
    for parts in loops:
        move = parts[1] if len(parts) == 3 else 0
        found.append(Loop(layer=sum(parts) - move, move=move))
    return found, outside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Bundles of the kernel.

    Attributes:
      loops: by compiled number of tokens.
      outside: per image outside the loops over layers.
    """

    loops: Mapping[int, Loop]
    outside: int

    def image(self, counts: Sequence[int]) -> int:
        """Returns the bundles of an image that computes so many tokens in each layer."""
        total, before = self.outside, 0
        for count in counts:
            if not count:
                break
            num = min(n for n in self.loops if n >= count)
            total += self.loops[num].layer
            if before > num:
                total += self.loops[before].move
            before = num
        return total


def kernel(text: str, sizes: vit_tpu_layer.Sizes) -> Kernel:
    """Returns the bundles of the kernel, from its dump.

    Raises:
      ValueError: the dump does not have a loop for each compiled number of tokens.
    """
    loops, outside = read(text)
    counts = sizes.token_counts()[::-1]
    if len(loops) != len(counts) or not all(loop.move for loop in loops[:-1]):
        raise ValueError(f"expected {len(counts)} loops with a move each; got {loops}.")
    return Kernel(loops=dict(zip(counts, loops, strict=True)), outside=outside)
