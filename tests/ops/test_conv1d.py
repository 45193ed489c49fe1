"""causal_conv1d_quantize and its update: against the reference, properties, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import inputs
from cases.conv1d import CASES, ConvCase
from mambaquant_ext import ops
from reference import conv1d as reference
from tolerances import assert_equal, assert_int8_close


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case, ops, generator):
    arguments = case.make(generator)
    q, final_state = ops.causal_conv1d_quantize(**arguments)
    expected_q, expected_state = reference.causal_conv1d_quantize(**arguments)
    assert_int8_close(q, expected_q)
    assert_equal(final_state, expected_state)
    assert q.is_contiguous()


def test_the_integer_sum_is_exact(ops, generator):
    """The bias takes acc back to 100 + channel % 20, where SiLU is the identity: every unit of acc
    shows."""
    dim = 2000
    x, weight = inputs.int8((1, 4, dim), generator), inputs.int8((4, dim), generator)
    x[..., :16], weight[:, :16] = -127, 127
    acc = (weight.int() * x[0].int()).sum(0)
    target = 100 + torch.arange(dim) % 20
    ones = torch.ones(dim)
    q, _ = ops.causal_conv1d_quantize(x, ones, weight, ones, (target - acc).float(), ones)
    assert_equal(q[0, -1].int(), target.int())


@pytest.mark.parametrize(("asymmetric", "qmin"), [(False, -127), (True, -128)])
def test_saturates_at_the_ends_of_the_grid(asymmetric, qmin, ops, generator):
    """SiLU goes down to -0.278, which is far below the grid of an out_scale of 0.0005."""
    arguments = ConvCase("", seqlen=40, asymmetric=asymmetric).make(generator)
    arguments["out_scale"] = torch.full((33,), 0.0005)
    q, _ = ops.causal_conv1d_quantize(**arguments)
    assert (int(q.min()), int(q.max())) == (qmin, 127)
    assert_int8_close(q, reference.causal_conv1d_quantize(**arguments)[0])


@given(
    st.integers(1, 3), st.integers(1, 140), st.integers(1, 70), st.sampled_from([2, 3, 4]),
    st.booleans(), st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_a_split_sequence_equals_the_whole(ops, batch, seqlen, dim, width, reverse, seed, data):
    cut = data.draw(st.integers(0, seqlen))
    case = ConvCase("", batch, seqlen, dim, width, state=True, reverse=reverse)
    arguments = case.make(seeded(seed))
    q, final_state = ops.causal_conv1d_quantize(**arguments)
    x = arguments.pop("x")
    state = arguments.pop("initial_state")
    pieces = [x[:, :cut], x[:, cut:]]
    results = [None, None]
    for i in (1, 0) if reverse else (0, 1):
        results[i], state = ops.causal_conv1d_quantize(pieces[i], initial_state=state, **arguments)
    assert_equal(torch.cat(results, 1), q)
    assert_equal(state, final_state)


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
def test_updates_equal_the_full_sequence(ops, batch, dim, width, seed):
    arguments = ConvCase("", batch, 6, dim, width, state=True).make(seeded(seed))
    q, final_state = ops.causal_conv1d_quantize(**arguments)
    x, state = arguments.pop("x"), arguments.pop("initial_state")
    del arguments["reverse"], arguments["order"]
    for t in range(x.shape[1]):
        step = ops.causal_conv1d_update_quantize(x[:, t], state, **arguments)
        assert_equal(step, q[:, t])
    assert_equal(state, final_state)


def test_reverse_is_the_walk_over_the_flipped_sequence(ops, generator):
    arguments = ConvCase("", seqlen=70, dim=40, state=True).make(generator)
    q, final_state = ops.causal_conv1d_quantize(**arguments)
    flipped = {**arguments, "x": arguments["x"].flip(1), "reverse": True}
    q_flipped, state_flipped = ops.causal_conv1d_quantize(**flipped)
    assert_equal(q_flipped.flip(1), q)
    assert_equal(state_flipped, final_state)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_order_is_the_walk_over_the_gathered_sequence(reverse, ops, generator):
    case = ConvCase("", seqlen=70, dim=40, state=True, reverse=reverse, order="random")
    arguments = case.make(generator)
    q, final_state = ops.causal_conv1d_quantize(**arguments)
    steps = arguments["order"].long()
    gathered = {**arguments, "x": arguments["x"][:, steps], "order": None}
    q_gathered, state_gathered = ops.causal_conv1d_quantize(**gathered)
    assert_equal(q[:, steps], q_gathered)
    assert_equal(final_state, state_gathered)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_the_sequence_itself_changes_no_bit(reverse, ops, generator):
    arguments = ConvCase("", seqlen=70, state=True, reverse=reverse).make(generator)
    expected = ops.causal_conv1d_quantize(**arguments)
    arguments["order"] = torch.arange(70, dtype=torch.int32)
    for actual, wanted in zip(ops.causal_conv1d_quantize(**arguments), expected, strict=True):
        assert_equal(actual, wanted)


def test_tokens_outside_the_sequence_are_neither_read_nor_written(ops, generator):
    """A GPU's order is not checked. Such a token counts as 0, and the others come out as they should."""
    if ops.name != "cuda":
        pytest.skip("the values of an order on the CPU are checked")
    arguments = ConvCase("", seqlen=70, dim=40, order="random").make(generator)
    order = arguments["order"]
    order[[3, 20, 41, 69]] = torch.tensor([-1, 70, 2**31 - 1, -(2**31)], dtype=torch.int32)
    is_token = (order >= 0) & (order < 70)
    q, state = ops.causal_conv1d_quantize(**arguments)
    gathered = arguments["x"][:, order.clamp(0, 69).long()] * is_token[:, None]
    arguments |= {"x": gathered, "order": None}
    expected, expected_state = ops.causal_conv1d_quantize(**arguments)
    assert_equal(q[:, order[is_token].long()], expected[:, is_token])
    assert_equal(state, expected_state)


def test_causality(ops, generator):
    """A token changes itself and the width - 1 tokens after it, and nothing else."""
    arguments = ConvCase("", batch=1, seqlen=100, dim=48, width=3).make(generator)
    before, _ = ops.causal_conv1d_quantize(**arguments)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][:, 61] += 50
    after, _ = ops.causal_conv1d_quantize(**arguments)
    changed = (before != after).any(2)[0].nonzero().flatten().tolist()
    assert changed == [61, 62, 63]


def test_batch_and_thread_invariance(ops, generator):
    arguments = ConvCase("", batch=5, seqlen=130, dim=150).make(generator)
    q, _ = ops.causal_conv1d_quantize(**arguments)
    x = arguments.pop("x")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_equal(ops.causal_conv1d_quantize(x, **arguments)[0], q)
    finally:
        torch.set_num_threads(threads)
    for b in range(5):
        assert_equal(ops.causal_conv1d_quantize(x[b : b + 1], **arguments)[0], q[b : b + 1])


def order(*tokens):
    return torch.tensor(tokens, dtype=torch.int32)


GOOD = ConvCase("", dim=6).make(seeded(1))
BAD = [
    ({"x": GOOD["x"].float()}, TypeError, "expected x of dtype"),
    ({"x": GOOD["x"][0]}, ValueError, "expected x with 3 dimensions"),
    ({"x": GOOD["x"].transpose(1, 2)}, ValueError, "expected x with a contiguous last dimension"),
    ({"weight": GOOD["weight"][0]}, ValueError, "expected weight with 2 dimensions"),
    (
        {"weight": GOOD["weight"][:1]},
        NotImplementedError,
        "expected weight of width 2, 3 or 4, got 1",
    ),
    ({"weight": GOOD["weight"].repeat(2, 1)}, NotImplementedError, "width 2, 3 or 4, got 8"),
    ({"weight": GOOD["weight"][:, :5]}, ValueError, r"expected weight of shape \(width, dim\)"),
    ({"weight": GOOD["weight"].float()}, TypeError, "expected weight of dtype"),
    ({"x_scale": torch.ones(5)}, ValueError, r"expected x_scale of shape \(dim,\)"),
    ({"x_scale": torch.ones(12)[::2]}, ValueError, "expected x_scale to be contiguous"),
    ({"weight_scale": torch.ones(5)}, ValueError, "expected weight_scale of shape"),
    ({"bias": torch.ones(6).double()}, TypeError, "expected bias of dtype"),
    ({"out_scale": torch.ones(5)}, ValueError, "expected out_scale of shape"),
    ({"out_zero_point": torch.ones(6)}, TypeError, "expected out_zero_point of dtype"),
    (
        {"initial_state": torch.zeros(2, 4, 6, dtype=torch.int8)},
        ValueError,
        "expected initial_state of",
    ),
    ({"order": torch.arange(5)}, TypeError, "expected order of dtype Int, got Long"),
    ({"order": order(0, 1, 2, 3)}, ValueError, r"expected order of shape \(seqlen,\) = \[5\]"),
    ({"order": order(*range(10))[::2]}, ValueError, "expected order to be contiguous"),
    ({"order": order(0, 1, 5, 6, 4)}, ValueError, "tokens from 0 to 4, got 5 at position 2"),
    ({"order": order(0, 1, 2, -1, 4)}, ValueError, "tokens from 0 to 4, got -1 at position 3"),
    ({"order": order(3, 1, 2, 0, 3)}, ValueError, "each token once, got 3 again at position 4"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.causal_conv1d_quantize(**{**GOOD, **change})


def update_arguments(generator):
    arguments = ConvCase("", dim=6, state=True).make(generator)
    del arguments["reverse"], arguments["order"]
    state = arguments.pop("initial_state")
    return {**arguments, "x": arguments["x"][:, 0].contiguous(), "conv_state": state}


def test_bad_arguments_of_the_update_are_named(generator):
    good = update_arguments(generator)
    with pytest.raises(ValueError, match="expected x with 2 dimensions"):
        ops.causal_conv1d_update_quantize(**{**good, "x": GOOD["x"]})
    with pytest.raises(ValueError, match="expected conv_state of shape"):
        ops.causal_conv1d_update_quantize(**{**good, "conv_state": good["conv_state"][:, :2]})
    with pytest.raises(TypeError, match="expected conv_state of dtype"):
        ops.causal_conv1d_update_quantize(**{**good, "conv_state": good["conv_state"].float()})


UPDATE_ORDER = [
    "x",
    "conv_state",
    "x_scale",
    "weight",
    "weight_scale",
    "bias",
    "out_scale",
    "out_zero_point",
]


@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(reverse, generator):
    case = ConvCase("", dim=6, state=True, reverse=reverse, order="random" if reverse else None)
    arguments = case.make(generator)
    torch.library.opcheck(torch.ops.mambaquant.causal_conv1d_quantize, tuple(arguments.values()))
    update = update_arguments(generator)
    torch.library.opcheck(
        torch.ops.mambaquant.causal_conv1d_update_quantize,
        tuple(update[name] for name in UPDATE_ORDER),
    )


def test_traces_in_one_graph(generator):
    arguments = ConvCase("", dim=6, state=True).make(generator)
    traced = torch.compile(ops.causal_conv1d_quantize, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        traced(**arguments), ops.causal_conv1d_quantize(**arguments), strict=True
    ):
        assert_equal(actual, expected)
