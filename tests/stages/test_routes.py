"""Orders of tokens and routes: permutations of any grid, and what the kernels are given."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mambaquant_ext import routes
from mambaquant_ext.model import FORWARD, ScanRoute, TokenOrder, register_order
from mambaquant_ext.routes import kernel_order
from tolerances import assert_equal

CPU = torch.device("cpu")
GRIDS = [(1,), (7,), (3, 4), (4, 3), (5, 5), (1, 6), (2, 3, 4), (3, 3, 3)]
gridded = pytest.mark.parametrize("grid", GRIDS, ids=str)
IMAGE_ORDERS = (
    *("snake_rows", "snake_columns", "diagonal", "diagonal_mirrored"),
    *("spiral", "spiral_mirrored"),
)
# Arguments with which each order fits a grid.
ARGUMENTS = {
    **{name: lambda grid: [()] if len(grid) == 2 else [] for name in IMAGE_ORDERS},
    "storage": lambda grid: [()],
    "axes": lambda grid: list(itertools.permutations(range(len(grid)))),
    "shuffle": lambda grid: [(0,), (1,), (12345,)],
}


def test_every_order_of_the_package_is_here():
    assert set(routes._ORDERS) >= set(ARGUMENTS)
    own = {name for name, order in routes._ORDERS.items() if order.__module__ == routes.__name__}
    assert own == set(ARGUMENTS)


@pytest.fixture
def registered(monkeypatch):
    """The registry, as it was before the test when the test ends."""
    known = dict(routes._ORDERS)
    monkeypatch.setattr(routes, "_ORDERS", known)
    return known


@gridded
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_order_is_a_permutation_of_the_tokens(name, grid):
    for arguments in ARGUMENTS[name](grid):
        indices = TokenOrder(name, arguments).indices(grid)
        assert indices.dtype == torch.int64
        assert_equal(indices.sort().values, torch.arange(math.prod(grid)))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_order_is_the_same_whatever_the_default_device(name):
    grid = (3, 4)
    order = TokenOrder(name, ARGUMENTS[name](grid)[-1])
    expected, for_kernels = order.indices(grid), kernel_order(order, grid, CPU)
    kernel_order.cache_clear()
    with torch.device("meta"):
        indices, again = order.indices(grid), kernel_order(order, grid, CPU)
    assert_equal(indices, expected)
    assert (again is None) == (for_kernels is None)
    if again is not None:
        assert_equal(again, for_kernels)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_order_that_a_trace_asks_for_first_is_no_fake(name):
    grid = (3, 4)
    order = TokenOrder(name, ARGUMENTS[name](grid)[-1])
    kernel_order.cache_clear()
    with FakeTensorMode():
        traced, walk = kernel_order(order, grid, CPU), order.indices(grid)
    kernel_order.cache_clear()
    expected = kernel_order(order, grid, CPU)
    assert_equal(walk, order.indices(grid))
    assert (traced is None) == (expected is None)
    if expected is not None:
        assert not isinstance(traced, FakeTensor)
        assert_equal(traced, expected)


def test_storage_is_row_by_row():
    assert_equal(TokenOrder().indices((2, 3)), torch.arange(6))
    assert TokenOrder() == TokenOrder("storage")


@gridded
def test_axes_walk_the_grid_with_its_axes_permuted(grid):
    """Each index by itself: nested loops over the axes, the first of them outermost."""
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    for axes in itertools.permutations(range(len(grid))):
        expected = [
            sum(coordinate * strides[axis] for axis, coordinate in zip(axes, at, strict=True))
            for at in itertools.product(*(range(grid[axis]) for axis in axes))
        ]
        assert TokenOrder("axes", axes).indices(grid).tolist() == expected


@pytest.mark.parametrize("name", IMAGE_ORDERS)
@pytest.mark.parametrize("grid", [(6,), (2, 3, 4)], ids=str)
def test_an_order_of_an_image_refuses_another_grid(name, grid):
    with pytest.raises(ValueError, match=rf"{name} order: expected a grid \(height, width\), got"):
        TokenOrder(name).indices(grid)


def test_the_orders_of_an_image_are_walks_of_their_own():
    walks = {tuple(TokenOrder(name).indices((4, 5)).tolist()) for name in IMAGE_ORDERS}
    assert len(walks | {tuple(range(20))}) == len(IMAGE_ORDERS) + 1


def test_axes_one_zero_are_column_by_column():
    assert TokenOrder("axes", (1, 0)).indices((2, 3)).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("axes", [(), (0,), (0, 0), (0, 2), (1, 0, 2), (-1, 0)])
def test_axes_that_are_no_permutation_of_the_grids_are_refused(axes):
    with pytest.raises(ValueError, match=r"axes: expected a permutation of 0 to 1, got "):
        TokenOrder("axes", axes).indices((3, 4))


@given(st.integers(0, 2**31), st.integers(2, 40))
def test_a_shuffle_depends_on_its_seed_alone(seed, tokens):
    order = TokenOrder("shuffle", (seed,))
    torch.manual_seed(seed + 1)
    first = order.indices((tokens,))
    torch.manual_seed(seed + 2)
    assert_equal(order.indices((tokens,)), first)
    assert_equal(order.indices((1, tokens)), first)


def test_shuffles_of_two_seeds_differ_and_neither_is_the_stored_order():
    one, other = (TokenOrder("shuffle", (seed,)).indices((6, 6)) for seed in (1, 2))
    assert not torch.equal(one, other)
    assert not torch.equal(one, torch.arange(36))


def test_an_unknown_order_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"TokenOrder\.name: expected one of axes, .*storage.*'zigzag'"
    ):
        TokenOrder("zigzag")


def test_a_registered_order_is_known_by_name(registered):
    @register_order("evens-first")
    def evens_first(grid):
        tokens = torch.arange(math.prod(grid))
        return torch.cat([tokens[::2], tokens[1::2]])

    assert registered["evens-first"] is evens_first
    assert TokenOrder("evens-first").indices((5,)).tolist() == [0, 2, 4, 1, 3]
    assert ScanRoute(TokenOrder("evens-first"), reverse=True).walk((5,)).tolist() == [3, 1, 4, 2, 0]


@pytest.mark.parametrize("name", ["storage", "axes", "shuffle"])
def test_a_name_is_registered_once(name, registered):
    before = registered[name]
    with pytest.raises(ValueError, match=f"register_order: '{name}' is registered already"):
        register_order(name)(lambda grid: torch.arange(math.prod(grid)))
    assert registered[name] is before


NO_PERMUTATION = {
    "a token twice": [0, 1, 1, 3],
    "one too few": [0, 1, 2],
    "one too many": [0, 1, 2, 3, 4],
    "beyond the last": [0, 1, 2, 4],
    "below the first": [-1, 0, 1, 2],
    "two axes": [[0, 1], [2, 3]],
    "none": [],
}


@pytest.mark.parametrize("indices", NO_PERMUTATION.values(), ids=NO_PERMUTATION)
def test_a_registered_function_that_gives_no_permutation_is_refused(indices, registered):
    register_order("broken")(lambda _grid: torch.tensor(indices, dtype=torch.int64))
    for use in (
        TokenOrder("broken").indices,
        ScanRoute(TokenOrder("broken")).walk,
        lambda grid: kernel_order(TokenOrder("broken"), grid, CPU),
    ):
        with pytest.raises(
            ValueError, match=r"'broken': expected a permutation of 4 tokens .*\(2, 2\)"
        ):
            use((2, 2))


# Routes


@gridded
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_reverse_walk_is_the_walk_from_its_end(name, grid):
    for arguments in ARGUMENTS[name](grid):
        order = TokenOrder(name, arguments)
        forward, backward = (ScanRoute(order, reverse=r).walk(grid) for r in (False, True))
        assert_equal(forward, order.indices(grid))
        assert backward.tolist() == forward.tolist()[::-1]


def test_forward_is_the_stored_order_first_to_last_whatever_the_branch():
    assert ScanRoute() == FORWARD
    assert FORWARD.is_forward
    assert ScanRoute(branch=3).is_forward
    assert not ScanRoute(reverse=True).is_forward
    assert not ScanRoute(TokenOrder("axes", (1, 0))).is_forward


# What the kernels are given


@gridded
@pytest.mark.parametrize("name", ARGUMENTS)
def test_kernels_get_an_int32_order_or_none_for_the_stored_one(name, grid):
    stored = torch.arange(math.prod(grid))
    for arguments in ARGUMENTS[name](grid):
        order = TokenOrder(name, arguments)
        given_to_kernels = kernel_order(order, grid, CPU)
        if torch.equal(order.indices(grid), stored):
            assert given_to_kernels is None
        else:
            assert_equal(given_to_kernels, order.indices(grid).int())


def test_an_order_that_changes_nothing_costs_nothing():
    """Whatever its name: the kernels then read tokens in a row."""
    assert kernel_order(TokenOrder(), (3, 4), CPU) is None
    assert kernel_order(TokenOrder("axes", (0, 1)), (3, 4), CPU) is None
    assert kernel_order(TokenOrder("axes", (1, 0)), (1, 4), CPU) is None
    assert kernel_order(TokenOrder("axes", (1, 0)), (3, 4), CPU) is not None


def test_an_order_is_made_once_a_grid():
    order = TokenOrder("axes", (1, 0))
    assert kernel_order(order, (5, 7), CPU) is kernel_order(order, (5, 7), CPU)
    assert kernel_order(order, (7, 5), CPU).tolist() != kernel_order(order, (5, 7), CPU).tolist()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("storage", (1,)), ("spiral", (1, 0)), ("shuffle", ()), ("shuffle", (1, 2))],
)
def test_another_number_of_arguments_is_refused_at_once(name, arguments):
    with pytest.raises(ValueError, match=rf"expected those of order '{name}', got \("):
        TokenOrder(name, arguments)


@gridded
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_order_does_not_depend_on_the_device_in_use(name, grid):
    for arguments in ARGUMENTS[name](grid):
        order = TokenOrder(name, arguments)
        indices, for_kernels = order.indices(grid), kernel_order(order, grid, CPU)
        kernel_order.cache_clear()
        with torch.device("meta"):
            found, again = order.indices(grid), kernel_order(order, grid, CPU)
        assert_equal(found, indices)
        assert (again is None) == (for_kernels is None)
        assert again is None or torch.equal(again, for_kernels)
