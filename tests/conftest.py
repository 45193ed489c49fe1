"""Fixtures that every test shares: the instruction set and a seeded generator."""

import pytest
import torch
from hypothesis import settings

import mambaquant_ext

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("ci")


@pytest.fixture(params=["scalar", "avx2", "avx512_vnni"])
def isa(request):
    """Forces one instruction set for the test and checks that it is the one in use."""
    name = request.param
    if name not in mambaquant_ext.supported_isas():
        pytest.skip(f"this processor or build lacks {name}")
    with mambaquant_ext.forced_isa(name):
        assert mambaquant_ext.current_isa() == name
        yield name


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20260)
