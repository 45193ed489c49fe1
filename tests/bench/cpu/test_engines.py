"""The protocol of the engines' processes, with an engine that computes nothing."""

import io
import json

import numpy as np
import pytest
from bench.cpu.engines import EngineError, Worker
from bench.cpu.engines.process import Requests, seconds_of, serve, sqnr_db


class FakeEngine:
    settings = "none"

    def __init__(self):
        self.calls = []

    def prompts(self, batch, tokens):
        self.calls.append(("prompts", batch, tokens))
        return (batch, tokens)

    def prefill(self, ids):
        self.calls.append(("prefill", *ids))
        return [[3.0, 4.0]]

    def start(self, batch):
        self.calls.append(("start", batch))
        return batch

    def step(self, sequences):
        self.calls.append(("step", sequences))


def answers(engine, *requests):
    sink = io.StringIO()
    serve(Requests(engine), io.StringIO("".join(f"{json.dumps(r)}\n" for r in requests)), sink)
    return [json.loads(line) for line in sink.getvalue().splitlines()]


class TestProtocol:
    def test_prompts_and_sequences_are_made_once(self):
        engine = FakeEngine()
        prefill = {"call": "prefill", "batch": 2, "tokens": 5, "calls": 2}
        decode = {"call": "decode", "batch": 2, "calls": 1}
        found = answers(engine, prefill, decode, prefill, decode)
        assert all(set(answer) == {"seconds"} and answer["seconds"] >= 0 for answer in found)
        assert engine.calls == [
            ("prompts", 2, 5), ("prefill", 2, 5), ("prefill", 2, 5), ("start", 2), ("step", 2),
            ("prefill", 2, 5), ("prefill", 2, 5), ("step", 2),
        ]  # fmt: skip

    def test_a_failing_request_is_told_and_the_next_one_answered(self):
        class Failing(FakeEngine):
            def start(self, batch):
                raise MemoryError("no room")

        bad = {"call": "decode", "batch": 1, "calls": 1}
        good = {"call": "prefill", "batch": 1, "tokens": 1, "calls": 1}
        found = answers(Failing(), bad, {"call": "unheard"}, good)
        assert found[0] == {"error": "MemoryError: no room"}
        assert found[1]["error"].startswith("AttributeError")
        assert set(found[2]) == {"seconds"}

    def test_check_compares_with_the_reference(self, tmp_path):
        path = tmp_path / "logits.npy"
        np.save(path, np.array([[3.0, 3.5]]))
        (found,) = answers(
            FakeEngine(), {"call": "check", "reference": str(path), "batch": 1, "tokens": 2}
        )
        # The error is 0.5, the signal 9 + 12.25.
        assert found["sqnr_db"] == pytest.approx(19.294, abs=1e-3)

    def test_seconds_are_per_call(self):
        calls = []
        assert seconds_of(lambda: calls.append(1), 5) >= 0
        assert len(calls) == 5

    def test_sqnr_of_an_unrelated_result_is_low(self):
        rng = np.random.default_rng(0)
        expected, other = rng.normal(size=(2, 2, 1000))
        assert sqnr_db(expected, other) < 0
        assert sqnr_db(expected, expected) > 100

    def test_an_engine_that_cannot_load_says_why(self, tmp_path):
        """Of llama.cpp, whose process imports no torch; whether it is installed or not."""
        with Worker("llama.cpp Q8_0", tmp_path, 1, []) as worker:
            with pytest.raises(EngineError, match=r"llama.cpp Q8_0: .*(llama_cpp|Q8_0.gguf)"):
                worker.ready()
            with pytest.raises(EngineError, match="its process has ended"):
                worker.ask("prefill", batch=1, tokens=1, calls=1)
