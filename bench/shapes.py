"""Layer shapes of the models that people run; nothing in bench/ invents its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

VOCABULARY = 50_280  # of the mamba checkpoints


@dataclass(frozen=True)
class LayerShape:
    """One Mamba block: hidden (d_model), dim (d_inner), dt_rank."""

    name: str
    hidden: int
    dim: int
    dt_rank: int
    dstate: int = 16
    width: int = 4


@dataclass(frozen=True)
class LanguageShape:
    """A language model: so many blocks of one shape between an embedding and a head that share a table."""

    layer: LayerShape
    layers: int
    vocab: int = VOCABULARY

    @property
    def name(self) -> str:
        """That of its layers."""
        return self.layer.name

    @property
    def linear_weights(self) -> int:
        """Weights of one layer's four matrix products."""
        layer = self.layer
        states = layer.dt_rank + 2 * layer.dstate
        return layer.dim * (2 * layer.hidden + states + layer.dt_rank + layer.hidden)

    @property
    def parameters(self) -> int:
        """Of all matrices: what sets the size of a file, to a few percent."""
        return self.layers * self.linear_weights + self.vocab * self.layer.hidden

    def state_bytes(self, batch: int) -> int:
        """What a token reads and writes of the state: float32 of the scan, int8 of the convolution."""
        layer = self.layer
        scan, conv = 4 * layer.dstate * layer.dim, (layer.width - 1) * layer.dim
        return 2 * batch * self.layers * (scan + conv)


@dataclass(frozen=True)
class ImageShape:
    """The depthwise conv of a vision block: dim (d_inner) channels of a grid of pixels, a square kernel."""

    name: str
    height: int
    width: int
    dim: int
    kernel: int = 3
    stride: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the output."""
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Columns of the output."""
        return (self.width - 1) // self.stride + 1


DOCS = LayerShape("mamba-lm-docs", 384, 768, 24)
M130 = LayerShape("mamba-130m", 768, 1536, 48)
M370 = LayerShape("mamba-370m", 1024, 2048, 64)
M790 = LayerShape("mamba-790m", 1536, 3072, 96)
M1400 = LayerShape("mamba-1.4b", 2048, 4096, 128)
M2800 = LayerShape("mamba-2.8b", 2560, 5120, 160)
LANGUAGE_MODELS = {
    shape.name: shape
    for shape in (LanguageShape(M130, 24), LanguageShape(M370, 48), LanguageShape(M1400, 48))
}
VIM_TINY = LayerShape("vim-tiny", 192, 384, 12)
VIM_GRID = (14, 14)  # tokens of an image

# By preset of bench.run (quick, full, and cpu for bench.cpu) and of bench.gpu (gpu-quick, gpu).
MODELS = {
    "quick": [M130],
    "cpu": [M130],
    "full": [DOCS, M130, M370, M790, M1400, M2800],
    "gpu-quick": [M130, M2800],
    "gpu": [M130, M2800],
}
DECODE_TOKENS = {
    "quick": [1],
    "cpu": [1, 8],
    "full": [1, 4, 16, 64],
    "gpu-quick": [1, 64],
    "gpu": [1, 8, 64],
}
PREFILL_TOKENS = {
    "quick": [512],
    "cpu": [512, 2048],
    "full": [128, 512, 2048, 4096],
    "gpu-quick": [2048],
    "gpu": [512, 2048],
}
# Of matrix products alone, whose tiles suit some numbers of rows better than others.
MORE_GEMM_TOKENS = {"cpu": [64, 128, 256, 1024]}

# The four stages of VMamba-T at 224 x 224; MSVMamba also scans each at half its size, which a conv makes.
VMAMBA_TINY = [
    ImageShape(f"vmamba-tiny stage {stage + 1}", 56 >> stage, 56 >> stage, 96 << stage)
    for stage in range(4)
]
MSVMAMBA_TINY = [
    replace(image, name=f"ms{image.name}", kernel=7, stride=2) for image in VMAMBA_TINY[:3]
]
IMAGES = {
    "quick": [VMAMBA_TINY[1], MSVMAMBA_TINY[1]],
    "cpu": [VMAMBA_TINY[1]],
    "full": [*VMAMBA_TINY, *MSVMAMBA_TINY],
    "gpu-quick": [VMAMBA_TINY[1], MSVMAMBA_TINY[1]],
    "gpu": [*VMAMBA_TINY, *MSVMAMBA_TINY],
}
IMAGE_BATCH = {"quick": [1], "cpu": [1], "full": [1, 8], "gpu-quick": [64], "gpu": [1, 64]}
