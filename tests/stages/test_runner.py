"""LanguageRunner and the native call below it: the bits of the operators, states, and refusals."""

import copy
import io
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mambaquant_ext
from mambaquant_ext import Fidelity, LanguageRunner, quantize_, recipe
from mambaquant_ext.routes import kernel_order
from stages import hf_models
from stages.hf_models import VOCAB, logits, new_cache, tiny_model, tokens
from stages.test_mamba_ssm import quantized_pair
from stages.test_model import PRESETS, quantized
from tolerances import assert_equal, sqnr_db

VARIANTS = {
    **{preset: {"preset": preset} for preset in PRESETS},
    "float read-out": {"state_rotation": False, "quantize_readout": False},
    "no rotation": {"state_rotation": False, "out_rotation": False},
    "float16 embedding": {"quantize_embedding": False},
    "float head": {"quantize_head": False},
    "in_proj bias": {"use_bias": True},
    "no conv bias": {"use_conv_bias": False},
    "width 3, dstate 8": {"conv_kernel": 3, "state_size": 8},
    "power of two": {"hidden_size": 32, "time_step_rank": 4},
}


def operators(model):
    """A copy of a model whose blocks call one operator after another."""
    copied = copy.deepcopy(model)
    for block in copied.backbone.layers:
        block.executor.native = None
    return copied


def pieces(runner, ids, lengths):
    """Logits and state behind ids, read in pieces of these lengths."""
    state, begin, out = runner.new_state(ids.shape[0]), 0, None
    for length in lengths:
        out = runner.forward(ids[:, begin : begin + length].contiguous(), state)
        begin += length
    assert begin == ids.shape[1]
    return out, state


def assert_states_equal(a, b):
    assert_equal(a.conv, b.conv)
    assert_equal(a.ssm, b.ssm)


# The same bits


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_give_the_bits_of_their_operators(variant):
    model = quantized(**VARIANTS[variant])
    ids = tokens(3, 150)
    assert all(block.executor.native is not None for block in model.backbone.layers)
    assert_equal(logits(model, ids), logits(operators(model), ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_tokens_give_the_bits_of_their_operators(variant):
    model, ids = quantized(**VARIANTS[variant]), tokens(2, 20)
    lengths = [9, 1, 1, 8, 1]
    assert_equal(
        hf_models.in_pieces(model, ids, lengths),
        hf_models.in_pieces(operators(model), ids, lengths),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_is_the_models(variant):
    model, ids = quantized(**VARIANTS[variant]), tokens(2, 140)
    streams = []
    hook = model.backbone.norm_f.register_forward_pre_hook(
        lambda _, inputs: streams.append(inputs[0])
    )
    expected = logits(model, ids)[:, -1]
    hook.remove()
    runner = LanguageRunner(model)
    state, last = runner.new_state(2), torch.empty(2, model.config.hidden_size)
    runner.blocks.forward(ids, state.conv, state.ssm, last=last)
    assert_equal(last, streams[0][:, -1])
    got = runner.forward(ids, runner.new_state(2))
    assert got.shape == (2, VOCAB)
    assert got.dtype == torch.float32
    # The head's norm is torch's there and the kernel's here.
    assert sqnr_db(got, expected) > 60


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 64, 129]), min_size=1, max_size=5),
    batch=st.sampled_from([1, 2, 5]),
    threads=st.sampled_from([1, 3]),
)
def test_pieces_sequences_and_threads_change_no_bit(lengths, batch, threads):
    runner, ids = LanguageRunner(quantized()), tokens(batch, sum(lengths))
    expected, whole = pieces(runner, ids, [ids.shape[1]])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, state = pieces(runner, ids, lengths)
        alone, _ = pieces(runner, ids[-1:], lengths)
    finally:
        torch.set_num_threads(before)
    assert_equal(out, expected)
    assert_states_equal(state, whole)
    assert_equal(alone[0], expected[-1])


def test_a_long_prompt_in_chunks():
    """More tokens than go through a layer at a time."""
    runner, ids = LanguageRunner(quantized()), tokens(1, 1100)
    expected, whole = pieces(runner, ids, [1100])
    out, state = pieces(runner, ids, [550, 1, 549])
    assert_equal(out, expected)
    assert_states_equal(state, whole)


def test_isas_agree(isa):
    with mambaquant_ext.forced_isa(isa):
        model = tiny_model()
        quantize_(model, hf_models.calibration(), recipe("w8a8"))
        runner = LanguageRunner(model)
        got = runner.forward(tokens(2, 50), runner.new_state(2))
        assert sqnr_db(got, logits(operators(model), tokens(2, 50))[:, -1]) > 60


def test_mamba_ssm_blocks():
    model, _ = quantized_pair()
    runner, ids = LanguageRunner(model), tokens(2, 30)
    got = runner.forward(ids, runner.new_state(2))
    assert sqnr_db(got, model(ids).logits[:, -1]) > 60


# What else is going on around a call


def traced_by_jit(block, x):
    return torch.jit.trace(block, (x,), check_trace=False)(x + 1)


def on_a_batch(block, x):
    return torch.vmap(block)((x + 1)[None])[0]


@pytest.mark.parametrize("seen", [traced_by_jit, on_a_batch])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_and_a_batch_are_of_operators(seen):
    block = copy.deepcopy(quantized().backbone.layers[0])
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    assert_equal(seen(block, x), block(x + 1))


class Recorder(TorchDispatchMode):
    """Writes down which operators are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_what_records_operators_sees_a_blocks():
    block, x = quantized().backbone.layers[0], torch.randn(2, 5, 48)
    with Recorder() as recorder:
        got = block(x)
    assert "mambaquant::selective_scan" in recorder.names
    assert_equal(got, block(x))


def test_shapes_are_known_without_a_call():
    block = copy.deepcopy(quantized().backbone.layers[0])
    kernel_order.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert block(torch.empty(2, 5, 48)).shape == (2, 5, 48)


@pytest.mark.parametrize("shape", [(0, 5, 48), (2, 0, 48)])
def test_no_token_gives_no_token(shape):
    model = quantized()
    assert model.backbone.layers[0](torch.empty(shape)).shape == shape
    cached = new_cache(model)
    model.backbone.layers[0](torch.randn(2, 3, 48), cached)
    before = cached.layers[0].recurrent_states[0].clone()
    if shape[0] == 2:
        model.backbone.layers[0](torch.empty(shape), cached)
        assert_equal(cached.layers[0].recurrent_states[0], before)


@pytest.mark.parametrize("variant", ["w8a8", "float head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_is_not_asked(variant, dtype):
    model, ids = copy.deepcopy(quantized(**VARIANTS[variant])), tokens(2, 9)
    runner = LanguageRunner(model)
    expected, whole = runner.forward(ids, runner.new_state(2)), logits(model, ids)
    torch.set_default_dtype(dtype)
    try:
        model = copy.deepcopy(model)
        runner = LanguageRunner(model)
        assert_equal(runner.forward(ids, runner.new_state(2)), expected)
        assert_equal(logits(model, ids), whole)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("variant", ["w8a8", "float head"])
def test_the_default_device_is_not_asked(variant):
    model, ids = quantized(**VARIANTS[variant]), tokens(2, 9)
    runner = LanguageRunner(model)
    expected, whole = runner.forward(ids, runner.new_state(2)), model.backbone(ids)[0]
    with torch.device("meta"):
        got = runner.forward(ids, runner.new_state(2))
        stream = model.backbone(ids, use_cache=False)[0]
    assert_equal(got, expected)
    assert_equal(stream, whole)


@pytest.mark.parametrize("variant", ["w8a8", "float head"])
def test_inference_mode_may_end_between_calls(variant):
    runner, ids = LanguageRunner(quantized(**VARIANTS[variant])), tokens(2, 9)
    with torch.inference_mode():
        state = runner.new_state(2)
        first = runner.forward(ids, state)
    expected = first.clone()
    state.reset()
    assert_equal(runner.forward(ids, state, first), expected)


# States


def test_a_state_can_be_copied_reset_and_gone_on_from():
    runner, ids = LanguageRunner(quantized()), tokens(1, 30)
    state = runner.new_state()
    assert state.batch == 1
    runner.forward(ids[:, :20].contiguous(), state)
    other = state.copy()
    first = runner.forward(ids[:, 20:].contiguous(), state)
    assert_equal(runner.forward(ids[:, 20:].contiguous(), other), first)
    state.reset()
    assert_states_equal(state, runner.new_state())


def test_out_is_written_and_returned():
    runner, ids = LanguageRunner(quantized()), tokens(2, 5)
    out = torch.full((2, VOCAB), torch.nan)
    got = runner.forward(ids, runner.new_state(2), out)
    assert got is out
    assert_equal(out, runner.forward(ids, runner.new_state(2)))


def test_threads_may_share_a_runner():
    runner, ids = LanguageRunner(quantized()), tokens(1, 200)
    expected = runner.forward(ids, runner.new_state())
    results = [None] * 4

    def read(index):
        results[index] = runner.forward(ids, runner.new_state())

    workers = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        assert_equal(result, expected)


def test_a_model_that_ran_can_be_copied_and_stored():
    model, ids = copy.deepcopy(quantized()), tokens(1, 9)
    expected = logits(model, ids)
    assert_equal(logits(copy.deepcopy(model), ids), expected)
    file = io.BytesIO()
    torch.save(model.backbone.layers[0], file)
    file.seek(0)
    block = torch.load(file, weights_only=False)
    x = torch.randn(1, 5, model.config.hidden_size)
    assert_equal(block(x), model.backbone.layers[0](x))


# Refusals


def test_models_that_it_cannot_run():
    with pytest.raises(
        ValueError, match=r"expected a language model with backbone.layers, got Linear"
    ):
        LanguageRunner(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="QuantEmbedding, got Embedding; quantize the model first"):
        LanguageRunner(tiny_model())
    with pytest.raises(ValueError, match=r"expected Fidelity.INTEGER in block 0"):
        LanguageRunner(quantized(fidelity=Fidelity.EMULATED))
    model = copy.deepcopy(quantized())
    model.backbone.layers[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match="block 1 to be a QuantMambaBlock, got Identity"):
        LanguageRunner(model)
    model = operators(quantized())
    with pytest.raises(ValueError, match="got another structure in block 0"):
        LanguageRunner(model)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "at least one sequence of one token"),
        (torch.zeros(3, dtype=torch.int64), ValueError, "ids with 2 dimensions"),
        (torch.zeros(1, 3, dtype=torch.int32), TypeError, "int64"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, "conv_state of shape"),
        (torch.full((1, 3), VOCAB), IndexError, f"ids below {VOCAB}, got {VOCAB}"),
        (torch.full((1, 3), -1), IndexError, f"ids below {VOCAB}, got -1"),
        (torch.zeros(3, 1, dtype=torch.int64).T, None, None),
        (torch.zeros(1, 6, dtype=torch.int64)[:, ::2], ValueError, "contiguous"),
    ],
    ids=str,
)
def test_ids_are_checked_and_nothing_is_lost(ids, error, message):
    runner = LanguageRunner(quantized())
    state = runner.new_state()
    runner.forward(tokens(1, 4), state)
    before = state.copy()
    if error is None:
        runner.forward(ids, state)
        return
    with pytest.raises(error, match=message):
        runner.forward(ids, state)
    assert_states_equal(state, before)


def test_states_and_outputs_are_checked():
    runner, ids = LanguageRunner(quantized()), tokens(1, 4)
    with pytest.raises(ValueError, match="batch of at least 1, got 0"):
        runner.new_state(0)
    with pytest.raises(ValueError, match=r"logits of shape \(batch, vocab\)"):
        runner.forward(ids, runner.new_state(), torch.empty(1, VOCAB + 1))
    with pytest.raises(TypeError, match="logits of dtype Float"):
        runner.forward(ids, runner.new_state(), torch.empty(1, VOCAB, dtype=torch.float64))


def test_an_output_is_checked_before_a_float_head_too():
    runner, ids = LanguageRunner(quantized(quantize_head=False)), tokens(1, 4)
    state = runner.new_state()
    with pytest.raises(
        ValueError, match=r"out of shape \(batch, vocab\) = \(1, 61\), got \(3, 61\)"
    ):
        runner.forward(ids, state, torch.empty(3, VOCAB))
    with pytest.raises(TypeError, match=r"out of dtype float32, got torch\.float64"):
        runner.forward(ids, state, torch.empty(1, VOCAB, dtype=torch.float64))
    assert_states_equal(state, runner.new_state())


def test_another_instruction_set_is_refused():
    if len(mambaquant_ext.supported_isas()) < 2:
        pytest.skip("one instruction set")
    runner = LanguageRunner(quantized())
    other = next(i for i in mambaquant_ext.supported_isas() if i != mambaquant_ext.current_isa())
    with (
        mambaquant_ext.forced_isa(other),
        pytest.raises(NotImplementedError, match="load the model again"),
    ):
        runner.forward(tokens(1, 4), runner.new_state())


def test_missing_and_wrong_tensors_are_named():
    native = torch.classes.mambaquant.LanguageModel
    sizes = {"hidden": 8, "dim": 16, "dstate": 4, "dt_rank": 2, "width": 4, "blocks": 1}
    with pytest.raises(ValueError, match=r"expected a tensor blocks.0.in_scale, got none"):
        native(sizes, 0, 1e-5, False, False, {})
    wrong = {"blocks.0.in_scale": torch.ones(2)}
    with pytest.raises(ValueError, match=r"expected blocks.0.in_scale of shape"):
        native(sizes, 0, 1e-5, False, False, wrong)
    with pytest.raises(ValueError, match="a size hidden of at least 1"):
        native({}, 0, 1e-5, False, False, {})
    with pytest.raises(ValueError, match="expected dim of"):
        native({**sizes, "dim": 17}, 0, 1e-5, True, False, {})
