"""The figures of a data set: what is gathered agrees with the evaluation; the page holds
everything.
"""

import html.parser
import pathlib
import sys

import fakes
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.training import build, devices, evaluate

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.figures import draw, gather, page


@pytest.fixture(scope="module")
def images() -> gather.Images:
    config = fixtures.small_config(**{"halting.beta": -2.0})
    model = build.model(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    evaluator = evaluate.Evaluator(config, model)
    images = gather.gather(config, model, params, evaluator.reader)
    results = evaluator(devices.replicate(params))
    values = evaluator.scalars(results)
    assert len(images.index) == len(evaluator.source.records) == values["images"]
    np.testing.assert_allclose((images.guess == images.label).mean(), values["top1"], atol=1e-6)
    np.testing.assert_allclose(images.macs_ratio.mean(), values["macs_ratio"], rtol=1e-5)
    np.testing.assert_allclose(images.depth.mean(), values["depth_patch"], rtol=1e-5)
    np.testing.assert_allclose(
        np.nan_to_num(images.score).mean(axis=0), results["score"], atol=1e-5
    )
    np.testing.assert_array_equal(
        np.isnan(images.score).sum(axis=0) > 0,
        results["score"] < np.nanmean(images.score, 0) - 1e-6,
    )
    np.testing.assert_allclose(images.halting.mean(axis=0), results["patch_depth"], atol=1e-5)
    assert images.depth.std() > 0.1  # or nothing would have been compared
    return images


@pytest.mark.parametrize("budget", [0.0, 0.6])  # with one the gate is a parameter
def test_a_gate_that_is_shifted_up_halts_sooner(budget: float) -> None:
    config = fixtures.small_config(**{"halting.beta": -2.0, "budget": budget})
    params = build.model(config).init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    low, middle, high = gather.sweep(config, params, [-0.5, 0.0, 0.5])
    assert low["macs_ratio"] > middle["macs_ratio"] > high["macs_ratio"]
    assert config.halting.beta == -2.0


def test_every_figure_can_be_drawn(images: gather.Images, tmp_path: pathlib.Path) -> None:
    names = [f"class $\\frac {i}" for i in range(10)]  # no mathematics
    pixels = [
        np.zeros((16, 16, 1), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((16, 16, 1), np.uint8),
    ]
    rows = [
        {"shift": shift, "top1": 0.5, "macs_ratio": 0.5 - 0.1 * shift} for shift in (-1.0, 0.0, 1.0)
    ]
    figures = [
        draw.maps(pixels, images.depth[:3], ["a", "$a_b_c$", "c"], 3),
        draw.position(images.depth, 3),
        draw.layers(images),
        draw.classes(images, names),
        draw.classes(images, names, most=4),
        draw.tradeoff(rows, None),
        draw.tradeoff(rows, 0.6),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
        assert any(
            axis.lines or axis.images or axis.patches or axis.collections for axis in figure.axes
        ), f"{i} is empty"
    labels = [label.get_text() for label in figures[4].axes[0].get_yticklabels()]
    by_cost = sorted(range(10), key=lambda k: images.macs_ratio[images.label == k].mean())
    assert labels == [names[k] for k in by_cost[:2] + by_cost[-2:]]


def test_patches_that_a_layer_leaves_out_fade() -> None:
    images = np.full((2, 8, 8, 3), 50, np.uint8)
    depth = np.array([[[1, 2], [3, 3]], [[3, 3], [3, 3]]])
    figure = draw.remaining(images, depth, (2, 3), 3)
    shown = [axis.get_images()[0].get_array() for axis in figure.axes]
    assert len(shown) == 6  # two images, and two layers of each
    for i in (0, 1, 3, 5):  # the images; the second has all patches in both layers
        np.testing.assert_array_equal(shown[i], images[0])
    second, third = shown[2], shown[4]
    assert (second[:4, :4] > 200).all() and (second[:, 4:] == 50).all() and (second[4:] == 50).all()
    assert (third[:4] > 200).all() and (third[4:] == 50).all()


class _Links(html.parser.HTMLParser):
    """What a page asks for, and the tags it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_everything(tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "x.png"
    picture.write_bytes(fixtures.png(np.zeros((4, 4), np.uint8)))
    links = _Links()
    links.feed(
        page.page(
            "A & B",
            {"top-1": "<5%"},
            [("One", 'with "quotes"', picture), ("Two", "", picture)],
            "python x",
            {"Start": "../index.html?a&b"},
        )
    )
    assert links.links[0] == "../index.html?a&b"
    assert len(links.links) == 3 and all(
        link.startswith("data:image/png;base64,") for link in links.links[1:]
    )
    assert "script" not in links.tags and "link" not in links.tags


@pytest.mark.slow
def test_a_trained_run_to_a_page(tmp_path: pathlib.Path) -> None:
    import subprocess

    recipe = tmp_path / "recipe.py"
    tests = pathlib.Path(__file__).parents[1]
    recipe.write_text(
        f"import sys\nsys.path.insert(0, {str(tests)!r})\nimport fixtures\n"
        "def get_config():\n  return fixtures.small_config(**{'train.steps': 2, 'budget': 0.6})\n"
    )
    fakes.real_run(fixtures.small_config(**{"train.steps": 2, "budget": 0.6}), tmp_path / "run")
    command = [
        sys.executable,
        "-m",
        "experiments.figures.run",
        f"--config={recipe}",
        f"--checkpoint={tmp_path / 'run'}",
    ]
    command += [f"--out={tmp_path / 'out'}", "--shifts=0,0.5", "--shown=3", "--link=Start=a.html"]
    subprocess.run(command, cwd=tests.parent, check=True, capture_output=True)
    assert len(list((tmp_path / "out").glob("*.png"))) == 7
    assert (tmp_path / "out/index.html").stat().st_size > 100_000
    page_text = (tmp_path / "out/index.html").read_text()
    assert '<a href="a.html">Start</a>' in page_text and "--shown=3" in page_text
    failed = subprocess.run(
        [*command, "--config.halting.enabled=False", "--config.budget=0"],
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith(
        "error: figures are of a network that halts"
    )
