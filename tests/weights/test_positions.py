"""Position embeddings: unchanged if they fit, otherwise resized from a given or an assumed grid."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from avit_jax.models import vit
from avit_jax.utils import errors
from avit_jax.weights import positions, weight_files

_SIZES = {
    "patch_size": 4,
    "width": 12,
    "depth": 1,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 5,
    "halting": None,
}


def _model(rows: int, columns: int, **changes: object) -> vit.AViT:
    return vit.AViT(**_SIZES | {"image_size": (4 * rows, 4 * columns)} | changes)


def _file(path: pathlib.Path, model: vit.AViT, *, no_embed_class: bool = False) -> np.ndarray:
    """Writes a file of the model without metadata, as timm does; returns its position embeddings."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.pixels, 3)))["params"]
    tensors = weight_files.to_file(params, model).tensors
    if no_embed_class:
        tensors["pos_embed"] = tensors["pos_embed"][:, model.num_prefix_tokens :]
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, path
    )
    return tensors["pos_embed"]


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the warnings about a grid."""
    return [text for text in caplog.messages if "the grid" in text]


@pytest.mark.parametrize("grid", [(2, 8), (1, 4), (9, 16), (2, 5), (4, 4)])
@pytest.mark.parametrize("distilled", [False, True])
def test_embeddings_that_fit_are_never_resized(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, grid: tuple[int, int], distilled: bool
) -> None:
    model, path = _model(*grid, distilled=distilled), tmp_path / "x.safetensors"
    expected = _file(path, model)
    np.testing.assert_array_equal(weight_files.load(path, model)["pos_embed"], expected)
    messages = _messages(caplog)
    if grid in ((2, 8), (1, 4), (9, 16)):  # the number of patches is a square's too
        assert (
            len(messages) == 1
            and f"assumed to be {grid[0]} x {grid[1]}, as in the model" in messages[0]
        )
        assert "--config.init_grid" in messages[0]
    else:
        assert not messages


def test_a_grid_that_is_assumed_is_reported_and_one_that_is_set_is_not(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    embedding = _file(path, _model(4, 4))
    wide, large = _model(2, 8), _model(6, 3)
    expected = positions.resize_positions(embedding, (6, 3), 1, old_grid=(4, 4))
    np.testing.assert_array_equal(weight_files.load(path, large)["pos_embed"], expected)
    assert (
        "does not give the grid of its 16 patches: it is assumed to be 4 x 4, and is resized to 6 "
        "x 3" in caplog.text
    )
    caplog.clear()
    expected = positions.resize_positions(embedding, (2, 8), 1, old_grid=(4, 4))
    np.testing.assert_array_equal(weight_files.load(path, wide, grid=(4, 4))["pos_embed"], expected)
    expected = positions.resize_positions(embedding, (6, 3), 1, old_grid=(2, 8))
    np.testing.assert_array_equal(
        weight_files.load(path, large, grid=[2, 8])["pos_embed"], expected
    )
    np.testing.assert_array_equal(
        weight_files.load(path, wide, grid=(2, 8))["pos_embed"], embedding
    )
    assert not _messages(caplog)


def test_a_grid_that_is_no_square_is_asked_for(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    embedding = _file(path, _model(2, 5))
    with pytest.raises(
        errors.UserError, match=r"10 patches, which do not form a square: set --config.init_grid"
    ):
        weight_files.load(path, _model(3, 4))
    expected = positions.resize_positions(embedding, (3, 4), 1, old_grid=(2, 5))
    np.testing.assert_array_equal(
        weight_files.load(path, _model(3, 4), grid=(2, 5))["pos_embed"], expected
    )
    with pytest.raises(errors.UserError, match="10 patches, which do not form 3 x 4"):
        weight_files.load(path, _model(3, 4), grid=(3, 4))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("grid", [(5, 10), (4, 4), (2, 3)])
def test_a_file_without_a_position_of_the_class_token(
    tmp_path: pathlib.Path, grid: tuple[int, int], distilled: bool
) -> None:
    model, path = _model(*grid, distilled=distilled), tmp_path / "x.safetensors"
    embedding = _file(path, model, no_embed_class=True)
    with pytest.raises(
        errors.UserError,
        match=rf"{np.prod(grid)} position embeddings.*the class token has none.*no_embed_class",
    ):
        weight_files.load(path, model)
    with pytest.raises(errors.UserError, match="the class token has none"):
        weight_files.load(path, model, grid=grid)
    (tmp_path / "config.json").write_text('{"model_args": {"no_embed_class": true}}')
    loaded = weight_files.load(path, model)["pos_embed"][0]
    np.testing.assert_array_equal(
        loaded[: model.num_prefix_tokens], np.zeros((model.num_prefix_tokens, 12))
    )
    np.testing.assert_array_equal(loaded[model.num_prefix_tokens :], embedding[0])


def test_without_a_class_position_the_grid_may_still_be_another_one(tmp_path: pathlib.Path) -> None:
    embedding = _file(
        tmp_path / "x.safetensors", _model(7, 7)
    )  # 50 positions, as many as 5 x 10 patches
    loaded = weight_files.load(tmp_path / "x.safetensors", _model(5, 10), grid=(7, 7))["pos_embed"]
    np.testing.assert_array_equal(
        loaded, positions.resize_positions(embedding, (5, 10), 1, old_grid=(7, 7))
    )


def test_a_plain_file_and_a_distilled_model(tmp_path: pathlib.Path) -> None:
    _file(tmp_path / "x.safetensors", _model(4, 4))
    with pytest.raises(
        errors.UserError,
        match=r"dist_token is missing.*pos_embed is \(1, 17, 12\) and not \(1, 18, 12\)",
    ):
        weight_files.load(tmp_path / "x.safetensors", _model(4, 4, distilled=True))


def test_a_grid_that_contradicts_what_the_file_tells(tmp_path: pathlib.Path) -> None:
    model, path = _model(2, 8), tmp_path / "x.safetensors"
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 32, 3)))["params"]
    weight_files.write(path, params, model)
    with pytest.raises(
        errors.UserError, match=r"gives the grid \(2, 8\), and config.init_grid is \(4, 4\)"
    ):
        weight_files.load(path, model, grid=(4, 4))
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, {"grid": "3x5"})
    with pytest.raises(errors.UserError, match="16 patches, which do not form 3 x 5"):
        weight_files.load(path, model)


def test_a_name_in_a_warning_is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    positions.fit_positions(np.zeros((1, 5, 3)), (1, 4), 1, old_grid=None, name="a\x1b[2Jb\ud800")
    assert (
        "a\\x1b[2Jb\\ud800 does not give" in caplog.text
        and caplog.records[0].levelno == logging.WARNING
    )


@pytest.mark.parametrize("names", ["timm", "huggingface"])
def test_position_embeddings_of_pictures_that_are_not_square(
    tmp_path: pathlib.Path, names: str
) -> None:
    wide, path = (
        _model(2, 8),
        tmp_path / "wide.safetensors",
    )  # 2 x 8 patches, as many as in a square
    params = jax.jit(wide.init)(jax.random.key(0), jnp.zeros((1, 8, 32, 3)))["params"]
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None], (2, 8, 12)).reshape(1, 16, 12)
    params["pos_embed"] = params["pos_embed"].at[:, 1:].set(ramp)
    weight_files.write(path, params, wide, names=names)
    jax.tree.map(np.testing.assert_array_equal, weight_files.load(path, wide), params)
    high = weight_files.load(path, _model(8, 2))["pos_embed"][0, 1:].reshape(8, 2, 12)
    np.testing.assert_allclose(
        high - high[:1], 0, atol=1e-6
    )  # it still rises from left to right alone
    assert (high[:, 1] > high[:, 0]).all()
    larger = weight_files.load(path, _model(4, 16))["pos_embed"][0, 1:].reshape(4, 16, 12)
    np.testing.assert_allclose(
        larger[:, 4:12],
        np.broadcast_to((np.arange(4, 12)[:, None] - 0.5) / 2, (4, 8, 12)),
        atol=0.05,
    )  # cubic, not linear
    with pytest.raises(errors.UserError, match="0 patches"):
        positions.fit_positions(np.zeros((1, 1, 12)), (4, 4), 1, old_grid=None, name="x")


@pytest.mark.parametrize("grid", [(4,), (1, 2, 2)])
def test_a_grid_has_rows_and_columns(tmp_path: pathlib.Path, grid: tuple[int, ...]) -> None:
    _file(tmp_path / "x.safetensors", _model(2, 2))
    with pytest.raises(ValueError, match="grid must be the rows and columns"):
        weight_files.load(tmp_path / "x.safetensors", _model(2, 2), grid=grid)


# torch.nn.functional.interpolate(torch.arange(20.).reshape(1, 1, 4, 5) ** 1.5, size=..., mode="bicubic",
# align_corners=False, antialias=True), of torch 2.14
_ANTIALIASED = {
    (2, 3): [7.57307, 12.20234, 17.90433, 44.3563, 53.35048, 62.84435],
    (4, 2): [0.99401, 5.6427, 14.23803, 23.2887, 35.81918, 47.68958, 63.18087, 77.31564],
    (7, 6): [-0.91645, -0.37846, 0.80402, 2.45026, 4.55972, 6.59169, 2.53347, 3.7634, 5.62828],
}


@pytest.mark.parametrize("grid", _ANTIALIASED)
def test_antialiased_embeddings_are_those_of_pytorch(grid: tuple[int, int]) -> None:
    embedding = np.concatenate([[-7.0], np.arange(20.0) ** 1.5])[None, :, None]
    resized = positions.resize_positions(embedding, grid, 1, old_grid=(4, 5), antialias=True)
    expected = [-7.0, *_ANTIALIASED[grid]]
    np.testing.assert_allclose(resized[0, : len(expected), 0], expected, atol=2e-5)


def test_antialiasing_is_an_option_of_loading(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    embedding, small = _file(path, _model(4, 4)), _model(2, 2)
    plain, antialiased = (
        weight_files.load(path, small, grid=(4, 4), antialias=option)["pos_embed"]
        for option in (False, True)
    )
    expected = positions.resize_positions(embedding, (2, 2), 1, old_grid=(4, 4), antialias=True)
    np.testing.assert_array_equal(antialiased, expected)
    assert abs(plain - antialiased).max() > 1e-4
