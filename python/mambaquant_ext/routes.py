"""Scan routes: how a block walks the tokens of a sequence, an image or a volume.

Projections, norms, gates and quantizers do not care for the order of tokens; only the causal convolution and the scan
do. So tokens stay where they are, row-major over their grid, and a route says in which order these two walk them.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mambaquant_ext import orders

# (height, width) of an image, (depth, height, width) of a volume, (seqlen,) of a sequence.
Grid = tuple[int, ...]
OrderFunction = Callable[..., Tensor]
_ORDERS: dict[str, OrderFunction] = {}
_CACHED_WALKS = 256


def register_order(name: str) -> Callable[[OrderFunction], OrderFunction]:
    """Makes a function an order that routes can name.

    The decorated function takes a grid and the order's arguments, integers, and returns the row-major index of each
    step's token: (tokens,), any integer dtype, a permutation.

    Args:
        name: in TokenOrder and in checkpoints.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: OrderFunction) -> OrderFunction:
        if name in _ORDERS:
            raise ValueError(f"register_order: {name!r} is registered already")
        _ORDERS[name] = function
        return function

    return register


@register_order("storage")
def storage_order(grid: Grid) -> Tensor:
    """Row by row, as tokens are stored."""
    return torch.arange(math.prod(grid))


@register_order("axes")
def axes_order(grid: Grid, *axes: int) -> Tensor:
    """Row-major over the grid with its axes permuted: (1, 0) walks an image column by column."""
    return orders.along_axes(grid, axes)


@register_order("shuffle")
def shuffle_order(grid: Grid, seed: int) -> Tensor:
    """A fixed random permutation: tokens sorted by the numbers that Python's generator gives them.

    A checkpoint holds the seed alone. Python promises the numbers of random() in all of its versions; torch makes
    no such promise for its generators.

    Args:
        grid: only its number of tokens counts.
        seed: of the permutation.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(math.prod(grid))]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), device="cpu")


def _image_order(name: str, order: Callable[[int, int], Tensor]) -> None:
    """Registers a walk over (height, width)."""

    def on_grid(grid: Grid) -> Tensor:
        if len(grid) != 2:
            raise ValueError(f"{name} order: expected a grid (height, width), got {grid}")
        return order(*grid)

    register_order(name)(on_grid)


_image_order("snake_rows", orders.snake_rows)
_image_order("snake_columns", orders.snake_columns)
_image_order("diagonal", orders.diagonal)
_image_order("spiral", orders.spiral)
_image_order("diagonal_mirrored", lambda h, w: orders.mirror_columns(orders.diagonal(h, w), w))
_image_order("spiral_mirrored", lambda h, w: orders.mirror_rows(orders.spiral(h, w), w))


@contextmanager
def _of_constants() -> Iterator[None]:
    """Tensors are made on the CPU and have values, whatever device the caller makes them on and whether it traces."""
    with torch.device("cpu"), _disable_current_modes():
        yield


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """A permutation of the tokens of any grid.

    Attributes:
        name: of a registered order.
        arguments: of that order.
    """

    name: str = "storage"
    arguments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the name and the number of arguments.

        Raises:
            ValueError: no order of that name is registered, or it takes another number of arguments.
        """
        if self.name not in _ORDERS:
            raise ValueError(
                f"TokenOrder.name: expected one of {', '.join(sorted(_ORDERS))}, got {self.name!r}; "
                "register_order adds one"
            )
        signature = inspect.signature(_ORDERS[self.name])
        try:
            signature.bind((), *self.arguments)
        except TypeError as error:
            raise ValueError(
                f"TokenOrder.arguments: expected those of order {self.name!r}, got {self.arguments!r} ({error})"
            ) from None

    def indices(self, grid: Grid) -> Tensor:
        """Row-major index of the token of each step.

        Args:
            grid: sizes of the axes.

        Returns:
            (tokens,), int64, on the CPU.

        Raises:
            ValueError: an order that does not fit the grid, or a registered function that gives no permutation.
        """
        tokens = math.prod(grid)
        with _of_constants():
            indices = _ORDERS[self.name](grid, *self.arguments).long()
            is_permutation = indices.shape == (tokens,) and torch.equal(
                indices.sort().values, torch.arange(tokens)
            )
        if not is_permutation:
            raise ValueError(
                f"order {self.name!r}: expected a permutation of {tokens} tokens of grid {grid}, "
                f"got {tuple(indices.shape)} {indices.dtype}"
            )
        return indices


@dataclass(frozen=True, slots=True)
class ScanRoute:
    """One walk over the tokens.

    Attributes:
        order: which token each step meets.
        reverse: walk from the last step to the first.
        branch: index of the block's weights that scan along this route.
        continues: start from the state in which the route before ended, instead of zeros.
    """

    order: TokenOrder = TokenOrder()
    reverse: bool = False
    branch: int = 0
    continues: bool = False

    @property
    def is_forward(self) -> bool:
        """Whether tokens are walked as they are stored, first to last."""
        return self.order == TokenOrder() and not self.reverse

    def walk(self, grid: Grid) -> Tensor:
        """The tokens in the order in which they are met, direction included.

        Args:
            grid: sizes of the axes.

        Returns:
            (tokens,), int64.

        Raises:
            ValueError: an order that does not fit the grid.
        """
        indices = self.order.indices(grid)
        return indices.flip(0) if self.reverse else indices


FORWARD = ScanRoute()


@lru_cache(maxsize=_CACHED_WALKS)
def kernel_order(order: TokenOrder, grid: Grid, device: torch.device) -> Tensor | None:
    """What the kernels take as `order`: (tokens,), int32, or None where tokens are walked as stored.

    Args:
        order: of a route.
        grid: sizes of the axes.
        device: of the tensor.

    Raises:
        ValueError: an order that does not fit the grid.
    """
    indices = order.indices(grid)
    with _of_constants():
        is_stored = torch.equal(indices, torch.arange(len(indices)))
        return None if is_stored else indices.to(device, torch.int32)
