"""Orders of a scan: permutations, and on small grids those of the public route generators, written out."""

import pytest
import torch

from mambaquant_ext import orders

WALKS = [
    orders.row_major,
    orders.column_major,
    orders.snake_rows,
    orders.snake_columns,
    orders.diagonal,
    orders.spiral,
]
GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 2), (4, 4), (5, 7), (8, 3)]

walks = pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.__name__)
grids = pytest.mark.parametrize(("height", "width"), GRIDS)


@walks
@grids
def test_a_walk_meets_every_token_once(walk, height, width):
    order = walk(height, width)
    assert order.dtype == torch.int32
    assert sorted(order.tolist()) == list(range(height * width))


@walks
@grids
def test_inverse_puts_results_back(walk, height, width):
    order, x = walk(height, width), torch.arange(height * width)
    assert torch.equal(x[order][orders.inverse(order)], x)
    assert orders.inverse(order).dtype == torch.int32


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        (orders.row_major, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (orders.column_major, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
        (orders.snake_rows, [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]),
        (orders.snake_columns, [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]),
        (orders.diagonal, [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]),
        (orders.spiral, [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_walks_of_three_rows_of_four(walk, expected):
    assert walk(3, 4).tolist() == expected


@pytest.mark.parametrize("walk", [orders.snake_rows, orders.snake_columns, orders.spiral])
@grids
def test_snakes_and_spirals_step_to_neighbours(walk, height, width):
    order = walk(height, width)
    rows, columns = order // width, order % width
    assert (rows.diff().abs() + columns.diff().abs() == 1).all()


@grids
def test_diagonals_follow_each_other(height, width):
    """Equal sums of row and column together, in turns upwards and downwards."""
    order = orders.diagonal(height, width)
    rows, columns = order // width, order % width
    assert (rows + columns).diff().ge(0).all()
    for number in range(height + width - 1):
        along = rows[rows + columns == number].diff()
        assert (along == (1 if number % 2 else -1)).all()


@walks
@grids
def test_mirrors_keep_the_walk_and_turn_the_grid(walk, height, width):
    order, tokens = walk(height, width), torch.arange(height * width).view(height, width)
    assert torch.equal(orders.mirror_columns(order, width), tokens.flip(1).flatten()[order].int())
    assert torch.equal(orders.mirror_rows(order, width), tokens.flip(0).flatten()[order].int())


def test_along_axes_runs_over_grids_of_any_rank():
    order = orders.along_axes((2, 3, 2), (2, 0, 1))
    assert order.tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("axes", [(0,), (0, 0), (1, 2)])
def test_axes_that_are_no_permutation_are_refused(axes):
    with pytest.raises(ValueError, match="axes: expected a permutation of 0 to 1, got"):
        orders.along_axes((2, 3), axes)
