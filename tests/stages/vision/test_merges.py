"""What is computed of means over tokens: against float64, and the same bits alone and in a batch."""

import pytest
import torch
from torch.nn import functional as F

from mambaquant_ext.model.parts import even_sigmoid, excited, route_shares
from tolerances import assert_equal, assert_relative

DIMS = [16, 96, 1536]
BATCH, TOKENS, ROUTES = 17, 6, 3


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def excitation(dim):
    inner = dim // 8
    return normal(BATCH, TOKENS, dim), normal(inner, dim, seed=1), normal(dim, inner, seed=2)


def test_excitation_is_a_gate_of_the_token_mean():
    y, squeeze, excite = excitation(96)
    gate = torch.sigmoid(F.relu(y.mean(1) @ squeeze.T) @ excite.T)
    assert_relative(excited(y, squeeze, excite), y * gate[:, None])


@pytest.mark.parametrize("dim", DIMS)
def test_excitation_of_a_sample_does_not_depend_on_its_batch(dim):
    y, squeeze, excite = (tensor.float() for tensor in excitation(dim))
    alone = torch.cat([excited(sample[None], squeeze, excite) for sample in y])
    assert_equal(alone, excited(y, squeeze, excite))


def test_a_sigmoid_does_not_depend_on_its_place():
    x = torch.cat([normal(1000) * 10, torch.tensor([-1e4, 1e4, 0.0], dtype=torch.float64)])
    assert_relative(even_sigmoid(x), torch.sigmoid(x))
    x = x.float()
    assert_equal(torch.cat([even_sigmoid(value[None]) for value in x]), even_sigmoid(x))


def shares(dim):
    return normal(ROUTES, BATCH, TOKENS, dim), normal(ROUTES, ROUTES, dim, seed=1) / dim**0.5


def test_shares_of_routes_are_a_softmax_of_their_token_means():
    vs, gate = shares(16)
    means = vs.mean(2)
    logits = torch.stack([sum(means[j] @ gate[k, j] for j in range(ROUTES)) for k in range(ROUTES)])
    assert_relative(route_shares(vs, gate), logits.softmax(0)[..., None, None])


@pytest.mark.parametrize("dim", DIMS)
def test_shares_of_a_sample_do_not_depend_on_its_batch(dim):
    vs, gate = (tensor.float() for tensor in shares(dim))
    alone = torch.cat([route_shares(vs[:, i : i + 1], gate) for i in range(BATCH)], 1)
    assert_equal(alone, route_shares(vs, gate))
