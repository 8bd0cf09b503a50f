"""Names and layouts of weights."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax import weights
from avit_jax.core import halting
from avit_jax.models import vit

_SIZES = dict(
    image_size=(8, 12),
    patch_size=4,
    channels=2,
    width=8,
    depth=3,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=5,
)


def _params(**changes) -> dict:
    """Returns random parameters with the shapes of the model."""
    model, rng = vit.AViT(**(_SIZES | changes)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 12, 2)))["params"]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def _state_dict(dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Returns random weights with the names and shapes of timm."""
    shapes = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 7, 8),
        "patch_embed.proj.weight": (8, 2, 4, 4),
    }
    shapes |= {
        "patch_embed.proj.bias": (8,),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "head.weight": (5, 8),
        "head.bias": (5,),
    }
    for i in range(3):
        layer = {
            "norm1": (8,),
            "attn.qkv": (24, 8),
            "attn.proj": (8, 8),
            "norm2": (8,),
            "mlp.fc1": (16, 8),
            "mlp.fc2": (8, 16),
        }
        for module, shape in layer.items():
            shapes |= {f"blocks.{i}.{module}.weight": shape, f"blocks.{i}.{module}.bias": shape[:1]}
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("distilled", [False, True])
def test_round_trip_from_our_tree(distilled: bool) -> None:
    params = _params(distilled=distilled)
    state_dict = weights.to_torch(params, patch_shape=(4, 4, 2))
    assert ("dist_token" in state_dict) == ("head_dist.weight" in state_dict) == distilled
    back = weights.from_torch(state_dict)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_round_trip_from_their_names() -> None:
    state_dict = _state_dict()
    back = weights.to_torch(weights.from_torch(state_dict), patch_shape=(4, 4, 2))
    assert set(back) == set(state_dict)
    for name, array in state_dict.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_tree_has_the_shapes_and_layout_of_the_model() -> None:
    state_dict, params = _state_dict(), _params()
    ours = weights.from_torch(state_dict)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, params)
    np.testing.assert_array_equal(
        ours["layers"]["qkv"]["kernel"][2], state_dict["blocks.2.attn.qkv.weight"].T
    )
    np.testing.assert_array_equal(
        ours["layers"]["norm2"]["scale"][1], state_dict["blocks.1.norm2.weight"]
    )
    # The input of the patch embedding runs over rows, columns and then channels.
    pixel = ours["patch_embed"]["kernel"].reshape(4, 4, 2, 8)[3, 1, 1]
    np.testing.assert_array_equal(pixel, state_dict["patch_embed.proj.weight"][:, 1, 3, 1])


def test_gate_is_left_out() -> None:
    params = _params(halting=halting.HaltingConfig(learnable=True))
    assert set(params["gate"]) == {"gamma", "beta"}
    state_dict = weights.to_torch(params, patch_shape=(4, 4, 2))
    assert set(state_dict) == set(_state_dict())


def test_dtype_is_kept() -> None:
    ours = weights.from_torch(_state_dict(np.float16))
    assert {array.dtype for array in jax.tree.leaves(ours)} == {np.dtype(np.float16)}
    theirs = weights.to_torch(ours, patch_shape=(4, 4, 2))
    assert {array.dtype for array in theirs.values()} == {np.dtype(np.float16)}


def test_missing_and_unexpected_names_are_reported() -> None:
    state_dict = _state_dict()
    del state_dict["blocks.1.mlp.fc1.bias"], state_dict["norm.weight"]
    state_dict |= {"fc_norm.weight": np.zeros(8), "blocks.0.attn.norm.bias": np.zeros(8)}
    with pytest.raises(ValueError) as error:
        weights.from_torch(state_dict)
    assert "missing ['blocks.1.mlp.fc1.bias', 'norm.weight']" in str(error.value)
    assert "unexpected ['blocks.0.attn.norm.bias', 'fc_norm.weight']" in str(error.value)


def test_something_else_altogether_is_refused() -> None:
    with pytest.raises(ValueError, match="missing"):
        weights.from_torch({})


_HEAVY = ("torch", "tensorflow", "tensorflow_datasets", "matplotlib", "grain", "sklearn", "PIL")
_HEAVY += ("orbax", "tensorboardX")


@pytest.mark.parametrize(
    "statement",
    [
        "import avit_jax",
        "from avit_jax import AViT, adaptive",
        "import avit_jax.serving",
        "import avit_jax.weights",
        "from avit_jax.weights import weight_files",
    ],
)
def test_imports_load_no_dependency_of_training(statement: str) -> None:
    code = f"import sys; {statement}; print([name for name in {_HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
