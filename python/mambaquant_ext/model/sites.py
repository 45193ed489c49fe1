"""Where a model's Mamba blocks sit, how they are called, and their float stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mambaquant_ext.model.forward import Tap, block_forward, no_tap
from mambaquant_ext.model.weights import MixerWeights
from mambaquant_ext.routes import Grid


class Contract(Protocol):
    """How a block's module is called: its arguments as tokens, and tokens as its result."""

    def read(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Grid]:
        """The tokens that the module is given.

        Args:
            args: of the module's forward.
            kwargs: of the module's forward.

        Returns:
            hidden_states: (batch, tokens, hidden), tokens row-major over the grid.
            grid: sizes of its axes.
        """

    def write(self, out: Tensor, grid: Grid) -> Any:
        """What the module returns.

        Args:
            out: (batch, tokens, hidden).
            grid: from `read`.
        """


@dataclass(frozen=True)
class TokenSequence:
    """forward(x) -> x of shape (batch, tokens, hidden).

    Attributes:
        grid: whose row-major order the tokens have; None for a plain sequence.
    """

    grid: Grid | None = None

    def read(self, x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Grid]:
        """See Contract."""
        return x, self.grid or (x.shape[1],)

    def write(self, out: Tensor, _grid: Grid) -> Tensor:
        """See Contract."""
        return out


class ChannelsLast:
    """forward(x) -> x of shape (batch, height, width, hidden), or with more axes."""

    def read(self, x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Grid]:
        """See Contract."""
        return x.flatten(1, -2), tuple(x.shape[1:-1])

    def write(self, out: Tensor, grid: Grid) -> Tensor:
        """See Contract."""
        image: Tensor = out.unflatten(1, grid)
        return image


class ChannelsFirst:
    """forward(x) -> x of shape (batch, hidden, height, width), or with more axes."""

    def read(self, x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Grid]:
        """See Contract."""
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def write(self, out: Tensor, grid: Grid) -> Tensor:
        """See Contract."""
        image: Tensor = out.transpose(1, 2).unflatten(2, grid)
        return image


class ResidualPair:
    """forward(hidden_states, residual=None) -> (hidden_states, residual), their sum the stream: add, norm, mixer."""

    def read(
        self, hidden_states: Tensor, residual: Tensor | None = None, **_kwargs: Any
    ) -> tuple[Tensor, Grid]:
        """See Contract."""
        stream = hidden_states if residual is None else hidden_states + residual
        return stream, (stream.shape[1],)

    def write(self, out: Tensor, _grid: Grid) -> tuple[Tensor, Tensor]:
        """See Contract."""
        return out.new_zeros(()).expand_as(out), out


@dataclass(frozen=True)
class BlockSite:
    """One Mamba block in a model.

    Attributes:
        name: of the module that a quantized block replaces, as in named_modules().
        contract: how that module is called.
        weights: reads the block's float32 weights; nothing shares storage with the model.
        keeps: names of the module's children that are no part of the block and stay where they are.
    """

    name: str
    contract: Contract
    weights: Callable[[], MixerWeights]
    keeps: tuple[str, ...] = ()

    def replace_in(self, model: nn.Module, block: nn.Module) -> None:
        """Puts `block` into the place of the module.

        Args:
            model: that contains it.
            block: new; takes over the children that the site keeps.
        """
        old = model.get_submodule(self.name)
        for name in self.keeps:
            block.add_module(name, getattr(old, name))
        replace_module(model, self.name, block)


class CalledBlock(nn.Module):
    """A function of tokens behind the calling contract of the module that it replaces."""

    def __init__(self, contract: Contract) -> None:
        """Takes a contract; a subclass says what becomes of the tokens."""
        super().__init__()
        self.contract = contract

    def tokens_forward(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        """What the block computes.

        Args:
            hidden_states: (batch, tokens, hidden), tokens row-major over the grid.
            grid: sizes of its axes.

        Returns:
            (batch, tokens, hidden).
        """
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The replaced module's forward.

        Args:
            args: of the replaced module.
            kwargs: of the replaced module.

        Returns:
            As the replaced module.

        Raises:
            ValueError: the contract read something else than tokens over a grid.
        """
        hidden_states, grid = self.contract.read(*args, **kwargs)
        if hidden_states.dim() != 3 or hidden_states.shape[1] != math.prod(grid):
            raise ValueError(
                f"{type(self.contract).__name__}.read: expected (batch, tokens, hidden) over grid {grid}, "
                f"got {tuple(hidden_states.shape)}"
            )
        return self.contract.write(self.tokens_forward(hidden_states, grid), grid)


class FloatBlock(CalledBlock):
    """A block that computes block_forward on plain weights, which a tap can look into."""

    def __init__(self, weights: MixerWeights, contract: Contract) -> None:
        """Takes weights in the dtype to compute in."""
        super().__init__(contract)
        self.weights = weights
        self.tap: Tap = no_tap

    def tokens_forward(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        """See CalledBlock."""
        dtype = self.weights.out.dtype
        out, _ = block_forward(self.weights, hidden_states.to(dtype), tap=self.tap, grid=grid)
        return out


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module into the place of another.

    Args:
        model: that contains it.
        name: of the module to replace, as in named_modules().
        module: new.
    """
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(leaf)] = module
    else:
        setattr(owner, leaf, module)
