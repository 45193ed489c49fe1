"""One quantized block of parts that no family of models has together."""

import pytest
import torch

from mambaquant_ext import Fidelity, recipe
from mambaquant_ext.artifacts import NormKind
from mambaquant_ext.calibrate import BlockRun, collect_ranges
from mambaquant_ext.model import NormWeights
from mambaquant_ext.pack import pack_block
from mambaquant_ext.run import QuantMambaBlock
from stages.models import REAL, mixer_weights
from tolerances import INTEGER_EMULATED_SQNR_DB, sqnr_db


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
