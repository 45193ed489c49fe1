"""Orders in which a scan can walk over the tokens of a grid.

An order is a permutation, (tokens,), int32: step t of the walk is at token order[t] of the row-major grid. So
x[:, order] are the tokens as the walk meets them, and y[:, inverse(order)] puts the walk's results back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def along_axes(sizes: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Row-major over the grid whose axes are permuted: the last axis named runs fastest.

    Args:
        sizes: of the grid's axes.
        axes: a permutation of them, slowest first.

    Returns:
        (product of sizes,), int32.

    Raises:
        ValueError: axes are no permutation of the grid's.
    """
    if sorted(axes) != list(range(len(sizes))):
        raise ValueError(
            f"axes: expected a permutation of 0 to {len(sizes) - 1}, got {tuple(axes)}"
        )
    tokens = torch.arange(math.prod(sizes), dtype=torch.int32).view(*sizes)
    return tokens.permute(*axes).flatten()


def row_major(height: int, width: int) -> Tensor:
    """Row by row, each from the left.

    Args:
        height: of the grid.
        width: of the grid.

    Returns:
        (height * width,), int32.
    """
    return along_axes((height, width), (0, 1))


def column_major(height: int, width: int) -> Tensor:
    """Column by column, each from the top.

    Args:
        height: of the grid.
        width: of the grid.

    Returns:
        (height * width,), int32.
    """
    return along_axes((height, width), (1, 0))


def snake_rows(height: int, width: int) -> Tensor:
    """Row by row, the first from the left, each next one the other way, so that every step goes to a neighbour.

    Args:
        height: of the grid.
        width: of the grid.

    Returns:
        (height * width,), int32.
    """
    tokens = torch.arange(height * width, dtype=torch.int32).view(height, width)
    tokens[1::2] = tokens[1::2].flip(1)
    return tokens.flatten()


def snake_columns(height: int, width: int) -> Tensor:
    """Column by column, the first from the top, each next one the other way.

    Args:
        height: of the grid.
        width: of the grid.

    Returns:
        (height * width,), int32.
    """
    tokens = torch.arange(height * width, dtype=torch.int32).view(height, width).T.clone()
    tokens[1::2] = tokens[1::2].flip(1)
    return tokens.flatten()


def diagonal(height: int, width: int) -> Tensor:
    """Diagonal by diagonal from the top left, alternating: even ones upwards to the right, odd ones downwards.

    A diagonal holds the tokens of equal row + column.

    Args:
        height: of the grid.
        width: of the grid.

    Returns:
        (height * width,), int32.
    """
    rows = torch.arange(height)[:, None].expand(height, width)
    diagonals = rows + torch.arange(width)
    along = torch.where(diagonals % 2 == 0, height - 1 - rows, rows)
    return (diagonals * height + along).flatten().argsort().int()


def spiral(height: int, width: int) -> Tensor:
    """Clockwise from the top left, ring by ring inwards.

    Args:
        height: of the grid.
        width: of the grid.

    Returns:
        (height * width,), int32.
    """
    left = torch.arange(height * width, dtype=torch.int32).view(height, width)
    walk = [left.new_empty(0)]
    while left.numel():
        walk.append(left[0])
        left = left[1:].rot90()  # the column on the right becomes the top row
    return torch.cat(walk)


def mirror_columns(order: Tensor, width: int) -> Tensor:
    """The same walk over the grid's mirror image, left for right.

    Args:
        order: (tokens,), int32.
        width: of the grid.

    Returns:
        (tokens,), int32.
    """
    return order + width - 1 - 2 * (order % width)


def mirror_rows(order: Tensor, width: int) -> Tensor:
    """The same walk over the grid's mirror image, top for bottom.

    Args:
        order: (tokens,), int32.
        width: of the grid.

    Returns:
        (tokens,), int32.
    """
    return len(order) - width - order + 2 * (order % width)


def inverse(order: Tensor) -> Tensor:
    """The step at which a walk meets each token.

    Args:
        order: (tokens,), int32.

    Returns:
        (tokens,), int32.
    """
    steps = torch.empty_like(order)
    steps[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return steps
