"""The README's code runs as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
TOKENS = jax.random.normal(jax.random.key(0), (2, 9, 16))


def code(after: str) -> str:
    """The first Python block after a marker."""
    return re.search(r"```python\n(.*?)```", README.split(after, 1)[1], re.DOTALL).group(1)


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
    exec(code("The model, from Python:"), scope)
    assert scope["logits"].shape == (2, 13) and scope["aux"].depth.shape == (2, 25)
    assert jnp.isfinite(scope["loss"])
    logits = scope["logits"]
    exec(code("<!-- adaptive example -->"), scope)
    np.testing.assert_allclose(scope["logits"], logits, atol=1e-5)
    assert scope["aux"].macs.shape == scope["aux"].macs_padded.shape == (2,)
    assert np.unique(scope["aux"].depth).size > 1, "the example should show tokens of different depth"
