"""The Python code of README and docs/python.md runs as it stands there."""

import pathlib
import re

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avit_jax.tools import predict
from avit_jax.training import loop
from avit_jax.weights import weight_files

_REPOSITORY = pathlib.Path(__file__).parents[1]
README = (_REPOSITORY / "README.md").read_text()
PYTHON = (_REPOSITORY / "docs/python.md").read_text()
TOKENS = jax.random.normal(jax.random.key(0), (2, 9, 16))


def code(marker: str) -> str:
    """The first Python block after a marker of one of the pages."""
    (after,) = [page.split(marker, 1)[1] for page in (README, PYTHON) if marker in page]
    return re.search(r"```python\n(.*?)```", after, re.DOTALL).group(1)


def check_halting(output: jax.Array, state) -> None:
    assert output.shape == TOKENS.shape
    assert not state.active.any()  # the last layer ends all
    assert np.all((state.depth >= 1) & (state.depth <= 4))
    assert np.unique(state.depth).size > 1, "the example should show tokens of different depth"


@pytest.mark.parametrize("marker", ["<!-- linen example -->", "<!-- nnx example -->"])
def test_examples_are_at_most_15_lines(marker: str) -> None:
    assert len([line for line in code(marker).splitlines() if line.strip()]) <= 15


def test_linen_example() -> None:
    scope: dict = {}
    exec(code("<!-- linen example -->"), scope)
    (output, state), _ = scope["Encoder"]().init_with_output(jax.random.key(1), TOKENS)
    check_halting(output, state)


def test_nnx_example() -> None:
    scope: dict = {}
    exec(code("<!-- nnx example -->"), scope)
    output, state = scope["Encoder"](16, 4, nnx.Rngs(1))(TOKENS)
    check_halting(output, state)


def test_model_example() -> None:
    scope: dict = {}
    exec(code("<!-- model example -->"), scope)
    assert scope["logits"].shape == (2, 13) and scope["aux"].depth.shape == (2, 25)
    assert jnp.isfinite(scope["loss"])
    logits = scope["logits"]
    exec(code("<!-- adaptive example -->"), scope)
    np.testing.assert_allclose(scope["logits"], logits, atol=1e-5)
    assert scope["aux"].macs.shape == scope["aux"].macs_padded.shape == (2,)
    assert np.unique(scope["aux"].depth).size > 1, (
        "the example should show tokens of different depth"
    )


def test_features_example() -> None:
    scope: dict = {}
    exec(code("<!-- model example -->"), scope)
    exec(code("<!-- features example -->"), scope)
    exec(code("<!-- attention example -->"), scope)
    model, variables = scope["model"], {"params": scope["params"]}
    _, masked = jax.jit(lambda v, x: model.apply(v, x, features=True))(variables, scope["images"])
    assert scope["aux"].features.shape == (2, *model.grid, model.width)
    np.testing.assert_allclose(scope["aux"].features, masked.features, rtol=0, atol=1e-5)


def test_trained_network_example(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = fixtures.small_config(**{"train.steps": 1})
    loop.train(config, "runs/deit_tiny")
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    pathlib.Path("photo.jpg").write_bytes(fixtures.png(noise))
    (one,) = predict.predict(config, "runs/deit_tiny", ["photo.jpg"])
    scope: dict = {}
    exec(code("<!-- trained network example -->"), scope)
    assert scope["logits"].shape == (1, 10)
    np.testing.assert_allclose(
        jax.nn.softmax(scope["logits"][0]).max(), one.probabilities[0], rtol=1e-5
    )
    exec(code("<!-- write example -->"), scope)
    for file in ("model.safetensors", "hub.safetensors"):
        loaded = weight_files.load(file, scope["model"])
        jax.tree.map(np.testing.assert_array_equal, loaded, scope["params"])


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert 600 <= len(README.split()) <= 1200
