"""Pictures: where the network spends its thought."""

import io

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from avit_jax.utils import files

_COLORS = "viridis"


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
    """Images beside the depth of their tokens, above the histogram of depths and the mean score by
    layer.

    Args:
      images: `(n, H, W, C)` uint8, grey or RGB.
      depth: `(n, rows, columns)` layers used by each patch token.
      num_layers: L, the top of the colour scale.
      titles: of the images.
      patch_depth: `(L,)` share of patch tokens that halt at each layer, over the whole data set.
      score: `(L,)` mean halting score of each layer, over the whole data set.
      caption: a line above all.

    Returns:
      A figure; `write` writes it.
    """
    per_row = min(4, len(images))
    rows = -(-len(images) // per_row)
    figure = Figure(figsize=(11, 2.0 * rows + 3.4), layout="constrained")
    figure.suptitle(caption, fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.0 * rows, 3.0])
    axes = top.subplots(rows, 2 * per_row, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, depths, title) in enumerate(zip(images, depth, titles, strict=True)):
        left, right = axes[i // per_row, 2 * (i % per_row) :][:2]
        left.imshow(image, cmap="gray", vmin=0, vmax=255)
        left.set_title(title, fontsize=9, parse_math=False)
        drawn = right.imshow(depths, cmap=_COLORS, vmin=1, vmax=num_layers)
        right.set_title(f"depth {depths.mean():.1f}", fontsize=9)
    top.colorbar(
        drawn, ax=axes, label="layers used", shrink=0.8, ticks=np.arange(1, num_layers + 1)
    )
    layers = np.arange(1, num_layers + 1)
    histogram, scores = bottom.subplots(1, 2)
    histogram.bar(layers, patch_depth, color="tab:blue")
    histogram.set(
        xlabel="layer at which a patch token halts", ylabel="share of patch tokens", xticks=layers
    )
    scores.plot(layers, score, marker="o", color="tab:orange")
    scores.set(xlabel="layer", ylabel="mean halting score", xticks=layers)
    scores.set_ylim(bottom=0.0)
    return figure


def depth_map(image: np.ndarray, depth: np.ndarray, *, num_layers: int, title: str) -> Figure:
    """One image beside the depth of its tokens.

    Args:
      image: `(H, W, C)` uint8, grey or RGB.
      depth: `(rows, columns)` layers used by each patch token.
      num_layers: L, the top of the colour scale.
      title: of the image.
    """
    width = 3.5 * min(max(image.shape[1] / image.shape[0], 0.4), 2.5)
    figure = Figure(figsize=(2 * width + 1.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_title(title, fontsize=10, parse_math=False)
    drawn = right.imshow(
        depth, cmap=_COLORS, vmin=1, vmax=num_layers, extent=(0, image.shape[1], image.shape[0], 0)
    )
    right.set_title(f"depth {depth.mean():.1f} of {num_layers}", fontsize=10)
    for axis in (left, right):
        axis.set_axis_off()
    figure.colorbar(
        drawn, ax=right, label="layers used", ticks=np.arange(1, num_layers + 1), shrink=0.8
    )
    return figure


def write(figure: Figure, path: epath.PathLike, *, dpi: int = 150) -> None:
    """Writes a figure as PNG; to a bucket too, where Matplotlib by itself cannot."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi)
    files.write(path, content.getvalue())
