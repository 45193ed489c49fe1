"""Whole blocks and the self-test on the CUDA kernels, in the simulator and on a GPU."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import backends
from mambaquant_ext import QuantMambaBlock, self_test
from mambaquant_ext.artifacts import Merge, NormKind, Skip
from mambaquant_ext.model.vision import (
    MambaND,
    MambaNDConfig,
    MambaNDEncoder,
    VimConfig,
    VisionMamba,
)
from mambaquant_ext.model.vision.mhs_vm import MHSConfig, MHSUNet
from mambaquant_ext.model.vision.msvmamba import MSVMamba, MSVMambaConfig
from mambaquant_ext.model.vision.vmamba import VMamba, VMambaConfig
from mambaquant_ext.routes import FORWARD, ScanRoute, TokenOrder
from mambaquant_ext.run.cache import StateDict
from stages.test_block import many_parts, quantized, stream
from stages.vision import quantizing
from tolerances import INTEGER_EMULATED_SQNR_DB, sqnr_db


@pytest.fixture(params=["cudasim", "cuda"])
def backend(request):
    reason = backends.reason_to_skip(request.param)
    if reason is not None:
        pytest.skip(reason)
    return backends.Backend(request.param)


def on(backend, block):
    """The block with its weights packed for the CUDA kernels."""
    if backend.name == "cuda":
        return block.cuda()
    return QuantMambaBlock(block.packed)


@pytest.mark.parametrize("variant", ["w8a8", "rtn", "float read-out"])
def test_block_equals_the_cpu_block_up_to_rounding(backend, variant):
    """Prompt, then tokens one by one, through the cache."""
    block = quantized(variant)
    x = stream(seqlen=24)
    expected, cache = [], StateDict({})
    for part in (x[:, :20], *x[:, 20:].split(1, 1)):
        expected.append(block(part, cache))
    with backend.active():
        cuda_block = on(backend, block)
        place = next(cuda_block.buffers()).device
        cuda_cache = StateDict({})
        for part, want in zip((x[:, :20], *x[:, 20:].split(1, 1)), expected, strict=True):
            got = cuda_block(part.to(place), cuda_cache).cpu()
            # What the block adds to the stream.
            assert sqnr_db(got - part, want - part) > INTEGER_EMULATED_SQNR_DB


@dataclass(frozen=True)
class BlockCase:
    """A block of a small vision model.

    Attributes:
        model: class of the model.
        config: of the model.
        batch: shape of what the model takes.
        grid: over which the block's tokens lie.
        layout: what the block is here for, by attribute of its layout.
        index: of the block among the model's.
    """

    model: type[torch.nn.Module]
    config: Any
    batch: tuple[int, ...]
    grid: tuple[int, ...]
    layout: dict[str, Any]
    index: int = 0

    def quantized(self):
        """The block, packed for the CPU's kernels."""
        model = quantizing.uneven_model(self.model, self.config)
        _, packed = quantizing.quantized(model, quantizing.random_batches(self.batch))
        block = packed.blocks[self.index]
        assert {name: getattr(block.layout, name) for name in self.layout} == self.layout
        return QuantMambaBlock(block)


PICTURES = {"channels": 2, "mean": (0.4, 0.5), "std": (0.2, 0.3), "embed_dim": 24}
MAPS = {"depths": (1,), "dims": (8,), "classes": 5, "dstate": 4}
# Three frames of four by two patches.
VIDEO = {**PICTURES, "depth": 4, "input_size": (3, 8, 4), "patch_size": (1, 2, 2)}
COLUMNS, FRAMES_BY_COLUMNS = TokenOrder("axes", (1, 0)), TokenOrder("axes", (0, 2, 1))
BLOCKS = {
    "vim": BlockCase(
        VisionMamba,
        VimConfig(
            **{**PICTURES, "img_size": 16, "patch_size": 4, "stride": 4, "num_classes": 7},
            **{"depth": 1, "d_state": 8, "dt_rank": 4},
        ),
        (4, 2, 16, 16),
        (17,),
        {"class_token": 8, "routes": (FORWARD, ScanRoute(reverse=True, branch=1))},
    ),
    "vmamba": BlockCase(
        VMamba,
        VMambaConfig(**MAPS, ssm_ratio=2.0, has_gate=True, mlp_ratio=0.0),
        (2, 3, 24, 32),
        (6, 8),
        {
            "out_norm": NormKind.LAYER,
            "routes": (
                FORWARD,
                ScanRoute(COLUMNS, branch=1),
                ScanRoute(reverse=True, branch=2),
                ScanRoute(COLUMNS, reverse=True, branch=3),
            ),
        },
    ),
    # A map of half the size, scanned by three routes with one state and brought back by interpolation.
    "msvmamba": BlockCase(
        MSVMamba,
        MSVMambaConfig(**MAPS),
        (2, 3, 20, 28),
        (5, 7),
        {
            "merge": Merge.NORMED_SUM,
            "excite_dim": 2,
            "routes": (
                ScanRoute(reverse=True),
                ScanRoute(COLUMNS, continues=True),
                ScanRoute(COLUMNS, reverse=True, continues=True),
                ScanRoute(branch=1),
            ),
        },
    ),
    # Four heads of four channels, each scanned along four routes.
    "mhs-vm": BlockCase(
        MHSUNet,
        MHSConfig(depths=(1,), decoder_depths=(1,), classes=2, dstate=2, hidden=16),
        (2, 3, 24, 32),
        (6, 8),
        {"merge": Merge.VARIATION, "has_gate": False, "convs": ()},
    ),
    "mamba-nd": BlockCase(
        MambaNDEncoder,
        MambaNDConfig(**VIDEO, num_classes=0, out_indices=(3,)),
        (4, 2, 3, 8, 4),
        (3, 4, 2),
        {
            "norm": NormKind.LAYER,
            "skip": Skip.NORMALISED,
            "has_in_rotation": True,
            "routes": (ScanRoute(FRAMES_BY_COLUMNS, reverse=True),),
        },
        index=3,
    ),
    "mamba-nd, rotated stream": BlockCase(
        MambaND,
        MambaNDConfig(**VIDEO, num_classes=7),
        (4, 2, 3, 8, 4),
        (3, 4, 2),
        {
            "norm": NormKind.RMS,
            "skip": Skip.NORMALISED,
            "has_skip_matrix": True,
            "routes": (ScanRoute(FRAMES_BY_COLUMNS),),
        },
        index=2,
    ),
}


def assert_equals_the_cpu_block(backend, block, grid):
    """Up to rounding, in what the block adds to its skip."""
    x = stream(4, math.prod(grid), block.layout.hidden)
    want = block(x, grid=grid)
    _, skip = block.executor.entry(x.flatten(0, 1))
    skip = torch.zeros_like(want) if skip is None else skip.view_as(want)
    with backend.active():
        cuda_block = on(backend, block)
        place = next(cuda_block.buffers()).device
        got = cuda_block(x.to(place), grid=grid).cpu()
    assert sqnr_db(got - skip, want - skip) > INTEGER_EMULATED_SQNR_DB


@pytest.mark.parametrize("name", BLOCKS)
def test_block_of_a_vision_model_equals_the_cpu_block_up_to_rounding(backend, name):
    case = BLOCKS[name]
    assert_equals_the_cpu_block(backend, case.quantized(), case.grid)


@pytest.mark.parametrize("merge", list(Merge))
def test_block_of_many_parts_equals_the_cpu_block_up_to_rounding(backend, merge):
    block, _ = many_parts(merge)
    # The scale of the class token's own is another one, so that it matters which of them a row has.
    assert not torch.equal(block.packed.class_out_scale, block.packed.out_scale)
    assert_equals_the_cpu_block(backend, block, (9,))


def test_every_kernel_is_ok(backend):
    with backend.active():
        report = self_test("cuda" if backend.name == "cuda" else "cpu")
    assert set(report.values()) == {"ok"}, report


def test_moving_there_and_back_keeps_the_bits():
    if backends.reason_to_skip("cuda"):
        pytest.skip(backends.reason_to_skip("cuda"))
    block, x = quantized(), stream()
    expected = block(x)
    assert torch.equal(block.cuda().cpu()(x), expected)
