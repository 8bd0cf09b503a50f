"""Figures that show how many layers each token of an image uses."""

import io
import textwrap
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from avit_jax.utils import files


def depth_figure(
    images: np.ndarray,
    depth: np.ndarray,
    *,
    num_layers: int,
    titles: list[str],
    patch_depth: np.ndarray,
    score: np.ndarray,
    caption: str,
) -> Figure:
    """Draws images beside the depth of their tokens, and statistics of the whole data set below.

    Args:
      images: `(n, H, W, C)` uint8, grey or RGB.
      depth: `(n, rows, columns)` layers used by each patch token.
      num_layers: L, the maximum of the colour scale.
      titles: one per image.
      patch_depth: `(L,)` fraction of patch tokens that halt at each layer, over the data set.
      score: `(L,)` mean halting score of each layer, over the data set.
      caption: a line above everything.

    Returns:
      A figure for `write`.
    """
    per_row = min(4, len(images))
    rows = -(-len(images) // per_row)
    panel = 9.6 / (2 * per_row)  # inches
    height = rows * (panel * images.shape[1] / images.shape[2] + 0.42)
    figure = Figure(figsize=(11, height + 3.6), layout="constrained")
    colours = f"Colours: layers that compute a patch. Yellow patches use all {num_layers} layers."
    figure.suptitle(f"{caption}\n{colours}", fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=[height, 3.0])
    axes = top.subplots(rows, 2 * per_row, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, depths, title) in enumerate(zip(images, depth, titles, strict=True)):
        pair = axes[i // per_row, 2 * (i % per_row) :][:2]
        mapped = _draw(pair, image, depths, num_layers, title, f"depth {depths.mean():.1f}", 8)
    layers = np.arange(1, num_layers + 1)
    top.colorbar(mapped, ax=axes, label="layers used", shrink=0.8, ticks=layers)
    histogram, scores = bottom.subplots(1, 2)
    histogram.bar(layers, patch_depth, color="tab:blue")
    histogram.set(xlabel="layer at which a patch token halts", xticks=layers)
    histogram.set(ylabel="share of patch tokens")
    scores.plot(layers, score, marker="o", color="tab:orange")
    scores.set(xlabel="layer", ylabel="mean halting score", xticks=layers)
    scores.set_ylim(bottom=0.0)
    return figure


def depth_map(image: np.ndarray, depth: np.ndarray, *, num_layers: int, title: str) -> Figure:
    """Draws one image beside the depth of its tokens.

    Args:
      image: `(H, W, C)` uint8, grey or RGB.
      depth: `(rows, columns)` layers used by each patch token.
      num_layers: L, the maximum of the colour scale.
      title: of the image.
    """
    width = 3.5 * min(max(image.shape[1] / image.shape[0], 0.4), 2.5)
    figure = Figure(figsize=(2 * width + 1.2, 4.0), layout="constrained")
    pair = figure.subplots(1, 2)
    depth_title = f"depth {depth.mean():.1f} of {num_layers}"
    mapped = _draw(pair, image, depth, num_layers, title, depth_title, 10)
    for axis in pair:
        axis.set_axis_off()
    layers = np.arange(1, num_layers + 1)
    figure.colorbar(mapped, ax=pair[1], label="layers used", ticks=layers, shrink=0.8)
    return figure


def _draw(
    axes: np.ndarray,
    image: np.ndarray,
    depth: np.ndarray,
    num_layers: int,
    title: str,
    depth_title: str,
    size: int,
) -> Any:
    """Draws an image and its depth on two axes; returns what a colour bar needs."""
    axes[0].imshow(image, cmap="gray", vmin=0, vmax=255)
    axes[0].set_title(wrapped(title), fontsize=size, parse_math=False)
    axes[1].set_title(depth_title, fontsize=size)
    extent = (0, image.shape[1], image.shape[0], 0)
    return axes[1].imshow(depth, cmap="viridis", vmin=1, vmax=num_layers, extent=extent)


def wrapped(title: str) -> str:
    """Returns a title in lines that are about as long as a small image is wide."""
    return "\n".join(textwrap.fill(line, 20) for line in title.splitlines())


def write(figure: Figure, path: epath.PathLike, *, dpi: int = 150) -> None:
    """Writes a figure as PNG, also to a bucket, where Matplotlib cannot write."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi)
    files.write(path, content.getvalue())
