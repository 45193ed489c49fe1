"""selective_scan and its update: against the reference, exact read-out, properties, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import inputs
from cases.selective_scan import CASES, ScanCase, with_int8_readout
from mambaquant_ext import ops
from reference import selective_scan as reference
from tolerances import (
    EXP2_ULPS,
    EXPONENT_ROUNDINGS,
    INT8_READOUT_FLIP_SHARE,
    INT8_READOUT_FLIPS,
    INT8_READOUT_SQNR_DB,
    SOFTPLUS_ULPS,
    assert_equal,
    assert_float_close,
)

IN_SEQUENCE = 10**6  # a chunk_size that no test sequence reaches
BY_TOKEN = {"x", "dt", "B", "C", "z", "addend"}  # (batch, seqlen, .)
WALK = {"initial_state", "reverse", "order", "addend"}  # what the update has not
READOUTS = ["float", "int8", "rotated"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def arguments_of(case, generator, readout="float"):
    arguments = case.make(generator)
    return arguments if readout == "float" else with_int8_readout(arguments, readout == "rotated")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case, ops, generator):
    arguments = case.make(generator)
    y, state = ops.selective_scan(**arguments, chunk_size=case.chunk_size, dtype=case.dtype)
    expected_y, expected_state = reference.selective_scan(**arguments)
    plain_y, plain_state = reference.selective_scan(**arguments, precision=torch.float32)
    assert y.dtype == case.dtype
    assert y.is_contiguous()
    assert_float_close(y, expected_y, plain_y.to(case.dtype))
    assert_float_close(state, expected_state, plain_state)


READOUT_CASES = [
    ScanCase("seqlen70", seqlen=70, dim=40),
    ScanCase("reverse", seqlen=40, reverse=True, dtype=torch.bfloat16),
    ScanCase("dstate8", seqlen=40, dstate=8),
    ScanCase("dstate64", seqlen=12, dstate=64),
    ScanCase("dstate1", seqlen=40, dstate=1),
    ScanCase("chunks", seqlen=70, chunk_size=16),
    ScanCase("plain", seqlen=64, optional=False, z_dtype=None, state=False),
]


@pytest.mark.parametrize("readout", ["int8", "rotated"])
@pytest.mark.parametrize("case", READOUT_CASES, ids=lambda case: case.name)
def test_int8_readout_equals_reference(case, readout, ops, generator):
    arguments = arguments_of(case, generator, readout)
    y, state = ops.selective_scan(**arguments, chunk_size=case.chunk_size, dtype=case.dtype)
    expected, expected_state = reference.selective_scan(**arguments)
    _, plain_state = reference.selective_scan(**arguments, precision=torch.float32)
    assert_float_close(state, expected_state, plain_state)
    # What one step of one qh may change, in units of y: C's largest integer, and the gate.
    gate = 1.0
    if arguments["z"] is not None:
        z = arguments["z"] * arguments["z_scale"]
        gate = z * torch.sigmoid(arguments["gate_scale"] * z)
    flip = 127 * arguments["readout_scale"] * arguments["C_scale"] * gate
    error = (y.double() - expected).abs()
    rounding = 8 * torch.finfo(y.dtype).eps * expected.abs().max()
    assert (error <= INT8_READOUT_FLIPS * flip.abs() + rounding).all()
    assert (error > rounding).double().mean() <= INT8_READOUT_FLIP_SHARE


@pytest.mark.parametrize("readout", ["int8", "rotated"])
def test_int8_readout_is_close_to_the_float_readout(readout, ops, generator):
    case = ScanCase("", seqlen=130, dim=64, optional=False, z_dtype=None, state=False)
    arguments = arguments_of(case, generator, readout)
    y, _ = ops.selective_scan(**arguments)
    float_readout = {
        k: v for k, v in arguments.items() if k not in {"readout_scale", "rotate_state"}
    }
    if readout == "rotated":  # a C that has been rotated with the state reads the plain state
        norm = reference.hadamard(16) / 4
        float_readout["C"] = (arguments["C"].double() * arguments["C_scale"] @ norm).float()
        float_readout["C_scale"] = None
    expected, _ = reference.selective_scan(**float_readout)
    noise = (y - expected).square().mean()
    assert 10 * torch.log10(expected.square().mean() / noise) > INT8_READOUT_SQNR_DB


@pytest.mark.parametrize("dstate", [1, 4, 16, 64])
@pytest.mark.parametrize("rotate_state", [False, True])
def test_int8_readout_is_exact_on_exact_states(dstate, rotate_state, ops, generator):
    """softplus(32) is 32 and exp(0) is 1 in float32, so that with powers of two as scales every
    state is an integer times 2^-8: products, ties and saturation of the read-out must come out
    exactly."""
    batch, seqlen, dim = 2, 30, 37
    x, B = (
        inputs.int8((batch, seqlen, dim), generator) // 4,
        inputs.int8((batch, seqlen, dstate), generator) // 16,
    )
    C = inputs.int8((batch, seqlen, dstate), generator)
    exponent = torch.randint(-8, 4, (dim,), generator=generator)
    scale = torch.exp2(exponent.float())
    y, state = ops.selective_scan(
        x, torch.full((dim,), 2.0**-9), None, torch.full((batch, seqlen, dim), 32.0), None,
        torch.zeros(dstate, dim), B, torch.full((dstate,), 2.0**-4), C, torch.tensor([0.5]),
        readout_scale=scale, rotate_state=rotate_state,
    )  # fmt: skip
    h = (x.double()[:, :, None] * B.double()[..., None]).cumsum(1) * 2.0**-8
    assert_equal(state, h[:, -1].float())
    if rotate_state:
        h = torch.einsum("btnd,nm->btmd", h, reference.hadamard(dstate)) / dstate**0.5
    steps = h / scale
    assert (steps.abs() > 127).any()
    assert (steps % 1 == 0.5).any()
    qh = torch.round(steps).clamp(-127, 127)
    assert_equal(y.double(), (qh * C.double()[..., None]).sum(2) * scale * 0.5)


def state_of_one_token(ops, dt, x, A, initial_state):
    """The state after one token of one state per channel, with B 1 and all scales 1."""
    one, dim = torch.ones(1), dt.numel()
    B = torch.ones(1, 1, 1, dtype=torch.int8)
    _, state = ops.selective_scan(
        torch.full((1, 1, dim), x, dtype=torch.int8), torch.ones(dim), None, dt.view(1, 1, dim), None,
        A.view(1, dim), B, one, B, one, initial_state=initial_state.view(1, 1, dim),
    )  # fmt: skip
    return state.flatten()


def ulps(actual, expected):
    """The error in units in the last place of float32 at `expected`, which is float64."""
    return (actual.double() - expected).abs() / torch.exp2(torch.frexp(expected).exponent - 24.0)


def test_the_step_size_is_precise_to_the_last_bits(ops):
    if ops.name.startswith("cuda"):
        pytest.skip("has its own arithmetic")
    dt = torch.cat([torch.linspace(-80, 80, 40001), torch.linspace(-4, 4, 40001)])
    zeros = torch.zeros_like(dt)
    step = state_of_one_token(ops, dt, 1, zeros, zeros)
    expected = torch.log1p(torch.exp(-dt.double().abs())) + dt.double().clamp(min=0)
    assert ulps(step, expected).max() <= SOFTPLUS_ULPS


def test_a_decay_is_precise_to_the_last_bits(ops):
    """softplus(32) is 32 in float32, and from a state of 1 without an input the decay is what is left."""
    if ops.name.startswith("cuda"):
        pytest.skip("has its own arithmetic")
    A = -torch.cat([torch.linspace(0, 2.6, 40001), torch.linspace(0, 0.05, 40001)])
    decay = state_of_one_token(ops, torch.full_like(A, 32.0), 0, A, torch.ones_like(A))
    exponent = 32 * A.double()
    moved = EXPONENT_ROUNDINGS * exponent.abs() * 2.0**-24 * torch.exp(exponent)
    last_place = torch.exp2(torch.frexp(torch.exp(exponent)).exponent - 24.0)
    assert (ulps(decay, torch.exp(exponent)) <= EXP2_ULPS + moved / last_place).all()
    assert (decay[A == 0] == 1).all()


@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 4, 8, 16]),
    st.sampled_from(READOUTS), st.booleans(), st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_a_split_sequence_equals_the_whole(
    ops, batch, seqlen, dim, dstate, readout, reverse, seed, data
):
    cut = data.draw(st.integers(0, seqlen))
    case = ScanCase("", batch, seqlen, dim, dstate, reverse=reverse)
    arguments = arguments_of(case, seeded(seed), readout)
    y, final_state = ops.selective_scan(**arguments, chunk_size=IN_SEQUENCE)
    state = arguments.pop("initial_state")
    results = [None, None]
    for i in (1, 0) if reverse else (0, 1):
        tokens = slice(cut, None) if i == 1 else slice(0, cut)
        piece = {
            k: v[:, tokens] if k in {"x", "dt", "B", "C", "z"} else v for k, v in arguments.items()
        }
        results[i], state = ops.selective_scan(**piece, initial_state=state, chunk_size=IN_SEQUENCE)
    assert_equal(torch.cat(results, 1), y)
    assert_equal(state, final_state)


def update_arguments(arguments, t):
    """The arguments of one step, without the state."""
    arguments = {k: v for k, v in arguments.items() if k not in WALK}
    return {k: v[:, t] if k in {"x", "dt", "B", "C", "z"} else v for k, v in arguments.items()}


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dstate", [8, 16])
def test_updates_equal_the_full_sequence(readout, dstate, ops, generator):
    for dim in (1, 16, 37):
        arguments = arguments_of(ScanCase("", 3, 12, dim, dstate), generator, readout)
        y, final_state = ops.selective_scan(**arguments, chunk_size=IN_SEQUENCE)
        state = arguments["initial_state"].clone()
        for t in range(12):
            assert_equal(
                ops.selective_scan_update(state, **update_arguments(arguments, t)), y[:, t]
            )
        assert_equal(state, final_state)


@pytest.mark.parametrize("readout", READOUTS)
def test_batch_and_thread_invariance(readout, ops, generator):
    arguments = arguments_of(ScanCase("", 4, 70, 100), generator, readout)
    y, state = ops.selective_scan(**arguments, chunk_size=IN_SEQUENCE)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_equal(ops.selective_scan(**arguments, chunk_size=IN_SEQUENCE)[0], y)
    finally:
        torch.set_num_threads(threads)
    for b in range(4):
        one = {k: v[b : b + 1] if getattr(v, "ndim", 0) == 3 else v for k, v in arguments.items()}
        y_one, state_one = ops.selective_scan(**one, chunk_size=IN_SEQUENCE)
        assert_equal(y_one, y[b : b + 1])
        assert_equal(state_one, state[b : b + 1])


def test_reverse_is_the_walk_over_the_flipped_sequence(ops, generator):
    arguments = ScanCase("", seqlen=70, dim=40).make(generator)
    y, state = ops.selective_scan(**arguments, chunk_size=IN_SEQUENCE)
    flipped = {k: v.flip(1) if k in {"x", "dt", "B", "C", "z"} else v for k, v in arguments.items()}
    y_flipped, state_flipped = ops.selective_scan(
        **{**flipped, "reverse": True}, chunk_size=IN_SEQUENCE
    )
    assert_equal(y_flipped.flip(1), y)
    assert_equal(state_flipped, state)


@pytest.mark.parametrize("chunk_size", [IN_SEQUENCE, 0, 16])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dstate", [4, 16])
def test_the_order_of_storage_changes_nothing(dstate, readout, chunk_size, ops, generator):
    case = ScanCase("", seqlen=70, dim=40, dstate=dstate, addend_dtype=torch.float32)
    arguments = arguments_of(case, generator, readout)
    expected = ops.selective_scan(**arguments, chunk_size=chunk_size)
    arguments["order"] = torch.arange(70, dtype=torch.int32)
    for actual, wanted in zip(
        ops.selective_scan(**arguments, chunk_size=chunk_size), expected, strict=True
    ):
        assert_equal(actual, wanted)


@pytest.mark.parametrize("chunk_size", [IN_SEQUENCE, 0, 16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("case", [
    ScanCase("random", seqlen=70, dim=40, order="random", addend_dtype=torch.float16),
    ScanCase("transposed", seqlen=70, dim=40, order="transposed", view=True),
    ScanCase("random-dstate4", seqlen=70, dim=40, dstate=4, order="random", dtype=torch.float16),
    ScanCase("no-z", seqlen=35, dim=17, z_dtype=None, order="random", addend_dtype=torch.float32),
    ScanCase("blocks", seqlen=530, dim=72, order="random", addend_dtype=torch.bfloat16),
], ids=lambda case: case.name)  # fmt: skip
def test_an_order_is_a_gather_before_and_a_scatter_after(
    case, readout, reverse, chunk_size, ops, generator
):
    """The same operations on the same values, in chunks too: equal bits."""
    arguments = {**arguments_of(case, generator, readout), "reverse": reverse}
    y, state = ops.selective_scan(**arguments, chunk_size=chunk_size, dtype=case.dtype)
    order = arguments.pop("order").long()
    gathered = {
        k: v[:, order] if k in BY_TOKEN and v is not None else v for k, v in arguments.items()
    }
    expected, expected_state = ops.selective_scan(
        **gathered, chunk_size=chunk_size, dtype=case.dtype
    )
    assert_equal(y[:, order], expected)
    assert_equal(state, expected_state)


def test_the_walk_of_a_transposed_grid_is_that_of_the_transposed_image(ops, generator):
    arguments = ScanCase("", seqlen=14 * 10, dim=24).make(generator)
    order = torch.arange(140, dtype=torch.int32).view(14, 10).T.contiguous().flatten()
    y, state = ops.selective_scan(**{**arguments, "order": order}, chunk_size=IN_SEQUENCE)

    def transposed(image, height, width):
        grid = image.unflatten(1, (height, width))
        return grid.transpose(1, 2).contiguous().flatten(1, 2)

    columns = {
        k: transposed(v, 14, 10) if k in BY_TOKEN and v is not None else v
        for k, v in arguments.items()
    }
    expected, expected_state = ops.selective_scan(**columns, chunk_size=IN_SEQUENCE)
    assert_equal(y, transposed(expected, 10, 14))
    assert_equal(state, expected_state)


def test_reverse_walks_the_order_backwards(ops, generator):
    arguments = ScanCase("", seqlen=70, dim=40, order="random").make(generator)
    order = arguments.pop("order")
    y, state = ops.selective_scan(
        **{**arguments, "reverse": True}, order=order, chunk_size=IN_SEQUENCE
    )
    expected, expected_state = ops.selective_scan(
        **arguments, order=order.flip(0), chunk_size=IN_SEQUENCE
    )
    assert_equal(y, expected)
    assert_equal(state, expected_state)


@pytest.mark.parametrize("dstate", [4, 16])
def test_a_step_at_no_token_is_left_out_where_values_are_not_checked(dstate, ops, generator):
    if ops.name != "cuda":
        pytest.skip("the values of an order are checked here")
    case = ScanCase(
        "", seqlen=70, dim=40, dstate=dstate, order="random", addend_dtype=torch.float32
    )
    arguments = case.make(generator)
    order = arguments.pop("order")
    some = torch.ones(70, dtype=torch.bool)
    some[[3, 40, 69]] = False
    visited = order[some].long()
    order[~some] = torch.tensor([-1, 70, 2**31 - 1], dtype=torch.int32)
    y, state = ops.selective_scan(**arguments, order=order, chunk_size=IN_SEQUENCE)
    gathered = {k: v[:, visited] if k in BY_TOKEN else v for k, v in arguments.items()}
    expected, expected_state = ops.selective_scan(**gathered, chunk_size=IN_SEQUENCE)
    assert_equal(y[:, visited], expected)
    assert_equal(state, expected_state)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dstate", [4, 16])
def test_an_addend_joins_y_before_the_gate(dstate, readout, ops, generator):
    case = ScanCase("", seqlen=20, dim=40, dstate=dstate, z_dtype=None, addend_dtype=torch.float32)
    arguments = arguments_of(case, generator, readout)
    addend = arguments.pop("addend")
    plain, plain_state = ops.selective_scan(**arguments)
    y, state = ops.selective_scan(**arguments, addend=addend)
    assert_equal(y, plain + addend)
    assert_equal(state, plain_state)
    # sigmoid(30) is 1 in float32: the gate is a factor of 30.
    arguments["z"] = torch.full(addend.shape, 30.0)
    gated, _ = ops.selective_scan(**arguments, addend=addend)
    assert_float_close(gated, 30 * y.double(), 30 * y)


@pytest.mark.parametrize("dtype", inputs.FLOAT_DTYPES)
@pytest.mark.parametrize("dstate", [4, 16])
def test_an_addend_may_have_any_strides_and_dtype(dstate, dtype, ops, generator):
    arguments = ScanCase("", 3, 21, 36, dstate, addend_dtype=dtype).make(generator)
    expected, _ = ops.selective_scan(**arguments)
    addend = arguments.pop("addend")
    assert_equal(ops.selective_scan(**arguments, addend=addend.float())[0], expected)
    by_token = addend.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((3, 22, 77), 99.0, dtype=dtype)
    wide[:, 1:, 5:41] = addend
    for view in (by_token, wide[:, 1:, 5:41]):
        assert_equal(ops.selective_scan(**arguments, addend=view)[0], expected)
    one_row = addend[:1, :1].expand(3, 21, 36)
    assert_equal(
        ops.selective_scan(**arguments, addend=one_row)[0],
        ops.selective_scan(**arguments, addend=one_row.contiguous())[0],
    )


def test_routes_are_merged_by_handing_on_their_sum(ops, generator):
    """Forward, backward, and both along columns: the last of them gates the sum."""
    arguments = ScanCase("", seqlen=30, dim=24).make(generator)
    gate = {k: arguments.pop(k) for k in ("z", "z_scale", "gate_scale")}
    columns = torch.arange(30, dtype=torch.int32).view(6, 5).T.contiguous().flatten()
    routes = [(order, reverse) for order in (None, columns) for reverse in (False, True)]
    walks = [{**arguments, "order": order, "reverse": reverse} for order, reverse in routes]
    sums = None
    for i, walk in enumerate(walks):
        is_last = i + 1 == len(walks)
        sums, _ = ops.selective_scan(**{**walk, **(gate if is_last else {}), "addend": sums})
    expected = sum(reference.selective_scan(**walk)[0] for walk in walks)
    plain = sum(reference.selective_scan(**walk, precision=torch.float32)[0] for walk in walks)
    z = gate["z"] * gate["z_scale"]
    factor = z.double() * torch.sigmoid((gate["gate_scale"] * z).double())
    assert_float_close(sums, expected * factor, plain * factor.float())


@pytest.mark.parametrize("chunk_size", [IN_SEQUENCE, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_causality(chunk_size, reverse, ops, generator):
    arguments = ScanCase("", batch=1, seqlen=100, dim=20, reverse=reverse).make(generator)
    before, _ = ops.selective_scan(**arguments, chunk_size=chunk_size)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][:, 41] += 50
    after, _ = ops.selective_scan(**arguments, chunk_size=chunk_size)
    unseen = slice(42, None) if reverse else slice(0, 41)
    assert_equal(after[:, unseen], before[:, unseen])
    assert (after[:, 41] != before[:, 41]).all()


@pytest.mark.parametrize("dstate", [5, 16])
def test_a_vanishing_step_keeps_the_state(dstate, ops, generator):
    arguments = ScanCase("", seqlen=20, dim=40, dstate=dstate).make(generator)
    arguments["dt"] = torch.full_like(arguments["dt"], -50.0)
    arguments["initial_state"] = (
        arguments["initial_state"].sign() + 0.3 * arguments["initial_state"].tanh()
    )
    _, state = ops.selective_scan(**arguments)
    assert_equal(state, arguments["initial_state"])


def test_is_affine_in_the_initial_state(ops, generator):
    arguments = ScanCase("", seqlen=10, dim=40, dt_dtype=torch.float32).make(generator)
    state = arguments.pop("initial_state")
    y = [
        ops.selective_scan(**arguments, initial_state=factor * state)[0]
        for factor in (0.0, 1.0, 2.0)
    ]
    assert (y[1] - y[0]).abs().max() > 0.1
    # Three results, each a few float32 roundings of its largest value away from exact.
    assert ((y[2] - y[1]) - (y[1] - y[0])).abs().max() < 32 * 1.2e-7 * y[2].abs().max()


GOOD = {**ScanCase("", dim=6, dstate=8).make(seeded(1)), "chunk_size": 0}
INT8_READOUT = {"readout_scale": torch.ones(6)}
BAD = [
    ({"x": GOOD["x"].float()}, TypeError, "expected x of dtype"),
    ({"x": GOOD["x"][0]}, ValueError, "expected x with 3 dimensions"),
    ({"x": GOOD["x"].transpose(1, 2)}, ValueError, "expected x with a contiguous last dimension"),
    ({"A": GOOD["A"][0]}, ValueError, "expected A with 2 dimensions"),
    ({"A": torch.zeros(257, 6)}, ValueError, "expected A with dstate from 1 to 256, got 257"),
    ({"A": torch.zeros(0, 6)}, ValueError, "expected A with dstate from 1 to 256, got 0"),
    ({"A": torch.zeros(8, 5)}, ValueError, r"expected A of shape \(dstate, dim\)"),
    ({"A": torch.zeros(6, 8).T}, ValueError, "expected A to be contiguous"),
    ({"x_scale": torch.ones(5)}, ValueError, "expected x_scale of shape"),
    ({"x_zero_point": torch.ones(6)}, TypeError, "expected x_zero_point of dtype"),
    ({"dt": GOOD["dt"].double()}, TypeError, "expected dt of dtype float32, float16 or bfloat16"),
    ({"dt": GOOD["dt"][:, :4]}, ValueError, "expected dt of shape that of x"),
    (
        {"dt": GOOD["dt"].transpose(1, 2).contiguous().transpose(1, 2)},
        ValueError,
        "expected dt with a contig",
    ),
    ({"dt_bias": torch.ones(5)}, ValueError, "expected dt_bias of shape"),
    ({"B": GOOD["B"].int()}, TypeError, "expected B of dtype int8, float32, float16 or bfloat16"),
    ({"B": GOOD["B"][..., :7]}, ValueError, r"expected B of shape \(..., dstate\)"),
    ({"B_scale": None}, ValueError, "expected B_scale with an int8 B, got None"),
    ({"B": GOOD["B"].float()}, ValueError, "expected B_scale None without an int8 B, got a tensor"),
    ({"B_scale": torch.ones(1)}, ValueError, r"expected B_scale of shape \(dstate,\)"),
    ({"C": GOOD["C"].double()}, TypeError, "expected C of dtype"),
    ({"C": GOOD["C"][:, 1:]}, ValueError, r"expected C of shape \(..., dstate\)"),
    ({"C_scale": None}, ValueError, "expected C_scale with an int8 C, got None"),
    ({"C_scale": torch.ones(8)}, ValueError, r"expected C_scale of shape \(1,\)"),
    ({"D": torch.ones(6).half()}, TypeError, "expected D of dtype"),
    ({"z": GOOD["z"].long()}, TypeError, "expected z of dtype"),
    ({"z": GOOD["z"][:, 1:]}, ValueError, "expected z of shape that of x"),
    ({"z_scale": None}, ValueError, "expected z_scale with an int8 z, got None"),
    ({"z_scale": torch.ones(1)}, ValueError, r"expected z_scale of shape \(dim,\)"),
    ({"gate_scale": torch.ones(1)}, ValueError, r"expected gate_scale of shape \(dim,\)"),
    ({"z": None}, ValueError, "expected z_scale and gate_scale None without z"),
    ({"rotate_state": True}, ValueError, "expected rotate_state False without readout_scale"),
    ({"readout_scale": torch.ones(1)}, ValueError, r"expected readout_scale of shape \(dim,\)"),
    (
        {**INT8_READOUT, "C": GOOD["C"].float(), "C_scale": None},
        TypeError,
        "expected C of dtype int8 with read",
    ),
    ({"initial_state": torch.zeros(2, 8, 5)}, ValueError, "expected initial_state of shape"),
    (
        {"initial_state": torch.zeros(2, 8, 6).double()},
        TypeError,
        "expected initial_state of dtype",
    ),
    ({"order": torch.arange(5)}, TypeError, "expected order of dtype Int, got Long"),
    (
        {"order": torch.arange(4, dtype=torch.int32)},
        ValueError,
        r"expected order of shape \(seqlen,\) = \[5\], got \[4\]",
    ),
    (
        {"order": torch.arange(10, dtype=torch.int32)[::2]},
        ValueError,
        r"expected order to be contiguous, got strides \[2\]",
    ),
    (
        {"order": torch.tensor([0, 1, 5, 3, 4], dtype=torch.int32)},
        ValueError,
        "expected order to hold tokens from 0 to 4, got 5 at position 2",
    ),
    (
        {"order": torch.tensor([0, 1, 2, -1, 4], dtype=torch.int32)},
        ValueError,
        "expected order to hold tokens from 0 to 4, got -1 at position 3",
    ),
    (
        {"order": torch.tensor([3, 1, 2, 0, 1], dtype=torch.int32)},
        ValueError,
        "expected order to hold each token once, got 1 again at position 4",
    ),
    (
        {"addend": torch.zeros(2, 5, 6).double()},
        TypeError,
        "expected addend of dtype float32, float16 or bfloat16",
    ),
    ({"addend": torch.zeros(2, 5, 6).char()}, TypeError, "expected addend of dtype float32"),
    ({"addend": torch.zeros(2, 4, 6)}, ValueError, "expected addend of shape that of x"),
    (
        {"addend": torch.zeros(2, 6, 5).transpose(1, 2)},
        ValueError,
        "expected addend with a contiguous last dimension",
    ),
    ({"chunk_size": -1}, ValueError, r"expected chunk_size 0 \(automatic\) or more, got -1"),
    ({"dtype": torch.float64}, TypeError, "expected dtype of dtype float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        ops.selective_scan(**{**GOOD, **change})


def test_rotation_needs_a_power_of_two(generator):
    arguments = ScanCase("", dstate=12).make(generator)
    scale = torch.ones(17)
    ops.selective_scan(**arguments, readout_scale=scale)
    with pytest.raises(
        ValueError, match="expected dstate to be a power of two with rotate_state, got 12"
    ):
        ops.selective_scan(**arguments, readout_scale=scale, rotate_state=True)


def test_bad_arguments_of_the_update_are_named(generator):
    arguments = ScanCase("", dim=6).make(generator)
    good = {"ssm_state": arguments["initial_state"], **update_arguments(arguments, 0)}
    ops.selective_scan_update(**good)
    with pytest.raises(ValueError, match="expected x with 2 dimensions"):
        ops.selective_scan_update(**{**good, "x": arguments["x"]})
    with pytest.raises(ValueError, match="expected ssm_state of shape"):
        ops.selective_scan_update(**{**good, "ssm_state": good["ssm_state"][:, :5]})
    with pytest.raises(ValueError, match="expected ssm_state to be contiguous"):
        ops.selective_scan_update(**{**good, "ssm_state": torch.zeros(2, 6, 16).transpose(1, 2)})
    with pytest.raises(TypeError, match="expected ssm_state of dtype"):
        ops.selective_scan_update(**{**good, "ssm_state": good["ssm_state"].double()})
    with pytest.raises(TypeError, match="expected dtype of dtype"):
        ops.selective_scan_update(**good, dtype=torch.int8)


def test_opcheck(generator):
    case = ScanCase("", dim=6, order="random", addend_dtype=torch.float16)
    arguments = arguments_of(case, generator, "rotated")
    names = [name for name in arguments if name not in WALK]
    shared = [arguments[name] for name in names]
    walk = [arguments["initial_state"], False, arguments["order"], arguments["addend"]]
    full = (*shared, *walk, 0, torch.float16)
    torch.library.opcheck(torch.ops.mambaquant.selective_scan, full)
    step = update_arguments(arguments, 0)
    state = arguments["initial_state"]
    update = (state, *[step[name] for name in names], torch.bfloat16)
    torch.library.opcheck(torch.ops.mambaquant.selective_scan_update, update)


def test_traces_in_one_graph(generator):
    case = ScanCase("", dim=6, order="random", addend_dtype=torch.float16)
    arguments = case.make(generator)
    traced = torch.compile(ops.selective_scan, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(traced(**arguments), ops.selective_scan(**arguments), strict=True):
        assert_equal(actual, expected)
