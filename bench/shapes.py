"""Layer shapes of the models that people run; nothing in bench/ invents its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One Mamba block: hidden (d_model), dim (d_inner), dt_rank."""

    name: str
    hidden: int
    dim: int
    dt_rank: int
    dstate: int = 16
    width: int = 4


DOCS = LayerShape("mamba-lm-docs", 384, 768, 24)
M130 = LayerShape("mamba-130m", 768, 1536, 48)
M370 = LayerShape("mamba-370m", 1024, 2048, 64)
M790 = LayerShape("mamba-790m", 1536, 3072, 96)
M1400 = LayerShape("mamba-1.4b", 2048, 4096, 128)
M2800 = LayerShape("mamba-2.8b", 2560, 5120, 160)
VIM_TINY = LayerShape("vim-tiny", 192, 384, 12)
VIM_GRID = (14, 14)  # tokens of an image

# By preset of bench.run (quick, full) and of bench.gpu (gpu-quick, gpu).
MODELS = {
    "quick": [M130],
    "full": [DOCS, M130, M370, M790, M1400, M2800],
    "gpu-quick": [M130, M2800],
    "gpu": [M130, M2800],
}
DECODE_TOKENS = {"quick": [1], "full": [1, 4, 16, 64], "gpu-quick": [1, 64], "gpu": [1, 8, 64]}
PREFILL_TOKENS = {
    "quick": [512],
    "full": [128, 512, 2048, 4096],
    "gpu-quick": [2048],
    "gpu": [512, 2048],
}
