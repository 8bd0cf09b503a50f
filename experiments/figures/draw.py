"""The figures; small ones with large letters, which a phone can show."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from avit_jax.utils import visualize
from experiments.figures.gather import Images

_COLORS = "viridis"
_SETTINGS = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def _figure(height: float) -> Figure:
    with matplotlib.rc_context(_SETTINGS):
        return Figure(figsize=(5.4, height), layout="constrained")


def maps(images: list[np.ndarray], depth: np.ndarray, titles: list[str], num_layers: int) -> Figure:
    """Images beside the depth of their tokens, two to a row.

    Args:
      images: `(H, W, C)` uint8 each.
      depth: `(n, rows, columns)`, of the same images.
      titles: of the images.
      num_layers: L.
    """
    rows = -(-len(images) // 2)
    figure = _figure(1.65 * rows + 0.5)
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, depths, title) in enumerate(zip(images, depth, titles, strict=True)):
        left, right = axes[i // 2, 2 * (i % 2) :][:2]
        left.imshow(image, cmap="gray", vmin=0, vmax=255)
        left.set_title(visualize.wrapped(title), fontsize=8, parse_math=False)
        height, width = image.shape[:2]
        drawn = right.imshow(
            depths, cmap=_COLORS, vmin=1, vmax=num_layers, extent=(0, width, height, 0)
        )
        right.set_title(f"depth {depths.mean():.1f}", fontsize=9)
    ticks = np.arange(1, num_layers + 1)
    figure.colorbar(
        drawn,
        ax=axes,
        label="layers used",
        ticks=ticks,
        orientation="horizontal",
        shrink=0.7,
        aspect=40,
    )
    return figure


def remaining(
    images: np.ndarray, depth: np.ndarray, layers: tuple[int, ...], num_layers: int
) -> Figure:
    """Images, and below each of them the patches that some layers still compute.

    Args:
      images: `(n, H, W, 3)` uint8.
      depth: `(n, rows, columns)` layers used by each patch token.
      layers: counted from 1; each gives one row, in which the other patches fade out.
      num_layers: L.
    """
    height, width = (images.shape[axis] // depth.shape[axis] for axis in (1, 2))
    used = depth.repeat(height, axis=1).repeat(width, axis=2)[..., None]
    figure = Figure(
        figsize=(1.2 * len(images) + 0.6, 1.2 * (1 + len(layers))), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(1 + len(layers), len(images), squeeze=False)
    rows = {"image": np.ones_like(used, bool)}
    rows |= {f"layer {layer}\nof {num_layers}": used >= layer for layer in layers}
    for row, (name, kept) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, fontsize=11, rotation=0, ha="right", va="center")
        for axis, image in zip(row, np.where(kept, images, _faded(images)), strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return figure


def _faded(images: np.ndarray) -> np.ndarray:
    return (0.12 * images + 0.88 * 235).astype(np.uint8)


def position(depth: np.ndarray, num_layers: int) -> Figure:
    """Mean depth by the position of the token; `depth` is `(n, rows, columns)`."""
    figure = _figure(3.8)
    axis = figure.subplots()
    drawn = axis.imshow(depth.mean(axis=0), cmap=_COLORS)
    axis.set(xlabel="column of the patch", ylabel="row of the patch")
    figure.colorbar(drawn, label=f"mean layers used, of {num_layers}")
    return figure


def layers(images: Images) -> Figure:
    """Where tokens halt, and the mean halting score by layer with its spread over images."""
    num_layers = images.score.shape[1]
    ticks = np.arange(1, num_layers + 1)
    figure = _figure(5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(ticks, images.halting.mean(axis=0), color="tab:blue")
    above.set_ylabel("share of tokens\nthat halt here")
    reached = ~np.isnan(images.score).all(axis=0)
    mean, spread = (np.full(num_layers, np.nan) for _ in range(2))
    mean[reached], spread[reached] = (
        f(images.score[:, reached], axis=0) for f in (np.nanmean, np.nanstd)
    )
    below.fill_between(
        ticks, mean - spread, mean + spread, color="tab:orange", alpha=0.3, linewidth=0
    )
    below.plot(ticks, mean, marker="o", color="tab:orange")
    below.set(xlabel="layer", ylabel="mean halting score", xticks=ticks)
    below.set_ylim(bottom=0.0)
    return figure


def classes(images: Images, names: list[str], most: int = 16) -> Figure:
    """Share of the MACs by class, with its spread over images; of many classes the cheapest and the
    most expensive.
    """
    found = [k for k in range(len(names)) if (images.label == k).any()]
    mean = {k: images.macs_ratio[images.label == k].mean() for k in found}
    order = sorted(found, key=mean.__getitem__)
    shown = order if len(order) <= most else order[: most // 2] + order[-most // 2 :]
    figure = _figure(0.28 * len(shown) + 1.0)
    axis = figure.subplots()
    for place, k in enumerate(shown):
        values = images.macs_ratio[images.label == k]
        axis.errorbar(
            values.mean(), place, xerr=values.std(), fmt="o", color="tab:green", capsize=3
        )
    axis.set_yticks(range(len(shown)), [names[k][:24] for k in shown], parse_math=False)
    axis.set_xlabel("MACs ratio")
    return figure


def tradeoff(rows: list[dict[str, float]], parent_top1: float | None) -> Figure:
    """Top-1 against MACs of one network whose gate is shifted; `parent_top1` of its static parent,
    where it is known.
    """
    figure = _figure(3.8)
    axis = figure.subplots()
    rows = sorted(rows, key=lambda row: row["macs_ratio"])
    axis.plot(
        [row["macs_ratio"] for row in rows],
        [100 * row["top1"] for row in rows],
        marker="o",
        color="tab:blue",
    )
    for row in rows:
        if row["shift"] == 0:
            label = {"label": "as trained", "color": "tab:red"}
            axis.plot(
                row["macs_ratio"],
                100 * row["top1"],
                marker="o",
                markersize=10,
                linestyle="",
                **label,
            )
    if parent_top1 is not None:
        axis.plot(
            1.0,
            100 * parent_top1,
            marker="*",
            markersize=14,
            linestyle="",
            color="black",
            label="static parent",
        )
    axis.set(xlabel="MACs ratio", ylabel="top-1, %")
    axis.legend(frameon=False)
    return figure
