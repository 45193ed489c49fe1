"""Whole blocks and the self-test on the CUDA kernels, in the simulator and on a GPU."""

import pytest
import torch

import backends
from mambaquant_ext import QuantMambaBlock, self_test
from mambaquant_ext.run.cache import StateDict
from stages.test_block import quantized, stream
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
