"""mamba_ssm: checkpoints in its own format, and its classes' calling contract around quantized blocks."""

import json
import os
from collections import namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mambaquant_ext import Fidelity, QuantMambaBlock, quantize_, recipe
from mambaquant_ext.model.checkpoint import ModelFormatError, load_float_model
from mambaquant_ext.run.swap import QuantMambaSsmBlock
from stages import hf_models
from stages.hf_models import logits, tiny_model, tokens
from tolerances import MODEL_SQNR_DB, assert_equal, sqnr_db

VOCAB = 59  # padded to 64
CONFIG = {
    "d_model": 48,
    "n_layer": 2,
    "vocab_size": VOCAB,
    "ssm_cfg": {"dt_rank": 12},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


def their_state(model):
    """The tensors of a transformers model under mamba_ssm's names."""
    return {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def write(folder, config, state, as_safetensors=False):
    (folder / "config.json").write_text(json.dumps(config))
    if as_safetensors:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


# Checkpoints


@pytest.mark.parametrize("as_safetensors", [False, True])
@pytest.mark.parametrize("has_head", [False, True])
def test_checkpoint_gives_the_logits_of_the_model_it_came_from(tmp_path, as_safetensors, has_head):
    model = tiny_model(vocab_size=64)
    state = their_state(model)
    if not has_head:
        del state["lm_head.weight"]
    loaded = load_float_model(write(tmp_path, CONFIG, state, as_safetensors))
    assert_equal(logits(loaded, tokens(2, 9)), logits(model, tokens(2, 9)))
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"ssm_cfg": {"dt_rank": 12, "bias": True}}, {"use_bias": True}),
        ({"ssm_cfg": {"dt_rank": 12, "conv_bias": False}}, {"use_conv_bias": False}),
        (
            {"ssm_cfg": {"dt_rank": 12, "layer": "Mamba1", "d_state": 8, "d_conv": 3}},
            {"state_size": 8, "conv_kernel": 3},
        ),
        ({"tie_embeddings": False}, {"tie_word_embeddings": False}),
        ({"ssm_cfg": {}}, {"time_step_rank": 3}),
        (
            {"ssm_cfg": None, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}},
            {"time_step_rank": 3},
        ),
    ],
    ids=str,
)
def test_every_field_of_the_config_is_read(config, changes, tmp_path):
    model = tiny_model(vocab_size=64, **changes)
    loaded = load_float_model(write(tmp_path, {**CONFIG, **config}, their_state(model)))
    assert_equal(logits(loaded, tokens(2, 9)), logits(model, tokens(2, 9)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer: expected 'Mamba1', got 'Mamba2'"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"rms_norm": False}, "rms_norm: expected True, got False"),
        ({"d_intermediate": 96}, "d_intermediate"),
        ({"d_model": 64}, "shape"),
        ({"n_layer": 1}, "backbone.layers.1"),
        ({"n_layer": 3}, "backbone.layers.2"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 70}, "shape"),
        ({"d_model": "48"}, "d_model: expected an integer"),
        ({"n_layer": 0}, "n_layer: expected an integer of at least 1"),
        ({"ssm_cfg": [1]}, "ssm_cfg: expected an object"),
        ({"ssm_cfg": {"dt_rank": "much"}}, "dt_rank: expected an integer"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
    ],
    ids=str,
)
def test_config_of_another_model_is_refused(change, says, tmp_path):
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    write(tmp_path, config, their_state(tiny_model(vocab_size=64)))
    with pytest.raises(ModelFormatError) as caught:
        load_float_model(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


class _Malicious:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


@pytest.mark.parametrize(
    "state", [_Malicious(), {"a": _Malicious()}, [torch.zeros(1)], {"a": "b"}], ids=type
)
def test_pickle_of_anything_but_tensors_is_refused_and_not_run(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFormatError, match=r"pytorch_model\.bin") as caught:
        load_float_model(write(tmp_path, CONFIG, state))
    assert not (tmp_path / "pwned").exists()
    assert "\n" not in str(caught.value)
    assert "False" not in str(caught.value)  # torch's advice to read it all the same


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_pickle_is_refused(keep, tmp_path):
    path = write(tmp_path, CONFIG, their_state(tiny_model(vocab_size=64))) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFormatError, match=r"pytorch_model\.bin"):
        load_float_model(tmp_path)


# Classes: stand-ins with the contract of mamba_ssm 2.3 (models/mixer_seq_simple.py, modules/block.py), whose own
# cannot be imported without CUDA. The mixer is only asked for its parameters.


class RMSNorm(nn.Module):
    def __init__(self, hidden, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden))
        self.register_parameter("bias", None)

    def forward(self, x):
        raise NotImplementedError("Triton kernels need a GPU")


class Mamba(nn.Module):
    def __init__(self, mixer, layer_idx):
        super().__init__()
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj"):
            setattr(self, name, getattr(mixer, name))
        self.activation, self.layer_idx = "silu", layer_idx


class Block(nn.Module):
    def __init__(self, block, layer_idx):
        super().__init__()
        self.norm = RMSNorm(block.norm.weight.shape[0])
        self.norm.weight = block.norm.weight
        self.mixer, self.mlp, self.layer_idx = Mamba(block.mixer, layer_idx), None, layer_idx

    def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
        raise NotImplementedError("CUDA kernels need a GPU")


class MixerModel(nn.Module):
    def __init__(self, backbone, fused_add_norm):
        super().__init__()
        self.embedding = backbone.embeddings
        self.layers = nn.ModuleList(Block(block, i) for i, block in enumerate(backbone.layers))
        self.norm_f = RMSNorm(backbone.norm_f.weight.shape[0])
        self.norm_f.weight = backbone.norm_f.weight
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, True

    def forward(self, input_ids, inference_params=None, **mixer_kwargs):
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        if self.fused_add_norm:
            raise NotImplementedError("Triton kernels need a GPU")
        residual = (hidden_states + residual) if residual is not None else hidden_states
        return self.norm_f(residual.to(dtype=self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module):
    def __init__(self, model, fused_add_norm=True):
        super().__init__()
        self.config = SimpleNamespace(d_model=48, n_layer=2, tie_embeddings=True)
        self.backbone, self.lm_head = MixerModel(model.backbone, fused_add_norm), model.lm_head

    def forward(
        self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **kwargs
    ):
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return namedtuple("CausalLMOutput", ["logits"])(logits=self.lm_head(hidden_states))


@dataclass
class InferenceParams:
    seqlen_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)


def quantized_pair(fused_add_norm=True, fidelity=Fidelity.INTEGER):
    """A quantized mamba_ssm-like model, and the same weights quantized in a transformers model."""
    theirs, model = MambaLMHeadModel(tiny_model(), fused_add_norm), tiny_model()
    for each in (theirs, model):
        quantize_(each, hf_models.calibration(), recipe("w8a8"), fidelity)
    return theirs, model


@pytest.mark.parametrize("fused_add_norm", [True, False])
@pytest.mark.parametrize("fidelity", list(Fidelity))
def test_quantized_model_equals_the_transformers_one(fused_add_norm, fidelity):
    theirs, model = quantized_pair(fused_add_norm, fidelity)
    assert type(theirs) is MambaLMHeadModel
    assert all(type(layer) is QuantMambaSsmBlock for layer in theirs.backbone.layers)
    ids = tokens(3, 11)
    for actual, expected in (
        (theirs(ids).logits, logits(model, ids)),
        (theirs(ids, num_last_tokens=1).logits, logits(model, ids)[:, -1:]),
    ):
        if fidelity is Fidelity.INTEGER:
            assert_equal(actual, expected)
        else:
            assert sqnr_db(actual, expected) >= MODEL_SQNR_DB["emulated, twice"]
    assert sqnr_db(theirs(ids).logits, logits(tiny_model(), ids)) >= MODEL_SQNR_DB["tiny w8a8"]


def test_prefill_and_steps_through_inference_params_equal_the_whole():
    theirs, model = quantized_pair()
    params, ids = InferenceParams(), tokens(2, 9)
    parts = []
    for piece in ids.split([5, 1, 1, 1, 1], 1):
        parts.append(theirs(piece, inference_params=params).logits)
        params.seqlen_offset += piece.shape[1]
    assert_equal(torch.cat(parts, 1), logits(model, ids))
    assert set(params.key_value_memory_dict) == {0, 1}


def test_inference_params_at_offset_zero_start_anew():
    """mamba_ssm's InferenceParams.reset sets the offset and leaves the dictionary."""
    theirs, model = quantized_pair()
    params, ids = InferenceParams(), tokens(2, 9)
    theirs(tokens(3, 4, seed=3), inference_params=params)
    assert_equal(theirs(ids, inference_params=params).logits, logits(model, ids))


def test_inference_params_of_another_batch_size_are_refused():
    theirs, _ = quantized_pair()
    params = InferenceParams()
    theirs(tokens(2, 4), inference_params=params)
    params.seqlen_offset = 4
    with pytest.raises(ValueError, match="one batch size"):
        theirs(tokens(3, 1), inference_params=params)


def test_block_hands_the_stream_on_in_two_parts():
    """Block(hidden, residual): their sum is the stream, as in mamba_ssm's add-norm-mixer order."""
    theirs, model = quantized_pair()
    hidden, residual = torch.randn(2, 2, 5, 48, generator=torch.Generator().manual_seed(3))
    out, stream = theirs.backbone.layers[0](hidden, residual)
    assert_equal(out + stream, model.backbone.layers[0](hidden + residual))


def test_single_block_of_mamba_ssm_is_quantized_from_float():
    block = Block(tiny_model().backbone.layers[1], 1)
    inputs = [torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    quantized = QuantMambaBlock.from_float(block, inputs, recipe("w8a8"))
    assert quantized.layer_idx == 1
    expected = QuantMambaBlock.from_float(tiny_model().backbone.layers[1], inputs, recipe("w8a8"))
    assert_equal(quantized(inputs[0]), expected(inputs[0]))


def test_mixer_of_another_kind_is_refused_unchanged():
    model = MambaLMHeadModel(tiny_model())
    del model.backbone.layers[1].mixer.x_proj  # as in Mamba-2
    with pytest.raises(TypeError, match=r"expected a Mamba-1 mixer with .* without x_proj"):
        quantize_(model, hf_models.calibration(), recipe("w8a8"))
    model = MambaLMHeadModel(tiny_model())
    model.backbone.norm_f = nn.LayerNorm(48)
    with pytest.raises(TypeError, match="expected an RMSNorm"):
        quantize_(model, hf_models.calibration(), recipe("w8a8"))
    assert type(model.backbone.layers[0]) is Block


def test_block_with_an_mlp_is_refused():
    """The quantized block would drop it."""
    model = MambaLMHeadModel(tiny_model())
    model.backbone.layers[1].mlp = nn.Linear(48, 48)
    with pytest.raises(TypeError, match="mlp"):
        quantize_(model, hf_models.calibration(), recipe("w8a8"))


def test_real_model_equals_the_transformers_one():
    """Where mamba_ssm itself can be imported, which takes CUDA."""
    mixer_seq_simple = pytest.importorskip(
        "mamba_ssm.models.mixer_seq_simple",
        reason="mamba_ssm is not installed",
        exc_type=ImportError,
    )
    config = pytest.importorskip("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=48, n_layer=2, vocab_size=VOCAB, ssm_cfg={"dt_rank": 12}
    )
    real = mixer_seq_simple.MambaLMHeadModel(config, device="cpu")
    real.load_state_dict(their_state(tiny_model(vocab_size=64)))
    model = tiny_model(vocab_size=64)
    for each in (real, model):
        quantize_(each, hf_models.calibration(), recipe("w8a8"))
    assert_equal(real(tokens(2, 9)).logits, logits(model, tokens(2, 9)))
