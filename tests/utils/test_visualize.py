"""The figure shows the given values, and can be written."""

import pathlib

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from avit_jax.utils import visualize

_LAYERS = 6


def _figure(
    count: int, image_shape: tuple[int, int, int], grid: tuple[int, int]
) -> tuple[Figure, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *image_shape), dtype=np.uint8)
    depth = rng.integers(2, _LAYERS, (count, *grid))  # neither end of the scale
    figure = visualize.depth_figure(
        images,
        depth,
        num_layers=_LAYERS,
        titles=[f"title {i}" for i in range(count)],
        patch_depth=np.arange(_LAYERS) / 15,
        score=np.arange(_LAYERS)[::-1] / 10,
        caption="a caption",
    )
    return figure, images, depth


def _pictures(figure: Figure) -> list[Axes]:
    """Returns the axes with an image, in reading order, without the colour bar."""
    return [axes for axes in figure.axes if axes.get_images()]


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    ("image_shape", "grid"),
    [((8, 8, 1), (2, 2)), ((8, 8, 3), (4, 4)), ((8, 24, 3), (2, 6)), ((24, 8, 1), (6, 2))],
)
def test_pictures_and_depths(
    count: int, image_shape: tuple[int, int, int], grid: tuple[int, int]
) -> None:
    figure, images, depth = _figure(count, image_shape, grid)
    axes = _pictures(figure)
    assert len(axes) == 2 * count
    assert len(figure.subfigs[0].axes) == 2 * count + 1  # no empty places; the colour bar
    for i in range(count):
        picture, map_ = axes[2 * i], axes[2 * i + 1]
        np.testing.assert_array_equal(picture.get_images()[0].get_array(), images[i].squeeze())
        np.testing.assert_array_equal(map_.get_images()[0].get_array(), depth[i])
        assert map_.get_images()[0].get_clim() == (1, _LAYERS)
        assert (picture.get_title(), map_.get_title()) == (
            f"title {i}",
            f"depth {depth[i].mean():.1f}",
        )


def test_long_titles_are_wrapped_and_rows_are_as_high_as_their_images() -> None:
    assert visualize.wrapped("great white shark, great grey shark,\npredicted eel") == (
        "great white shark,\ngreat grey shark,\npredicted eel"
    )
    heights = [_figure(8, shape, (2, 2))[0].get_figheight() for shape in ((8, 8, 3), (8, 24, 3))]
    assert heights[0] > heights[1] + 1


def test_a_title_is_no_formula(tmp_path: pathlib.Path) -> None:
    image, depth = np.zeros((8, 8, 1), np.uint8), np.ones((2, 2))
    figure = visualize.depth_map(image, depth, num_layers=_LAYERS, title=r"from $\no to $2")
    visualize.write(figure, tmp_path / "title.png")


def test_grey_pictures_are_drawn_from_black_to_white() -> None:
    figure, _, _ = _figure(2, (8, 8, 1), (2, 2))
    assert _pictures(figure)[0].get_images()[0].get_cmap().name == "gray"
    assert _pictures(figure)[0].get_images()[0].get_clim() == (0, 255)


def test_curves_caption_and_scale() -> None:
    figure, _, _ = _figure(1, (8, 8, 1), (2, 2))
    caption, colours = figure.get_suptitle().split("\n")
    assert caption == "a caption" and f"all {_LAYERS} layers" in colours
    (bars,) = (axes for axes in figure.axes if axes.get_ylabel() == "share of patch tokens")
    np.testing.assert_allclose([bar.get_height() for bar in bars.patches], np.arange(_LAYERS) / 15)
    (curve,) = (
        axes.get_lines()[0]
        for axes in figure.axes
        if axes.get_ylabel().startswith("mean halting score")
    )
    np.testing.assert_allclose(
        curve.get_xydata(), np.stack([np.arange(1, 7), np.arange(_LAYERS)[::-1] / 10], axis=1)
    )
    (bar,) = (axes for axes in figure.axes if axes.get_ylabel() == "layers used")
    assert bar.get_ylim() == (1, _LAYERS)


@pytest.mark.parametrize(("count", "image_shape"), [(1, (8, 8, 1)), (8, (8, 16, 3))])
def test_writes_a_png(
    count: int, image_shape: tuple[int, int, int], tmp_path: pathlib.Path
) -> None:
    figure, _, _ = _figure(count, image_shape, (2, 4))
    visualize.write(figure, tmp_path / "figure.png", dpi=50)
    picture = Image.open(tmp_path / "figure.png")
    assert picture.format == "PNG"
    assert 400 < picture.width < 800
    assert 200 < picture.height < 600
    assert len(np.unique(np.asarray(picture.convert("L")))) > 50
