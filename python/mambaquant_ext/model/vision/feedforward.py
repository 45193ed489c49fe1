"""What blocks of VMamba's family have beside their scans, on channel-last maps (batch, height, width, channels)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def depthwise_conv(dim: int, width: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    """A depthwise conv whose map keeps its size, divided by the stride and rounded up.

    Args:
        dim: channels.
        width: taps a side, odd.
        stride: of both axes.
        bias: has one.
    """
    return nn.Conv2d(dim, dim, width, stride=stride, padding=width // 2, groups=dim, bias=bias)


def conv_channels_last(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A conv of a channel-last map.

    Args:
        conv: of (batch, channels, height, width).
        x: (batch, height, width, channels).

    Returns:
        (batch, height', width', channels').
    """
    y: Tensor = conv(x.permute(0, 3, 1, 2))
    return y.permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, dim)
        self.fc2 = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output.

        Args:
            x: (..., hidden).
        """
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class ConvFFN(nn.Module):
    """linear2(gelu(v + dwc(v))), v = linear1(x).

    Attributes:
        linear1: 1x1 conv, hidden to dim.
        dwc: depthwise 3x3 conv.
        linear2: 1x1 conv, dim to hidden.
    """

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Conv2d(hidden, dim, 1)
        self.dwc = depthwise_conv(dim, 3, bias=True)
        self.linear2 = nn.Conv2d(dim, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The ConvFFN's output.

        Args:
            x: (batch, height, width, hidden).
        """
        v = conv_channels_last(self.linear1, x)
        v = v + conv_channels_last(self.dwc, v)
        return conv_channels_last(self.linear2, F.gelu(v))


class SqueezeExcitation(nn.Module):
    """x times a gate for every channel, made of the means of all channels.

    Attributes:
        fc: Linear, ReLU, Linear, Sigmoid; no bias.
    """

    def __init__(self, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, bottleneck, bias=False),
            nn.ReLU(),
            nn.Linear(bottleneck, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The gated map.

        Args:
            x: (batch, height, width, dim).
        """
        gate: Tensor = self.fc(x.mean((1, 2)))
        return x * gate[:, None, None]
