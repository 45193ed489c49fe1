"""MHS-VM: a U-Net of multi-head scan blocks for segmentation.

Between the patch embedding and the last conv, tensors are channel-last, (batch, height, width, hidden). Routes are
made for the map at hand; the public code reads them from a file made for one image size.

Source: Ji, MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba (arXiv 2406.05992); parameter names of
PixDeep/MHS-VM, whose wrapper puts "vmunet." before them, takes grey images for colour ones, and puts a sigmoid on a
single class.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mambaquant_ext.model.vision.config_fields import FieldConfig
from mambaquant_ext.model.vision.hierarchy import PatchMerging, check_images
from mambaquant_ext.model.vision.multi_head_scan import (
    HEAD_PATTERNS,
    MultiHeadScan,
    VSSGate,
    VSSUnGated,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MHSConfig(FieldConfig):
    """Sizes and variants of an MHS-VM.

    Attributes:
        depths: blocks of each encoder stage.
        decoder_depths: blocks of each decoder stage, the deepest first.
        hidden: width of the first stage; each next one has twice as many channels and half the sides.
        image_channels: of the input.
        classes: of the output.
        patch_size: pixels a side of a token of the first stage.
        dstate: states per channel.
        heads: 3 or 4.
        gate_threshold: of the fusion's coefficient of variation.
        has_projection: cat_norm and y_proj after the heads.
        is_gated: blocks have a gate z.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (2, 2, 2, 1)
    hidden: int = 96
    image_channels: int = 3
    classes: int = 1
    patch_size: int = 4
    dstate: int = 16
    heads: int = 4
    gate_threshold: float = 0.5
    has_projection: bool = True
    is_gated: bool = True

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: a value of another type or range, or values that exclude each other.
        """
        self.check_fields(may_be_zero=frozenset({"gate_threshold"}))
        if len(self.decoder_depths) != len(self.depths):
            self.refuse("decoder_depths", f"as many values as depths ({len(self.depths)})")
        if self.heads not in HEAD_PATTERNS:
            self.refuse("heads", " or ".join(str(heads) for heads in HEAD_PATTERNS))
        if self.hidden % self.patch_size:
            self.refuse("hidden", f"a multiple of patch_size ({self.patch_size})")
        if not self.has_projection and self.hidden % self.heads:
            self.refuse("hidden", f"a multiple of heads ({self.heads}) without a projection")
        if self.hidden < self.heads:
            self.refuse("hidden", f"at least a channel a head ({self.heads})")

    @property
    def dims(self) -> tuple[int, ...]:
        """Hidden width of each encoder stage."""
        return tuple(self.hidden * 2**stage for stage in range(len(self.depths)))


# The published models, by the data set that they were trained for.
PRESETS: dict[str, MHSConfig] = {
    "isic17": MHSConfig(gate_threshold=0.0),
    "isic18": MHSConfig(gate_threshold=0.5),
}


class MHSBlock(nn.Module):
    """x + self_attention(ln_1(x)); the mixer under the checkpoints' name.

    Attributes:
        ln_1: LayerNorm of hidden.
        self_attention: the mixer.
    """

    def __init__(self, hidden: int, mixer: nn.Module) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden)
        self.self_attention = mixer

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: (batch, height, width, hidden).
        """
        y: Tensor = x + self.self_attention(self.ln_1(x))
        return y


class NormedPatches(nn.Module):
    """From an image to the first map.

    Attributes:
        proj: conv with the patch as kernel and stride.
        norm: LayerNorm of hidden.
    """

    def __init__(self, channels: int, hidden: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, images: Tensor) -> Tensor:
        """The map.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, height / patch_size, width / patch_size, hidden).
        """
        y: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return y


class PatchExpand(nn.Module):
    """Each token becomes a square of tokens with fewer channels.

    Attributes:
        expand: hidden to side^2 * out, row of the square first, then column, then channel; no bias.
        norm: LayerNorm of out.
    """

    def __init__(self, hidden: int, out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.expand = nn.Linear(hidden, side * side * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """The larger map.

        Args:
            x: (batch, height, width, hidden).

        Returns:
            (batch, side * height, side * width, out).
        """
        squares = self.expand(x).unflatten(-1, (self.side, self.side, -1))
        y: Tensor = self.norm(squares.transpose(2, 3).flatten(3, 4).flatten(1, 2))
        return y


class EncoderStage(nn.Module):
    """Blocks, then a smaller map.

    Attributes:
        blocks: list of them.
        downsample: or Identity in the last stage.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """The next stage's input.

        Args:
            x: (batch, height, width, hidden).
        """
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.downsample(x)
        return y


class DecoderStage(nn.Module):
    """A larger map, then blocks.

    Attributes:
        upsample: or Identity in the deepest stage.
        blocks: list of them.
    """

    def __init__(self, upsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.upsample = upsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The next stage's input.

        Args:
            x: (batch, height, width, hidden).
        """
        x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class MHSUNet(nn.Module):
    """Encoder, decoder whose stages add the encoder's maps of their size, and a conv to the classes.

    Attributes:
        patch_embed: from an image to the first map.
        layers: encoder stages.
        layers_up: decoder stages, the deepest first.
        final_up: back to the size of the image.
        final_conv: 1x1, to the classes.
    """

    def __init__(self, config: MHSConfig) -> None:
        super().__init__()
        self.config = config
        dims, last = config.dims, len(config.dims) - 1
        self.patch_embed = NormedPatches(config.image_channels, config.hidden, config.patch_size)
        self.layers = nn.ModuleList()
        self.layers_up = nn.ModuleList()
        for stage, (hidden, depth) in enumerate(zip(dims, config.depths, strict=True)):
            smaller = nn.Identity() if stage == last else PatchMerging(hidden, 2 * hidden)
            self.layers.append(EncoderStage(self.make_blocks(hidden, depth), smaller))
        for stage, (hidden, depth) in enumerate(
            zip(reversed(dims), config.decoder_depths, strict=True)
        ):
            larger = nn.Identity() if stage == 0 else PatchExpand(2 * hidden, hidden, 2)
            self.layers_up.append(DecoderStage(larger, self.make_blocks(hidden, depth)))
        out = config.hidden // config.patch_size
        self.final_up = PatchExpand(config.hidden, out, config.patch_size)
        self.final_conv = nn.Conv2d(out, config.classes, 1)

    def make_blocks(self, hidden: int, depth: int) -> list[nn.Module]:
        """The new blocks of a stage.

        Args:
            hidden: width of the stage.
            depth: number of blocks.
        """
        config = self.config
        mixer = VSSGate if config.is_gated else VSSUnGated
        blocks: list[nn.Module] = []
        for _ in range(depth):
            scan = MultiHeadScan(
                hidden=hidden,
                heads=config.heads,
                dstate=config.dstate,
                threshold=config.gate_threshold,
                has_projection=config.has_projection,
            )
            blocks.append(MHSBlock(hidden, mixer(hidden, scan)))
        return blocks

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            images: (batch, image_channels, height, width), sides that the patch embedding and the stages divide.

        Returns:
            (batch, classes, height, width).

        Raises:
            ValueError: images of another shape.
        """
        step = self.config.patch_size * 2 ** (len(self.config.depths) - 1)
        check_images(images, self.config.image_channels, step)
        if images.shape[2] % step or images.shape[3] % step:
            raise ValueError(
                f"images: expected sides that are multiples of {step}, got {tuple(images.shape)}"
            )
        x = self.patch_embed(images)
        maps = []
        for stage in self.layers:
            maps.append(x)
            x = stage(x)
        x = self.layers_up[0](x)
        for stage, skip in zip(self.layers_up[1:], reversed(maps), strict=False):
            x = stage(x + skip)
        logits: Tensor = self.final_conv(self.final_up(x).permute(0, 3, 1, 2))
        return logits
