"""Random models, their files, and what GGUF wants of them."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench.cpu.engines import ours
from bench.cpu.engines.engine import FLOAT, PREPACKED, W8A8
from bench.cpu.engines.process import sqnr_db
from bench.cpu.models.files import (
    CHECKED,
    DISTINCT,
    REFERENCE,
    ModelError,
    make,
    make_missing,
    missing,
)
from bench.cpu.models.gguf import tensors, write_f16
from bench.cpu.models.random_model import deepened, prompts, random_model
from bench.cpu.models.token_ids import token_ids
from bench.shapes import LanguageShape, LayerShape

from mambaquant_ext import load

TINY = LanguageShape(LayerShape("tiny", hidden=16, dim=32, dt_rank=4), layers=2, vocab=96)

DEEP = replace(TINY, layers=DISTINCT + 2)


@pytest.fixture(scope="module")
def state():
    return random_model(TINY).state_dict()


def test_ids_are_the_same_ones_each_time_and_in_range():
    first = token_ids(96, 2, 50)
    assert np.array_equal(first, token_ids(96, 2, 50))
    assert first.shape == (2, 50)
    assert first.dtype == np.int64
    assert 0 <= first.min() < first.max() < 96


def test_models_are_the_same_ones_each_time(state):
    again = random_model(TINY).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


class TestGguf:
    def test_names_are_those_of_llama_cpp(self, state):
        names = [name for name, _ in tensors(state, TINY.layers)]
        block = {
            "attn_norm.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_dt.bias",
            "ssm_out.weight", "ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_a", "ssm_d",
        }  # fmt: skip
        assert set(names) == {"token_embd.weight", "output_norm.weight"} | {
            f"blk.{index}.{name}" for index in range(2) for name in block
        }
        assert len(names) == len(set(names))

    def test_matrices_are_half_and_the_rest_is_float(self, state):
        for name, tensor in tensors(state, TINY.layers):
            is_matrix = name.endswith(".weight") and not name.endswith(
                ("norm.weight", "conv1d.weight")
            )
            assert tensor.dtype == (torch.float16 if is_matrix else torch.float32), name

    def test_values(self, state):
        found = dict(tensors(state, TINY.layers))
        mixer = "backbone.layers.1.mixer."
        assert torch.equal(found["blk.1.ssm_a"], -torch.exp(state[f"{mixer}A_log"]))
        assert torch.equal(found["blk.1.ssm_conv1d.weight"], state[f"{mixer}conv1d.weight"][:, 0])
        assert torch.equal(found["blk.1.ssm_x.weight"], state[f"{mixer}x_proj.weight"].half())
        assert found["blk.1.ssm_in.weight"].shape == (64, 16)

    def test_what_is_written(self, state, tmp_path, monkeypatch):
        written = {"tensors": {}}

        class Writer:
            def __init__(self, path, architecture):
                written.update(path=path, architecture=architecture)

            def add_tensor(self, name, array):
                written["tensors"][name] = array

            def __getattr__(self, name):
                return lambda *values: written.__setitem__(name, values)

        kinds = SimpleNamespace(MOSTLY_F16=1)
        fake = SimpleNamespace(GGUFWriter=Writer, LlamaFileType=kinds)
        monkeypatch.setitem(sys.modules, "gguf", fake)
        write_f16(state, TINY, tmp_path / "F16.gguf")
        assert written["architecture"] == "mamba"
        expected = {
            "add_embedding_length": 16, "add_block_count": 2, "add_vocab_size": 96,
            "add_ssm_conv_kernel": 4, "add_ssm_inner_size": 32, "add_ssm_state_size": 16,
            "add_ssm_time_step_rank": 4, "add_tokenizer_model": "none", "add_file_type": 1,
        }  # fmt: skip
        assert {name: written[name][0] for name in expected} == expected
        assert set(written["tensors"]) == {name for name, _ in tensors(state, 2)}
        assert all(array.flags.c_contiguous for array in written["tensors"].values())
        assert "close" in written


class TestFiles:
    def test_missing_names_what_they_are_made_from(self, tmp_path):
        assert missing(tmp_path, ["Q8_0.gguf"]) == ["F16.gguf", "Q8_0.gguf", FLOAT]
        (tmp_path / "Q8_0.gguf").touch()
        assert missing(tmp_path, ["Q8_0.gguf"]) == []

    def test_a_packed_image_is_always_made_anew(self, tmp_path):
        (tmp_path / PREPACKED).mkdir()
        assert missing(tmp_path, [PREPACKED]) == [PREPACKED]
        (tmp_path / W8A8).mkdir()
        assert missing(tmp_path, [PREPACKED, W8A8]) == [PREPACKED]

    def test_too_little_memory_and_failures_are_told(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bench.cpu.models.files.available_bytes", lambda: 0)
        with pytest.raises(ModelError, match="making it takes 0 MiB of memory"):
            make_missing(tmp_path, TINY, [W8A8])
        monkeypatch.setattr(
            "bench.cpu.models.files.subprocess.run",
            lambda command, **_: SimpleNamespace(
                returncode=1, stderr=f"...\n{command[-1]} failed\n"
            ),
        )
        with pytest.raises(ModelError, match=f"{PREPACKED} failed"):
            make_missing(tmp_path, TINY, [PREPACKED])

    def test_a_file_that_fails_leaves_nothing(self, tmp_path, monkeypatch):
        def broken(path):
            path.write_text("half")
            raise OSError("disk full")

        monkeypatch.setattr("bench.cpu.models.files.formats", lambda *_: {"F16.gguf": broken})
        with pytest.raises(OSError, match="disk full"):
            make(tmp_path, TINY, ["F16.gguf"])
        assert list(tmp_path.iterdir()) == []

    def test_a_quantized_model_and_what_a_token_reads_of_it(self, tmp_path):
        for _ in range(2):  # the image again, beside everything else
            make(tmp_path, DEEP, [FLOAT, REFERENCE, W8A8, PREPACKED])
        expected = np.load(tmp_path / REFERENCE)
        with torch.no_grad():
            logits = load(tmp_path / W8A8)(prompts(DEEP, *CHECKED)).logits[:, -1]
        assert sqnr_db(expected, logits.double().numpy()) > 15
        weights = [W8A8, PREPACKED]
        packed, mapped = (ours.load("int8", tmp_path / name, 1) for name in weights)
        ids = packed.prompts(1, 8)
        assert torch.equal(packed.prefill(ids), mapped.prefill(ids))
        # At least every weight; at most what is stored, but for the table and the padding of packed tiles.
        read = packed.decoded_bytes()
        assert read == mapped.decoded_bytes()
        assert read > DEEP.layers * DEEP.linear_weights + DEEP.vocab * DEEP.layer.hidden
        tensors = packed._runner.blocks.tensors()
        table = DEEP.vocab * (DEEP.layer.hidden + 4)  # int8 rows, a float32 scale each
        whole = sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)
        assert read == whole - table + DEEP.layer.hidden + 4

    def test_the_layers_of_a_deep_model_repeat_but_share_no_memory(self):
        few = random_model(TINY)
        layers = deepened(few, 5).backbone.layers
        assert len(layers) == 5
        for index, layer in enumerate(layers):
            own, source = layer.state_dict(), few.backbone.layers[index % 2].state_dict()
            assert all(torch.equal(tensor, source[name]) for name, tensor in own.items())
        assert len({layer.mixer.in_proj.weight.data_ptr() for layer in layers}) == 5
