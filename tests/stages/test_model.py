"""A quantized transformers model: its contract, caches, padding, batches, generation, and its closeness to float."""

import copy
import dataclasses
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaForCausalLM
from transformers.modeling_outputs import ModelOutput

from mambaquant_ext import Fidelity, Recipe, quantize_, recipe
from mambaquant_ext.model.checkpoint import load_float_model
from stages import hf_models
from stages.hf_models import VOCAB, in_pieces, logits, new_cache, tiny_model, tokens
from tolerances import MODEL_SQNR_DB, MODEL_TOP1, assert_equal, sqnr_db

REAL_MODEL = Path(__file__).parents[1] / "data" / "mamba-lm-docs"
PRESETS = ["w8a8", "rtn", "smoothquant", "quarot"]


@cache
def quantized(preset="w8a8", fidelity=Fidelity.INTEGER, **changes):
    """One model of each kind for all tests here: none of them changes it."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    model = tiny_model(**{name: value for name, value in changes.items() if name not in names})
    switches = {name: value for name, value in changes.items() if name in names}
    quantize_(model, hf_models.calibration(), recipe(preset).replace(**switches), fidelity)
    return model


# The contract of transformers.MambaForCausalLM


def test_class_and_outputs_are_those_of_the_float_model():
    float_model, model, ids = tiny_model(), quantized(), tokens(2, 7)
    assert type(model) is MambaForCausalLM
    out, expected = model(ids), float_model(ids)
    assert isinstance(out, ModelOutput)
    assert type(out) is type(expected)
    assert set(out.keys()) == set(expected.keys())
    assert out.logits.shape == expected.logits.shape
    assert out.logits.dtype == expected.logits.dtype == torch.float32
    assert not out.logits.requires_grad


def test_labels_hidden_states_tuple_and_logits_to_keep_work():
    model, ids = quantized(), tokens(2, 7)
    full = logits(model, ids)
    out = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    assert float(out.loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    )
    assert len(out.hidden_states) == len(model.backbone.layers) + 1
    assert_equal(model(ids, return_dict=False, use_cache=False)[0], full)
    assert_equal(model(ids, logits_to_keep=2, use_cache=False).logits, full[:, -2:])


def test_inputs_embeds_equal_input_ids():
    model, ids = quantized(), tokens(2, 7)
    embeds = model.get_input_embeddings()(ids)
    assert embeds.dtype == torch.float32
    assert_equal(model(inputs_embeds=embeds, use_cache=False).logits, logits(model, ids))


@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_half_hidden_states_equal_their_float32_values(fidelity):
    """A block converts float16 and bfloat16 exactly."""
    model = quantized(fidelity=fidelity)
    embeds = model.get_input_embeddings()(tokens(2, 7))
    for dtype in (torch.float16, torch.bfloat16):
        low = embeds.to(dtype)
        assert_equal(
            model(inputs_embeds=low, use_cache=False).logits,
            model(inputs_embeds=low.float(), use_cache=False).logits,
        )


@pytest.mark.parametrize("bad", [[[VOCAB]], [[-1]]])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(IndexError):
        quantized()(torch.tensor(bad))


# Caches


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=8)
@given(cuts=st.lists(st.integers(0, 13), max_size=4))
def test_prompt_in_any_pieces_equals_the_whole_prompt(preset, cuts):
    model, ids = quantized(preset), tokens(2, 13)
    edges = sorted({0, *cuts, 13})
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    assert_equal(in_pieces(model, ids, lengths), logits(model, ids))


@pytest.mark.parametrize("preset", PRESETS)
def test_token_by_token_equals_the_whole_prompt(preset, isa):
    model, ids = tiny_model(), tokens(3, 12)
    quantize_(model, hf_models.calibration(), recipe(preset))
    assert_equal(in_pieces(model, ids, [1] * 12), logits(model, ids))


def test_token_by_token_equals_the_whole_prompt_with_a_float_readout():
    model, ids = quantized(state_rotation=False, quantize_readout=False), tokens(3, 12)
    assert_equal(in_pieces(model, ids, [1] * 12), logits(model, ids))


@pytest.mark.parametrize("seqlen", [1, 2, 3, 4])
def test_prompt_around_the_conv_width_continues_as_the_whole(seqlen):
    """A first piece shorter than the conv's history leaves zeros in front of it."""
    model, ids = quantized(), tokens(2, 9)
    assert_equal(in_pieces(model, ids, [seqlen, 9 - seqlen]), logits(model, ids))


def test_cache_that_was_reset_starts_a_new_sequence():
    model, ids = quantized(), tokens(2, 6)
    cache = new_cache(model)
    in_pieces(model, tokens(2, 6, seed=5), [6], cache)
    cache.reset()
    assert_equal(in_pieces(model, ids, [1] * 6, cache), logits(model, ids))


@pytest.mark.parametrize("seqlen", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_cache_of_another_batch_size_is_refused(seqlen, batch, is_reset, fidelity):
    model = quantized(fidelity=fidelity)
    cache = new_cache(model)
    in_pieces(model, tokens(2, 6), [6], cache)
    if is_reset:
        cache.reset()
    with pytest.raises(ValueError, match="one batch size"):
        in_pieces(model, tokens(batch, seqlen), [seqlen], cache)


def test_cache_that_the_float_model_filled_is_refused():
    float_model, model = tiny_model(), quantized()
    cache = new_cache(float_model)
    float_model(tokens(2, 6), cache_params=cache, use_cache=True)
    with pytest.raises((ValueError, TypeError), match="expected"):
        in_pieces(model, tokens(2, 1), [1], cache)


def test_cache_that_records_the_past_is_refused():
    model = quantized()
    cache = new_cache(model)
    cache.layers[0].activate_past_recording()
    with pytest.raises(NotImplementedError, match="does not record the past"):
        in_pieces(model, tokens(2, 6), [6], cache)


def test_emulated_model_with_a_cache_is_close_to_itself_without():
    """Float sums over another length round differently; a value on a rounding boundary may move by a step."""
    model, ids = quantized(fidelity=Fidelity.EMULATED), tokens(2, 12)
    whole = logits(model, ids)
    for lengths in ([1] * 12, [5, 1, 1, 5], [12]):
        assert sqnr_db(in_pieces(model, ids, lengths), whole) >= MODEL_SQNR_DB["emulated, twice"]


# Padding and batches


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4))
@settings(max_examples=10)
def test_left_padded_batch_equals_single_sequences(lengths):
    model, width = quantized(), 9
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    batch = logits(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        if length:
            single = logits(model, ids[row : row + 1, width - length :])
            assert_equal(batch[row : row + 1, width - length :], single)
    assert batch.isfinite().all()  # rows of padding only included


def test_left_padded_batch_decodes_as_single_sequences():
    model, ids = quantized(), tokens(2, 9)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :4] = 0
    cache = new_cache(model)
    model(ids[:, :6], attention_mask=mask, cache_params=cache, use_cache=True)
    rest = in_pieces(model, ids[:, 6:], [1, 1, 1], cache)
    assert_equal(rest[:1], logits(model, ids[:1])[:, 6:])
    assert_equal(rest[1:], logits(model, ids[1:, 4:])[:, 2:])


def test_masked_single_token_leaves_a_fresh_state_alone():
    """Padding that arrives one token at a time: as if it were not there."""
    model, ids = quantized(), tokens(1, 5)
    cache = new_cache(model)
    for t in range(2):
        model(
            ids[:, t : t + 1], attention_mask=torch.zeros(1, 1), cache_params=cache, use_cache=True
        )
    assert_equal(in_pieces(model, ids[:, 2:], [3], cache), logits(model, ids[:, 2:]))


def test_right_padding_leaves_the_tokens_before_it_alone():
    model, ids = quantized(), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    assert_equal(logits(model, ids, attention_mask=mask)[:1, :5], logits(model, ids[:1, :5]))


def test_padding_content_is_never_read():
    model, ids = quantized(use_bias=True), tokens(1, 9)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    other = torch.cat([tokens(1, 4, seed=9), ids[:, 4:]], 1)
    assert_equal(
        logits(model, other, attention_mask=mask)[:, 4:],
        logits(model, ids, attention_mask=mask)[:, 4:],
    )


def test_mask_of_ones_equals_no_mask():
    model, ids = quantized(), tokens(3, 9)
    for dtype in (torch.int64, torch.bool, torch.float32):
        mask = torch.ones(3, 9, dtype=dtype)
        assert_equal(logits(model, ids, attention_mask=mask), logits(model, ids))


@pytest.mark.parametrize("batch", [2, 3, 16, 64])
def test_a_sequence_does_not_depend_on_its_batch(batch):
    model, ids = quantized(), tokens(batch, 6)
    whole = torch.cat([logits(model, ids), in_pieces(model, ids, [5, 1])])
    for row in {0, batch // 2, batch - 1}:
        single = logits(model, ids[row : row + 1])
        assert_equal(whole[row : row + 1], single)
        assert_equal(whole[batch + row : batch + row + 1], single)


@pytest.mark.parametrize("threads", [2, 3])
def test_result_does_not_depend_on_the_number_of_threads(threads):
    model, ids = quantized(), tokens(1, 70)
    before = torch.get_num_threads()
    expected = logits(model, ids)
    torch.set_num_threads(threads)
    try:
        assert_equal(logits(model, ids), expected)
        assert_equal(in_pieces(model, ids, [40, 30]), expected)
    finally:
        torch.set_num_threads(before)


# Generation


def greedy(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_a_loop_without_cache(use_cache):
    model, ids = quantized(), tokens(2, 5)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
    )
    assert_equal(generated, greedy(model, ids, 6))


def test_greedy_generation_of_a_left_padded_batch_equals_single_prompts():
    model, ids = quantized(), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert_equal(generated[:1, 3:], greedy(model, ids[:1, 3:], 6))
    assert_equal(generated[1:], greedy(model, ids[1:], 6))


def test_beam_search_with_cache_equals_beam_search_without():
    """Needs reorder_cache: beams swap places between tokens."""
    model, ids = quantized(tie_word_embeddings=False), tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "num_beams": 3}
    with_cache = model.generate(ids, do_sample=False, use_cache=True, **options)
    assert_equal(with_cache, model.generate(ids, do_sample=False, use_cache=False, **options))
    assert not torch.equal(with_cache, greedy(model, ids, 6))  # or no beam ever moved


# Dtypes, copies, modes


@pytest.mark.parametrize("preset", ["w8a8", "rtn"])
@pytest.mark.parametrize(
    "cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double]
)
def test_casting_the_model_changes_nothing(preset, cast):
    model, ids = copy.deepcopy(quantized(preset)), tokens(2, 7)
    assert_equal(logits(cast(model), ids), logits(quantized(preset), ids))
    assert all(
        tensor.dtype in (torch.float32, torch.int8, torch.int32)
        for tensor in model.state_dict().values()
    )


def test_copy_of_a_model_computes_the_same_by_itself():
    model, ids = tiny_model(), tokens(2, 7)
    quantize_(model, hf_models.calibration(), recipe("w8a8"))
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    for buffer in model.buffers():
        buffer.zero_()
    assert_equal(logits(twin, ids), expected)


def test_train_mode_changes_nothing():
    model, ids = copy.deepcopy(quantized()), tokens(2, 7)
    assert_equal(logits(model.train(), ids), logits(quantized(), ids))


def test_model_of_bfloat16_weights_is_quantized_as_its_float32_values():
    low = tiny_model().bfloat16()
    same = copy.deepcopy(low).float()
    for model in (low, same):
        quantize_(model, hf_models.calibration(), recipe("w8a8"))
    assert_equal(logits(low, tokens(2, 7)), logits(same, tokens(2, 7)))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_ends_in_int8_or_float_stay_close_to_the_float_model(head, embedding, fidelity):
    model = quantized(fidelity=fidelity, quantize_head=head, quantize_embedding=embedding)
    ids = tokens(2, 20)
    assert model.backbone.embeddings.weight.dtype == (torch.int8 if embedding else torch.float16)
    assert model.lm_head.q_weight.dtype == (torch.int8 if head else torch.float32)
    assert sqnr_db(logits(model, ids), logits(tiny_model(), ids)) >= MODEL_SQNR_DB["tiny w8a8"]


@pytest.mark.parametrize("changes", [{"use_bias": True}, {"use_conv_bias": False}], ids=str)
@pytest.mark.parametrize("preset", ["w8a8", "quarot"])
def test_biases_of_the_linears_and_none_of_the_conv_are_kept(changes, preset):
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = logits(tiny_model(**changes), ids)
    assert (
        sqnr_db(logits(quantized(preset, **changes), ids), expected)
        >= MODEL_SQNR_DB[f"tiny {preset}"]
    )


def test_untied_head_is_quantized_from_its_own_weight():
    ids, expected = tokens(2, 20), logits(tiny_model(tie_word_embeddings=False), tokens(2, 20))
    actual = logits(quantized(tie_word_embeddings=False), ids)
    assert sqnr_db(actual, expected) >= MODEL_SQNR_DB["tiny w8a8"]


# What cannot be quantized leaves the model as it was


def refused(model, error, match, chosen=None, fidelity=Fidelity.INTEGER, batches=None):
    before = copy.deepcopy(model)
    chosen = recipe("w8a8") if chosen is None else chosen
    batches = hf_models.calibration(vocab=model.config.vocab_size) if batches is None else batches
    with pytest.raises(error, match=match):
        quantize_(model, batches, chosen, fidelity)
    ids = tokens(1, 5)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert model.config.to_dict() == before.config.to_dict()
    with torch.no_grad():
        assert_equal(model(ids).logits, before(ids).logits)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"hidden_size": 46}, "46"),
        ({"state_size": 12}, "12"),
        ({"conv_kernel": 5}, r"width 2, 3 or 4.*5"),
        ({"state_size": 272}, "272"),
        ({"hidden_act": "relu"}, "silu"),
    ],
    ids=str,
)
def test_model_of_an_unsupported_kind_is_refused_unchanged(sizes, match):
    refused(tiny_model(**sizes), ValueError, match)


@pytest.mark.parametrize("preset", ["w8a8", "quarot"])
def test_a_dt_rank_without_a_hadamard_matrix_is_widened(preset):
    """Eleven channels between x_proj and dt_proj become twelve, one of them zero before the rotation."""
    model, ids = tiny_model(time_step_rank=11), tokens(2, 20)
    with torch.no_grad():
        expected = logits(model, ids)
    packed = quantize_(model, hf_models.calibration(), recipe(preset))
    assert [block.layout.branches[0].dt_rank for block in packed.blocks] == [12, 12]
    assert sqnr_db(logits(model, ids), expected) >= MODEL_SQNR_DB[f"tiny {preset}"]
    assert_equal(in_pieces(model, ids, [1] * 20), logits(model, ids))


@pytest.mark.parametrize("sizes", [{"state_size": 12}, {"time_step_rank": 11}], ids=str)
def test_sizes_without_a_hadamard_matrix_work_where_nothing_rotates(sizes):
    model, ids = tiny_model(**sizes), tokens(2, 20)
    with torch.no_grad():
        expected = logits(model, ids)
    quantize_(model, hf_models.calibration(), recipe("rtn"))
    assert sqnr_db(logits(model, ids), expected) >= MODEL_SQNR_DB["tiny rtn"]
    assert_equal(in_pieces(model, ids, [1] * 20), logits(model, ids))


def test_fewer_than_8_bits_run_emulated_only():
    refused(tiny_model(), ValueError, "expected 8 bits", recipe("w8a8").replace(weight_bits=4))
    model = tiny_model()
    quantize_(
        model, hf_models.calibration(), recipe("w8a8").replace(weight_bits=4), Fidelity.EMULATED
    )
    assert logits(model, tokens(2, 7)).isfinite().all()


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "at least one batch"),
        ([torch.tensor([[VOCAB]])], ValueError, f"from 0 to {VOCAB - 1}"),
        ([torch.tensor([[-1, 3]])], ValueError, f"from 0 to {VOCAB - 1}"),
        ([torch.zeros(2, 3)], TypeError, "integer token ids"),
        (["text"], TypeError, "expected a tensor"),
        ([tokens(1, 8)], ValueError, "at least 192 calibration samples"),
    ],
)
def test_unusable_calibration_data_are_refused(batches, error, match):
    refused(tiny_model(), error, match, batches=batches)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        quantize_(model, hf_models.calibration(), recipe("w8a8"))
    assert type(model.lm_head) is torch.nn.Linear


def test_quantizing_twice_is_refused():
    model, ids = copy.deepcopy(quantized()), tokens(2, 7)
    with pytest.raises(TypeError, match="quantized already"):
        quantize_(model, hf_models.calibration(), recipe("w8a8"))
    assert_equal(logits(model, ids), logits(quantized(), ids))


def test_float_model_of_another_depth_is_refused_by_swap():
    from mambaquant_ext.run.swap import swap_

    packed = quantize_(tiny_model(), hf_models.calibration(), recipe("w8a8"))
    with pytest.raises(ValueError, match="expected 2 layers, got 3"):
        swap_(tiny_model(num_hidden_layers=3), packed, Fidelity.INTEGER)
    other = tiny_model(vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match="vocab"):
        swap_(other, packed, Fidelity.INTEGER)
    assert type(other.lm_head) is torch.nn.Linear


# The trained model


@pytest.fixture(scope="module")
def real_windows():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(REAL_MODEL / "tokenizer.json"))
    calib = tokenizer.encode((REAL_MODEL / "calib.txt").read_text(encoding="utf-8")[:60000]).ids
    test = tokenizer.encode((REAL_MODEL / "test.txt").read_text(encoding="utf-8")[:20000]).ids
    return torch.tensor(calib[: 16 * 128]).view(16, 128), torch.tensor(test[: 2 * 256]).view(2, 256)


@pytest.mark.parametrize("preset", PRESETS)
def test_trained_model_stays_close_to_float(preset, real_windows):
    calib, ids = real_windows
    model = load_float_model(REAL_MODEL)
    with torch.no_grad():
        expected = logits(model, ids)
    quantize_(model, calib.split(4), recipe(preset))
    actual = logits(model, ids)
    agreement = float((actual.argmax(-1) == expected.argmax(-1)).float().mean())
    assert sqnr_db(actual, expected) >= MODEL_SQNR_DB[f"trained {preset}"]
    assert agreement >= MODEL_TOP1[f"trained {preset}"]


def test_recipes_are_frozen():
    """quantize_ hands recipes around: nobody may change one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("w8a8").weight_bits = 4
