"""bench.cpu without its peers and without a clock: plans, turns, the protocol of processes, rows, shares and bars."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import typer
from bench.cpu_bars import PEER, bars
from bench.cpu_bench import Bench
from bench.cpu_plan import PLANS, Figure, why_not
from bench.cpu_probes import INT8, READ, SCAN
from bench.cpu_report import peer_rows, shares, tables
from bench.engine_process import Requests, seconds_of, serve, sqnr_db
from bench.engines import ENGINES, OURS
from bench.harness import BenchCase, Timing
from bench.plot import compared_engines, draw
from bench.roofs import Roofs
from bench.shapes import LANGUAGE_MODELS, LanguageShape, LayerShape
from bench.workers import EngineError, Worker, take_turns

from bench import cpu, report

M130 = LANGUAGE_MODELS["mamba-130m"]
FUSED, UNFUSED = ENGINES[OURS], ENGINES["mambapy float32"]


def prefill(tokens, batch=1):
    return Figure("prefill", M130.name, 2, batch, tokens)


def decode(batch):
    return Figure("decode", M130.name, 2, batch, 1)


class TestShape:
    def test_parameters_are_those_of_the_name(self):
        assert [round(s.parameters / 1e6) for s in LANGUAGE_MODELS.values()] == [128, 369, 1368]

    def test_bytes_of_a_state(self):
        shape = LanguageShape(LayerShape("tiny", 4, 8, 1, dstate=2, width=3), layers=5)
        # 2 states of 8 channels in float32 and 2 inputs of 8 channels in int8, read and written.
        assert shape.state_bytes(3) == 2 * 3 * 5 * (2 * 8 * 4 + 2 * 8)


class TestPlan:
    def test_quick_has_what_the_bars_need(self):
        figures = [f for group in PLANS["quick"].groups(M130.name, 2) for f in group]
        assert {prefill(512), prefill(8192), decode(1), decode(8)} <= set(figures)

    def test_names_of_figures(self):
        assert Figure("prefill", "m", 1, 4, 1).shape == "m, 1 thread, batch 4, 1 token"
        assert Figure("decode", "m", 2, 4, 1).shape == "m, 2 threads, batch 4"
        assert prefill(8192).shape == "mamba-130m, 2 threads, batch 1, 8,192 tokens"

    def test_figures_of_one_group_differ(self):
        for plan in PLANS.values():
            for group in plan.groups(M130.name, 1):
                assert len(set(group)) == len(group)

    @pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [2, 1]), (64, [2, 1])])
    def test_thread_counts(self, cores, counts):
        assert PLANS["full"].thread_counts(cores) == counts
        assert PLANS["quick"].thread_counts(cores) == counts[:1]

    def test_what_would_take_too_long_is_left_out(self):
        def why(known, tokens=512):
            return why_not(prefill(tokens), FUSED, M130, 1 << 40, known, longest_sample_s=5.0)

        assert why({128: 1.0}) is None
        assert why({128: 1.5}) == "a sample would take 6 s"
        assert why({128: 1.5, 512: 4.0}) is None  # measured, so that nothing is guessed
        assert why({1: 1.0}) is None  # a single token says nothing about a prompt's
        assert why({}) is None

    def test_an_unfused_scan_must_fit_in_memory(self):
        states = 4 * 512 * 1536 * 16

        def why(kind, available):
            return why_not(prefill(512), kind, M130, available, {}, 5.0)

        assert why(UNFUSED, 6 * states) is None
        assert why(UNFUSED, 6 * states - 1) == "its scan would hold 288 MiB"
        assert why(FUSED, 0) is None


class TestTurns:
    def test_rounds_go_in_turn_and_the_slow_sit_out(self):
        now, calls = [0.0], []

        def call(name, seconds):
            def run():
                calls.append(name)
                now[0] += seconds
                return seconds

            return run

        samples = take_turns(
            {"slow": call("slow", 10.0), "quick": call("quick", 1.0)},
            seconds=4.0,
            minimum_rounds=2,
            failed=lambda *_: pytest.fail("none does"),
            settle=lambda: None,
            clock=lambda: now[0],
        )
        assert calls == ["slow", "quick"] * 2 + ["quick"] * 2
        assert samples == {"slow": [10.0] * 2, "quick": [1.0] * 4}

    def test_an_engine_that_fails_is_told_and_has_no_samples(self):
        answers, told = iter([1.0, EngineError("gone")]), []

        def failing():
            answer = next(answers)
            if isinstance(answer, EngineError):
                raise answer
            return answer

        calls = {"failing": failing, "sound": lambda: 2.0}
        failed = lambda name, error: told.append((name, str(error)))  # noqa: E731
        samples = take_turns(calls, 0.0, 3, failed, settle=lambda: None)
        assert samples == {"sound": [2.0] * 3}
        assert told == [("failing", "gone")]


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
        import numpy as np

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
        import numpy as np

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


ROOFS = Roofs({"L2": 4e9, "L3": 2e9, "memory": 1e9}, {"int8": 8e9, "float32": 1e9}, 5.0, 2e9)


class FakeWorker:
    """An engine of 1 ms a token; llama.cpp's logits are wrong, and transformers' takes a second a token."""

    def __init__(self, name, folder, threads, cores):
        self.name, self.is_running = name, True

    def ready(self):
        return {"settings": f"of {self.name}", "import_s": 0.1, "load_s": 0.2}

    def ask(self, call, **arguments):
        assert self.is_running
        if call == "check":
            return {"sqnr_db": 0.0 if self.name.startswith("llama") else 30.0}
        if call == "forget_peak":
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


class TestBench:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        monkeypatch.setattr("bench.cpu_bench.Worker", FakeWorker)
        monkeypatch.setattr("bench.cpu_bench.measure_roofs", lambda: ROOFS)
        monkeypatch.setattr("bench.cpu_bench.installed", lambda kind: "mambapy" not in kind.needs)
        self.confined = []
        monkeypatch.setattr("bench.machine.torch.set_num_threads", lambda _threads: None)
        monkeypatch.setattr("bench.machine.allowed_cores", lambda: [3, 5, 7])
        monkeypatch.setattr("bench.machine.confine", self.confined.append)
        monkeypatch.setattr("bench.cpu_bench.machine.available_bytes", lambda: 1 << 40)
        monkeypatch.setattr("bench.cpu_bench.language_models.missing", lambda *_: [])
        monkeypatch.setattr("bench.cpu_bench.language_models.weight_bytes", lambda _folder: 1 << 27)
        monkeypatch.setattr("bench.cpu_bench.Probes", lambda: SimpleNamespace(
            calls=lambda figure, _shape: {READ: lambda: 1e-11} if figure.op == "decode" else {}
        ))  # fmt: skip
        monkeypatch.setattr("bench.workers.SETTLE_S", 0.0)
        engines = [OURS, "llama.cpp Q8_0", "transformers float32", "mambapy float32"]
        plan = replace(PLANS["quick"], seconds=0.0, prompts=(128, 512), decode_batches=(1,))
        bench = Bench(plan, engines, tmp_path)
        bench.run()
        return bench

    def test_what_was_measured(self, run):
        assert run.samples[prefill(512)] == {OURS: [0.512] * 3}
        assert run.samples[decode(1)] == {OURS: [1e-3] * 3, "transformers float32": [1.0] * 3}
        assert run.probed == {decode(1): {READ: [1e-11] * 3}}
        assert run.settings[OURS] == "of ours"
        assert run.first_tokens[0]["engine"] == OURS
        assert run.first_tokens[0]["prompt_s"] == 0.128

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


def samples_of(**changed):
    """Seconds per call, round by round: ours, and the peer that the bars name."""
    found = {
        prefill(512): {OURS: [0.1, 0.2], PEER: [0.8, 1.6, 9.9]},
        prefill(8192): {OURS: [1.6, 3.2]},
        decode(1): {OURS: [0.004, 0.004, 0.005], PEER: [0.006, 0.006, 0.006]},
        decode(8): {OURS: [0.008, 0.008, 0.008]},
    }
    return {**found, **changed}


GEMM, SCAN_ROW = "gemm_requantize", "selective_scan"


def kernel(op, shape, **times_baseline):
    names = {
        "int_mm": "torch._int_mm, no epilogue",
        "eager": "torch eager",
        "compiled": "torch.compile",
    }
    ratios = {names.get(name, name): ratio for name, ratio in times_baseline.items()}
    return {"op": op, "shape": shape, "times_baseline": ratios}


KERNELS = [
    kernel(GEMM, "mamba-130m in_proj 1x3072x768", int_mm=0.1),  # a decode step: no bar is for it
    kernel(GEMM, "mamba-130m in_proj 64x3072x768", int_mm=1.5),
    kernel(GEMM, "mamba-130m x_proj 512x80x1536", int_mm=0.9),
    kernel(SCAN_ROW, "mamba-130m 64x1536 rotated int8", eager=3.0),
    kernel(SCAN_ROW, "mamba-130m 512x1536 int8", eager=2.0),
    kernel(SCAN_ROW, "mamba-130m 512x1536 rotated int8", eager=20.0, compiled=12.0, mambapy=90.0, copy=1.0),
]  # fmt: skip


class TestRows:
    def test_ratios_are_of_the_rounds_that_both_took(self):
        row = next(r for r in peer_rows(samples_of()) if r["peer_name"] == PEER)
        assert row["figure"] == "prefill mamba-130m, 2 threads, batch 1, 512 tokens"
        assert row["ratio"] == pytest.approx(8.0)
        assert row["ours"] == pytest.approx((5120 + 2560) / 2)
        assert row["unit"] == "tokens/s"
        assert row["spread"]["ratio"] == pytest.approx((8.0, 8.0))
        assert row["timings"][OURS]["best_us"] == pytest.approx(1e5)

    def test_a_figure_without_a_peer_has_a_row(self):
        (row,) = (r for r in peer_rows(samples_of()) if r["shape"] == decode(8).shape)
        assert row["peer_name"] is row["peer"] is row["ratio"] is None
        assert row["ours"] == pytest.approx(1000)

    def test_without_ours_there_is_nothing_to_compare(self):
        assert peer_rows({decode(1): {PEER: [1.0, 1.0]}}) == []


class TestShares:
    def found(self, probed):
        return shares(samples_of(), probed, LANGUAGE_MODELS, {M130.name: 120_000_000})

    def test_decode_is_held_against_reading_the_weights(self):
        # 120 MB at 40 GB/s are 3 ms, of 4 ms.
        (share,) = self.found({decode(1): {READ: [1 / 40e9, 1 / 40e9]}})
        assert share.share == pytest.approx(0.75)
        assert share.roof_s == pytest.approx(0.003)
        assert "weights 120.0 MB at 40.0 GB/s" in share.beside
        assert "state 4.9 MB" in share.beside

    def test_prefill_is_held_against_gemm_and_scan_of_the_same_round(self):
        operations = 2 * 512 * M130.layers * M130.linear_weights
        probed = {INT8: [0.06 / operations, 0.12 / operations], SCAN: [0.015 / 24, 0.03 / 24]}
        (share,) = self.found({prefill(512): probed})
        assert share.share == pytest.approx(0.75)
        assert share.beside == "GEMM 90.0 ms, scan 22.5 ms"

    def test_a_batch_scans_each_sequence(self):
        figure = prefill(128, batch=4)
        (share,) = shares(
            {figure: {OURS: [1.0, 1.0]}}, {figure: {INT8: [0.0], SCAN: [0.001]}}, LANGUAGE_MODELS, {}
        )  # fmt: skip
        assert share.roof_s == pytest.approx(4 * 24 * 0.001)

    def test_a_figure_that_ours_lacks_has_none(self):
        assert shares({}, {decode(1): {READ: [1.0]}}, LANGUAGE_MODELS, {}) == []


class TestBars:
    def measured(self, kernels=KERNELS, probed=None, **changed):
        samples = samples_of(**changed)
        probes = {decode(1): {READ: [1 / 40e9, 1 / 40e9]}} if probed is None else probed
        found = shares(samples, probes, LANGUAGE_MODELS, {M130.name: 120_000_000})
        return {bar.figure: bar for bar in bars(samples, found, kernels)}

    def test_each_is_measured_as_it_says(self):
        found = self.measured()
        values = {figure: bar.measured for figure, bar in found.items()}
        assert values == {
            "prefill over llama.cpp": pytest.approx(8.0),
            "prefill, share of GEMM and scan": None,
            "decode, share of read bandwidth": pytest.approx(0.75),
            "decode over llama.cpp": pytest.approx(1.5),
            "decode, tokens/s of batch 8 over 1": pytest.approx(4.0),
            "prefill, tokens/s of 8,192 over 512": pytest.approx(1.0),
            "int8 GEMM with epilogue over torch._int_mm": 0.9,
            "selective scan over the best of torch": 12.0,
        }

    def test_reached_or_not_or_unknown(self):
        found = self.measured()
        assert found["prefill over llama.cpp"].reached is True
        assert found["decode, share of read bandwidth"].reached is False
        assert found["prefill, share of GEMM and scan"].reached is None

    def test_the_worst_product_is_named(self):
        detail = self.measured()["int8 GEMM with epilogue over torch._int_mm"].detail
        assert detail == "the worst: mamba-130m x_proj 512x80x1536; 1 of 2 rows reach it"

    def test_nothing_measured_is_no_failure(self):
        assert all(bar.reached is None for bar in bars({}, [], []))


def document():
    found = shares(
        samples_of(), {decode(1): {READ: [1e-11, 1e-11]}}, LANGUAGE_MODELS, {M130.name: 1 << 27}
    )
    return {
        "schema": report.SCHEMA,
        "command": "cpu",
        "preset": "quick",
        "rows": peer_rows(samples_of()),
        "kernels": [],
        "bars": [],
        "long_prompts": [
            {"size": "m", "threads": 2, "tokens": 1024, "seconds": 0.5, "peak_bytes": 3 << 20, "grown_bytes": 0}
        ],
        "shares": [{"kind": s.kind, "figure": s.figure, "measured_s": s.measured_s, "roof_s": s.roof_s,
                    "share": s.share, "beside": s.beside} for s in found],
        "left_out": [{"engine": "e", "figure": "f", "why": "w"}],
        "engines": {},
    }  # fmt: skip


class TestDocument:
    def test_every_table_has_as_many_cells_as_titles(self):
        found = tables(document())
        assert [title for title, _, _ in found] == [
            "Whole models", "Prompts by length", "Left out", "Shares of the roofs",
        ]  # fmt: skip
        for _, header, body in found:
            assert {len(line) for line in body} == {len(header)}

    def test_a_long_prompt_in_tokens_and_mebibytes(self):
        (line,) = next(
            body for title, _, body in tables(document()) if title == "Prompts by length"
        )
        assert line == ["1,024", "m, 2 threads", "2,048", "3", "0.0"]

    def test_json_keeps_every_list_of_rows(self, tmp_path):
        path = tmp_path / "cpu.json"
        values = json.loads(json.dumps(document()))
        report.write_json(values, path)
        assert report.read_json(path) == values
        assert len(path.read_text().splitlines()) > len(values["rows"]) + len(values["shares"])

    def test_the_plot_compares_the_longest_of_the_figures_that_most_engines_have(self):
        both, other = {OURS: [1.0, 1.0], PEER: [2.0, 2.0]}, Figure("prefill", "other", 2, 1, 4096)
        rows = peer_rows({prefill(128): both, **samples_of(), prefill(512, 4): both, other: both})
        name, rates = compared_engines(rows, "prefill")
        assert name == f"prefill {prefill(512).shape}"
        assert set(rates) == {OURS, PEER}
        assert compared_engines(rows, "unheard") is None

    def test_a_picture_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        case = BenchCase("fake", "1x1", print, print, bytes_moved=1000, operations=10)
        timings = {OURS: Timing(2, 1, 3, 1)}
        values = {
            **document(), "roofs": ROOFS.to_dict(), "machine": {"cpu": "c", "isa": "i", "threads": 2},
            "kernels": [report.case_row(case, timings, ROOFS)],
        }  # fmt: skip
        draw(values, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_a_result_without_roofs_is_no_picture(self, tmp_path):
        with pytest.raises(ValueError, match="which has roofs"):
            draw(document(), tmp_path / "x.png")


class TestCommand:
    @pytest.mark.parametrize("options", [{"size": ["mamba-9b"]}, {"engine": ["onnx"]}])
    def test_unknown_names_are_refused(self, options):
        (name,) = (n for names in options.values() for n in names)
        with pytest.raises(typer.BadParameter, match=f"expected some of mamba-130m, .*got {name}"):
            cpu.run(**options)

    def test_kernels_that_fail_cost_no_other_result(self, monkeypatch, tmp_path):
        def failing(command, **_options):
            assert command[1:5] == ["-m", "bench.run", "--preset", "cpu"]
            assert command[-2:] == ["--isa", "avx2"]
            return SimpleNamespace(returncode=1, stderr="...\nAssertionError: gemm: wrong result\n")

        monkeypatch.setattr("bench.cpu.subprocess.run", failing)
        with pytest.raises(EngineError, match="AssertionError: gemm: wrong result"):
            cpu.kernel_rows(2, tmp_path / "x.json", "avx2")
