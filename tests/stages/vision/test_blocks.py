"""One quantized block of parts that no family of models has together."""

import pytest
import torch

from mambaquant_ext import Fidelity, recipe
from mambaquant_ext.artifacts import BlockLayout, BranchLayout, ConvLayout, Merge, NormKind
from mambaquant_ext.calibrate import BlockRun, collect_ranges
from mambaquant_ext.model import NormWeights, block_forward
from mambaquant_ext.pack import pack_block
from mambaquant_ext.run import QuantMambaBlock
from mambaquant_ext.run.mixers import check_runs_on_kernels
from stages.models import REAL, many_parts, mixer_weights
from tolerances import INTEGER_EMULATED_SQNR_DB, assert_equal, sqnr_db


def tokens(hidden, generator, seqlen=6):
    return torch.randn(3, seqlen, hidden, generator=generator)


def packed_block(weights, x):
    ranges = collect_ranges(BlockRun(weights), [x], recipe("rtn"))
    return pack_block(weights, ranges.layers[0], recipe("rtn"))


@pytest.mark.parametrize("kind", NormKind)
def test_a_norm_with_a_bias_is_the_norm_of_the_emulation(kind, generator):
    """Neither norm loses its bias in the kernel that rounds."""
    weights = mixer_weights(REAL, generator).to(torch.float32)
    bias = torch.randn(REAL.hidden, generator=generator)
    weights = weights.replace(
        norm=NormWeights(kind=kind, weight=weights.norm.weight, bias=bias, eps=1e-5)
    )
    x = tokens(REAL.hidden, generator)
    packed = packed_block(weights, x)
    integer, emulated = (QuantMambaBlock(packed, fidelity=fidelity)(x) for fidelity in Fidelity)
    assert sqnr_db(integer, emulated) >= INTEGER_EMULATED_SQNR_DB


@pytest.mark.parametrize("fidelity", Fidelity)
def test_a_sequence_without_the_place_of_the_class_token_is_refused(fidelity, generator):
    weights = many_parts(generator)
    block = QuantMambaBlock(packed_block(weights, tokens(16, generator)), fidelity=fidelity)
    assert block(tokens(16, generator, seqlen=5)).shape == (3, 5, 16)
    with pytest.raises(ValueError, match="expected a class token at 4, got 4 tokens"):
        block(tokens(16, generator, seqlen=4))
    with pytest.raises(ValueError, match="expected a class token at 4, got 4 tokens"):
        block_forward(weights, tokens(16, generator, seqlen=4))


@pytest.mark.parametrize("fidelity", Fidelity)
def test_padding_is_refused_where_other_tokens_would_see_it(fidelity, generator):
    x = tokens(16, generator)
    block = QuantMambaBlock(packed_block(many_parts(generator), x), fidelity=fidelity)
    mask = torch.ones(3, 6)
    assert_equal(block(x, attention_mask=mask), block(x))
    mask[1, 5] = 0
    with pytest.raises(ValueError, match=r"expected no padding .* got attention_mask with 1 zero"):
        block(x, attention_mask=mask)


def test_a_stride_that_no_kernel_has_is_refused_at_once():
    layout = BlockLayout(
        hidden=8,
        dim=8,
        convs=(ConvLayout(kernel=(3, 3), stride=3),),
        branches=(BranchLayout(dim=8, dstate=4, dt_rank=2),),
        merge=Merge.NORMED_SUM,
        out_norm=NormKind.LAYER,
    )
    with pytest.raises(ValueError, match=r"of stride 1 or 2, got 3; use Fidelity\.EMULATED"):
        check_runs_on_kernels(layout)
