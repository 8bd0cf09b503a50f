"""Position embeddings of a weight file: finds their grid of patches, and resizes them."""

import logging
import math
from collections.abc import Mapping

import numpy as np

from avit_jax.utils import errors

_SET = "set --config.init_grid to the rows and columns of the file's grid, such as '(14,14)'"
_logger = logging.getLogger(__name__)


def fit_positions(
    embedding: np.ndarray,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    *,
    old_grid: tuple[int, int] | None,
    antialias: bool = False,
    name: str,
) -> np.ndarray:
    """Returns position embeddings for a model: unchanged if they fit, resized otherwise.

    If the grid of the file is unknown, it is assumed to be the model's or a square. A warning
    reports such an assumption if another grid is possible.

    Args:
      embedding: `(1, R + n, D)`, of the file.
      grid: (rows, columns) of patches of the model.
      num_prefix_tokens: R; their embeddings do not change.
      old_grid: (rows, columns) of patches of the file; None if unknown.
      antialias: as in `resize_positions`.
      name: of the file.

    Returns:
      `(1, R + rows * columns, D)`.

    Raises:
      errors.UserError: the embeddings do not have the grid `old_grid`, or no grid can be assumed.
    """
    count = embedding.shape[1]
    num_patches, wanted = count - num_prefix_tokens, math.prod(grid)
    side = math.isqrt(max(0, num_patches))
    is_square = num_patches == side**2 > 0
    assumption = "%s does not give the grid of its %d patches: it is assumed to be %s; if not, %s"
    if old_grid is None and num_patches == wanted:
        if is_square and grid[0] != grid[1]:
            assumed = f"{_text(grid)}, as in the model, and not {side} x {side}"
            _logger.warning(assumption, errors.printable(name), num_patches, assumed, _SET)
        return embedding
    if old_grid is None and is_square and count != wanted:
        assumed = f"{side} x {side}, and is resized to {_text(grid)}"
        _logger.warning(assumption, errors.printable(name), num_patches, assumed, _SET)
        old_grid = (side, side)
    if old_grid == grid and num_patches == wanted:
        return embedding
    if old_grid is not None and math.prod(old_grid) == num_patches:
        return resize_positions(
            embedding, grid, num_prefix_tokens, old_grid=old_grid, antialias=antialias
        )
    # Counts that are a whole grid if the prefix tokens have no embeddings.
    without_prefix = (math.prod(old_grid),) if old_grid else (wanted, math.isqrt(count) ** 2)
    if num_patches > 0 and count in without_prefix:
        raise errors.UserError(
            f"{name} has {count} position embeddings, as many as a grid has patches: the class "
            "token has none (timm's no_embed_class). Put timm's config.json beside the file, or, "
            f"if the file has another grid, {_SET}."
        )
    raise errors.UserError(
        f"{name} has position embeddings for {num_patches} patches, which do not form "
        f"{_text(old_grid) if old_grid else 'a square'}: {_SET}."
    )


def with_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors in timm's names, with a position embedding of zero for each prefix token."""
    patches = tensors.get("pos_embed", np.zeros(0))
    if patches.ndim != 3:
        return dict(tensors)
    count = num_prefix_tokens(tensors)
    zeros = np.zeros_like(patches, shape=(len(patches), count, patches.shape[2]))
    return {**tensors, "pos_embed": np.concatenate([zeros, patches], axis=1)}


def num_prefix_tokens(tensors: Mapping[str, np.ndarray]) -> int:
    """Returns the number of class, distillation and register tokens of tensors in timm's names."""
    registers = np.shape(tensors.get("reg_token"))
    count = ("cls_token" in tensors) + ("dist_token" in tensors)
    return count + (registers[1] if len(registers) == 3 else 0)


def _text(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def resize_positions(
    embedding: np.ndarray,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    *,
    old_grid: tuple[int, int],
    antialias: bool = False,
) -> np.ndarray:
    """Resizes position embeddings to another grid of patches.

    The interpolation is bicubic, as PyTorch's `interpolate` with align_corners=False.

    Args:
      embedding: `(1, R + n, D)`.
      grid: (rows, columns) of the result.
      num_prefix_tokens: R; their embeddings do not change.
      old_grid: (rows, columns) of `embedding`.
      antialias: as PyTorch's option, which timm sets: averages over larger areas where the grid
        gets smaller, and interpolates with a = -0.5 instead of -0.75.

    Returns:
      `(1, R + rows * columns, D)` float32.
    """
    prefix, patches = embedding[0, :num_prefix_tokens], embedding[0, num_prefix_tokens:]
    resize = _antialiased if antialias else bicubic
    rows, columns = (resize(old, new) for old, new in zip(old_grid, grid, strict=True))
    patches = patches.reshape(*old_grid, -1).astype(np.float64)
    patches = np.einsum("ri,cj,ijd->rcd", rows, columns, patches)
    return np.concatenate([prefix, patches.reshape(math.prod(grid), -1)])[None].astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns the kernel of cubic convolution at distances x.

    Reference: Keys, Cubic convolution interpolation, 1981, equation 15.
    """
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic(size: int, new_size: int) -> np.ndarray:
    """Returns `(new_size, size)` weights of cubic convolution, a = -0.75; repeats the border."""
    center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(center).astype(int)
    matrix = np.zeros((new_size, size))
    for offset in range(-1, 3):
        columns = np.clip(first + offset, 0, size - 1)
        weights = _cubic(abs(center - (first + offset)), -0.75)
        np.add.at(matrix, (np.arange(new_size), columns), weights)
    return matrix


def _antialiased(size: int, new_size: int) -> np.ndarray:
    """Returns `(new_size, size)` weights of cubic convolution, a = -0.5, wider if the size shrinks.

    Weights beyond the border are left out, and the others sum to 1.
    """
    scale = size / new_size
    center = (np.arange(new_size) + 0.5) * scale - 0.5
    distance = abs(center[:, None] - np.arange(size)) / max(scale, 1.0)
    matrix = _cubic(distance, -0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)
