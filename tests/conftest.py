"""Fixtures that every test shares: the operators on each backend and a seeded generator."""

import pytest
import torch
from hypothesis import settings

import backends
import mambaquant_ext

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("ci")


@pytest.fixture(scope="session", params=backends.NAMES)
def ops(request):
    """The operators on one backend, called with CPU tensors."""
    reason = backends.reason_to_skip(request.param)
    if reason is not None:
        pytest.skip(reason)
    return backends.Backend(request.param)


@pytest.fixture(params=backends.ISAS)
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
