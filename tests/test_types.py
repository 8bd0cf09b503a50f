"""Types of core, kernels and models: `conftest.py` turns on their checks, and tests alone do."""

import ast
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from avit_jax.core import halting, merging
from avit_jax.core.plan import Plan
from avit_jax.kernels import attention
from avit_jax.models import flops, vit

_REPOSITORY = pathlib.Path(__file__).parents[1]


def test_wrong_shapes_and_dtypes_raise() -> None:
    model = vit.AViT(image_size=8, patch_size=4, width=8, depth=1, num_heads=2)
    active = jnp.ones((2, 3), bool)
    wrong = {
        "tokens": lambda: halting.score(jnp.ones((2, 3), int), gamma=1.0, beta=0.0),
        "beta": lambda: halting.score(jnp.ones((2, 3, 4)), gamma=1.0, beta=jnp.ones(2)),
        "similar": lambda: merging.redundancy(jnp.ones((2, 3, 4)), active),
        "bucket": lambda: Plan(bucket=2.5, token_multiple=8),
        "size": lambda: attention.key_bias(active, jnp.ones((2, 4))),
        "active": lambda: flops.image_macs(model, active),
        "readout": lambda: jax.eval_shape(model.classify, jnp.ones((2, 8))),
    }
    for name, call in wrong.items():
        with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{name}'"):
            call()


def test_only_tests_check_types() -> None:
    code = (
        "import sys, jax.numpy as jnp\n"
        "from avit_jax import AViT, adaptive, build, weights\n"
        "from avit_jax.core import halting\n"
        "halting.score(jnp.ones((2, 3), int), gamma=1.0, beta=0.0)\n"
        "print('beartype' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=_REPOSITORY,
    )
    assert done.stdout.strip() == "False"


def test_core_names_no_any() -> None:
    files = sorted((_REPOSITORY / "avit_jax/core").glob("*.py"))
    names = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    assert len(files) > 4
    assert not [node.lineno for node in names if getattr(node, "id", None) == "Any"]
