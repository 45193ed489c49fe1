"""A whole run, with engines that answer at once."""

from dataclasses import replace

import pytest
from bench.cpu.engines import OURS, EngineError
from bench.cpu.engines.engine import MAPPED, PACKING
from bench.cpu.plan import PLANS
from bench.cpu.probes import READ
from bench.cpu.session import Session
from tests.bench.cpu.samples import ROOFS, decode, prefill


class FakeWorker:
    """An engine of 1 ms a token; llama.cpp's logits are wrong, and transformers' takes a second a token."""

    def __init__(self, name, folder, threads, cores):
        self.name, self.is_running = name, True

    def ready(self):
        return {"settings": f"of {self.name}", "imported_at": 0.1, "load_s": 0.2}

    def ask(self, call, **arguments):
        assert self.is_running
        asked.append(self.name)
        if call == "check":
            return {"sqnr_db": 0.0 if self.name.startswith("llama") else 30.0}
        if call == "forget_peak":
            return {"bytes": 1000}
        if call == "decoded_bytes":
            return {"bytes": 1000}
        if call == "memory":
            return {"peak_bytes": 1500}
        token = 1.0 if self.name.startswith("transformers") else 1e-3
        return {"seconds": token * arguments["batch"] * arguments.get("tokens", 1)}

    def stop(self):
        self.is_running = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def fake_start(name, _folder, _threads, _cores):
    """A slow one each time, and an engine that cannot be started a second time."""
    started.append(name)
    if name.startswith("transformers") and started.count(name) == 2:
        raise EngineError("no room")
    return {"seconds": 0.5}


class FakeProbes:
    """A machine that reads a token's bytes in a second."""

    def __init__(self, decoded_bytes):
        self._seconds = 1 / decoded_bytes

    def calls(self, figure, _shape):
        return {READ: self._read} if figure.op == "decode" else {}

    def _read(self):
        asked.append(READ)
        return self._seconds


started, asked = [], []


class TestSession:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        monkeypatch.setattr("bench.cpu.session.Worker", FakeWorker)
        monkeypatch.setattr("bench.cpu.session.first_token", fake_start)
        monkeypatch.setattr("bench.cpu.session.measure_roofs", lambda: ROOFS)
        monkeypatch.setattr("bench.cpu.session.installed", lambda kind: "mambapy" not in kind.needs)
        self.confined = []
        started.clear()
        asked.clear()
        monkeypatch.setattr("bench.machine.torch.set_num_threads", lambda _threads: None)
        monkeypatch.setattr("bench.machine.allowed_cores", lambda: [3, 5, 7])
        monkeypatch.setattr("bench.machine.confine", self.confined.append)
        monkeypatch.setattr("bench.cpu.session.machine.available_bytes", lambda: 1 << 40)
        monkeypatch.setattr("bench.cpu.session.files.make_missing", lambda *_: None)
        monkeypatch.setattr("bench.cpu.session.Probes", FakeProbes)
        monkeypatch.setattr("bench.cpu.turns.SETTLE_S", 0.0)
        engines = [OURS, "llama.cpp Q8_0", "transformers float32", "mambapy float32"]
        plan = replace(PLANS["quick"], seconds=0.0, prompts=(128, 512), decode_batches=(1,))
        bench = Session(plan, engines, tmp_path)
        bench.run()
        return bench

    def test_what_was_measured(self, run):
        assert run.samples[prefill(512)] == {OURS: [0.512] * 3}
        assert run.samples[decode(1)] == {OURS: [1e-3] * 3, "transformers float32": [1.0] * 3}
        assert run.probed == {decode(1): {READ: [1 / 1000] * 3}}
        assert run.settings[OURS] == "of ours"
        assert run.decoded_bytes == {"mamba-130m": 1000}

    def test_engines_start_in_turn_ours_with_and_without_an_image(self, run):
        # The second engine's logits are wrong, which is no matter here; the last one is not installed.
        turn = [MAPPED, PACKING, "llama.cpp Q8_0", "transformers float32"]
        assert started == turn + turn
        assert {row["engine"]: len(row["starts"]) for row in run.first_tokens} == {
            MAPPED: 2, PACKING: 2, "llama.cpp Q8_0": 2,
        }  # fmt: skip
        assert {
            "engine": "transformers float32", "figure": "first token mamba-130m", "why": "no room",
        } in run.left_out  # fmt: skip

    def test_a_probe_comes_right_before_ours(self, run):
        probes = [index for index, name in enumerate(asked) if name == READ]
        assert len(probes) == 3
        assert all(asked[index + 1] == OURS for index in probes)

    def test_whatever_comes_later_may_use_every_core_again(self, run):
        assert self.confined == [[3, 5], [3, 5], [3, 5, 7]]

    def test_what_was_left_out_and_why(self, run):
        found = {(row["engine"], row["figure"]): row["why"] for row in run.left_out}
        assert found["mambapy float32", "all"] == "not installed: mambapy"
        wrong = found["llama.cpp Q8_0", "mamba-130m, 2 threads"]
        assert wrong == "logits: expected 4.0 dB, got 0.0"
        late = [
            found["transformers float32", f"prefill {prefill(tokens).shape}"]
            for tokens in (128, 512)
        ]
        assert late == ["a sample takes 128 s", "a sample would take 512 s"]

    def test_long_prompts_say_how_much_memory_they_took(self, run):
        assert [row["tokens"] for row in run.long_prompts] == [1024, 4096, 16384]
        assert {row["grown_bytes"] for row in run.long_prompts} == {500}
        left_out = [row["why"] for row in run.left_out if "65,536" in row["figure"]]
        assert left_out == ["over 60 s"]
