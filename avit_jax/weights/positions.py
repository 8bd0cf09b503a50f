"""Position embeddings of a weight file: which grid of patches they belong to, and how they are
resized to another one.
"""

import logging
import math

import numpy as np

from avit_jax.utils import errors

_SET = "set --config.init_grid to the rows and columns of the file's grid, such as '(14,14)'"
_logger = logging.getLogger(__name__)


def fit_positions(
    embedding: np.ndarray,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    *,
    before: tuple[int, int] | None,
    name: str,
) -> np.ndarray:
    """Position embeddings for a model: unchanged if they fit, else resized; a warning names a grid
    that is only assumed.

    Args:
      embedding: `(1, R + n, D)` of the file.
      grid: rows and columns of patches of the model.
      num_prefix_tokens: R, of tokens that are no patches and keep theirs.
      before: rows and columns of patches in the file; None if nothing tells them.
      name: of the file.

    Returns:
      `(1, R + rows * columns, D)`.

    Raises:
      errors.UserError: the embeddings are of another grid than `before`, or of none that can be
        assumed.
    """
    count = embedding.shape[1]
    patches, wanted = count - num_prefix_tokens, math.prod(grid)
    side = math.isqrt(max(0, patches))
    told, is_square = before, patches == side**2 > 0
    if told is None and patches == wanted:
        before = grid
        if is_square and grid[0] != grid[1]:
            _warn_of_assumption(
                name, patches, f"{_text(grid)}, as in the model, and not {side} x {side}"
            )
    elif told is None and is_square and count != wanted:
        before = (side, side)
        _warn_of_assumption(name, patches, f"{_text(before)}, and is resized to {_text(grid)}")
    if before is not None and math.prod(before) == patches:
        return (
            embedding
            if before == grid
            else resize_positions(embedding, grid, num_prefix_tokens, before=before)
        )
    if patches > 0 and count in ((math.prod(told),) if told else (wanted, math.isqrt(count) ** 2)):
        raise errors.UserError(
            f"{name} has {count} position embeddings, as many as a grid has patches: the class "
            "token has none (timm's "
            "no_embed_class). Put timm's config.json beside the file, or, if the file is of "
            f"another grid, {_SET}."
        )
    of = _text(told) if told else "a square"
    raise errors.UserError(
        f"{name} has position embeddings of {patches} patches, and {patches} patches are not of "
        f"{of}: {_SET}."
    )


def _warn_of_assumption(name: str, patches: int, grid: str) -> None:
    message = (
        "%s does not tell the grid of its %d patches: it is assumed to be %s; if it is "
        "another one, %s"
    )
    _logger.warning(message, errors.printable(name), patches, grid, _SET)


def _text(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def resize_positions(
    embedding: np.ndarray, grid: tuple[int, int], num_prefix_tokens: int, *, before: tuple[int, int]
) -> np.ndarray:
    """Position embeddings for another number of patches, bicubic, as PyTorch's `interpolate` with
    align_corners=False.

    Args:
      embedding: `(1, R + n, D)`.
      grid: rows and columns of patches that are wanted.
      num_prefix_tokens: R, of tokens that are no patches and keep theirs.
      before: rows and columns that it has.

    Returns:
      `(1, R + rows * columns, D)` float32.
    """
    head, patches = embedding[0, :num_prefix_tokens], embedding[0, num_prefix_tokens:]
    rows, columns = (_bicubic(side, size) for side, size in zip(before, grid, strict=True))
    patches = np.einsum(
        "ri,cj,ijd->rcd", rows, columns, patches.reshape(*before, -1).astype(np.float64)
    )
    return np.concatenate([head, patches.reshape(grid[0] * grid[1], -1)])[None].astype(np.float32)


def _bicubic(size: int, new_size: int) -> np.ndarray:
    """`(new_size, size)` weights of cubic convolution with a = -0.75, the border repeated.

    Reference: Keys, Cubic convolution interpolation, 1981, equation 15.
    """
    a = -0.75
    center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(center).astype(int)
    matrix = np.zeros((new_size, size))
    for offset in range(-1, 3):
        x = abs(center - (first + offset))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(
            matrix,
            (np.arange(new_size), np.clip(first + offset, 0, size - 1)),
            np.where(x <= 1, near, far),
        )
    return matrix
