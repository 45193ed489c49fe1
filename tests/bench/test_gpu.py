"""The GPU bench without a GPU: the timer on a device of the test's own, the cases on torch's meta device."""

import math
import time

import pytest
import torch
import typer
from bench.gpu import COPY, HEADER, Collector, cells, guarded_cases, usable_baselines
from bench.gpu_machine import QUERIES, lines, parse_query, query
from bench.gpu_timer import ROUNDS, NotAheadError, make_timer, queued_batch
from bench.harness import BenchCase, Timing, group_cases, groups_of
from bench.roofs import Roofs
from bench.shapes import (
    DECODE_TOKENS,
    IMAGE_BATCH,
    IMAGES,
    MODELS,
    PREFILL_TOKENS,
    ImageShape,
    LayerShape,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import gpu, report

ROOFS = Roofs({"memory": 1e9}, {"int8": 8e9, "float32": 1e9}, 5.0)


class FakeGpu:
    """A queue: work takes the time that it says; the device begins only when asked to, after `host_needs` spins."""

    def __init__(self, host_needs=0.0):
        self.host_needs = host_needs
        self.now = 0.0  # of the device, milliseconds
        self.flushes = 0
        self.spins = []
        self.log = []

    def work(self, name, milliseconds):
        self.log.append(name)
        self.now += milliseconds

    def flush(self):
        self.flushes += 1
        self.work("flush", 50.0)

    def spin(self, seconds):
        self.spins.append(seconds)

    def synchronize(self):
        pass

    def event(self):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def query(self):
                return gpu.spins[-1] < gpu.host_needs

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def fake_case(run=lambda: None, check=lambda: None, **changes):
    values = {"op": "fake", "shape": "1x1", "bytes_moved": 1000, "operations": 10, **changes}
    return BenchCase(run=run, check=check, **values)


def fixed_timer(runs, seconds=0.0, minimum_rounds=0):
    return {name: Timing(40.0, 39.0, 41.0, 38.0) for name in runs}


def collector(graph=None, limit_s=60.0):
    return Collector(fixed_timer, 0.0, 2, limit_s, graph)


class TestTimer:
    def test_only_the_call_is_inside_the_interval_and_each_meets_a_cold_cache(self):
        device = FakeGpu()
        runs = {"a": lambda: device.work("a", 0.25), "b": lambda: device.work("b", 3.0)}
        batch, _ = queued_batch(runs, device, 1e-3)
        assert batch == {
            "a": [pytest.approx(250.0)] * ROUNDS,
            "b": [pytest.approx(3000.0)] * ROUNDS,
        }
        assert device.log == ["flush", "a", "flush", "b"] * ROUNDS

    def test_a_batch_that_the_gpu_caught_up_with_is_queued_again_further_ahead(self):
        device = FakeGpu(host_needs=5e-3)
        batch, lead = queued_batch({"a": lambda: device.work("a", 1.0)}, device, 1e-3)
        assert len(batch["a"]) == ROUNDS
        assert lead >= 5e-3
        assert device.spins == sorted(device.spins)
        assert len(device.spins) > 1

    def test_a_call_that_waits_for_the_gpu_is_refused(self):
        with pytest.raises(NotAheadError, match="caught up with the host"):
            queued_batch({"a": lambda: None}, FakeGpu(host_needs=math.inf), 1e-3)

    def test_timings_of_all_rounds(self):
        device = FakeGpu()
        runs = {"a": lambda: device.work("a", 0.5), "b": lambda: None}
        found = make_timer(device)(runs, 0.0, 3 * ROUNDS)
        assert found["a"].median_us == pytest.approx(500.0)
        assert found["b"].median_us == 0.0
        assert device.flushes == 2 * 3 * ROUNDS


class TestCollector:
    def test_a_row(self):
        found = collector(graph=lambda _run: 7.0)
        found.add(fake_case(bytes_moved=20_000, baselines={"plain": lambda: None}))
        (row,) = found.rows(ROOFS)
        assert row["share_of_roof"] == pytest.approx(0.5)
        assert row["working_set_in"] == "memory"
        assert row["graph_us"] == 7.0
        assert set(row["times_baseline"]) == {COPY, "plain"}
        assert len(cells(row)) == len(HEADER)
        assert found.not_timed == []

    def test_long_calls_are_not_captured(self):
        def slow(runs, seconds=0.0, minimum_rounds=0):
            return {name: Timing(101.0, 1.0, 1.0, 1.0) for name in runs}

        found = Collector(slow, 0.0, 2, 60.0, lambda _run: pytest.fail("captured"))
        found.add(fake_case())
        (row,) = found.rows(ROOFS)
        assert row["graph_us"] is None
        assert cells(row)[4] == "-"

    def test_a_wrong_kernel_has_no_row_and_the_next_case_comes(self):
        def wrong():
            raise AssertionError("off by one\nmore")

        found = collector()
        found.add(fake_case(check=wrong, run=lambda: pytest.fail("timed")))
        found.add(fake_case(shape="2x2"))
        assert [row["shape"] for row in found.rows(ROOFS)] == ["2x2"]
        assert found.not_timed == [
            {"op": "fake", "shape": "1x1", "reason": "wrong result: AssertionError: off by one"}
        ]

    def test_what_no_kernel_serves_is_noted(self):
        def unsupported():
            raise NotImplementedError("gemm: expected layout 3")

        found = collector()
        found.add(fake_case(check=unsupported))
        assert found.not_timed[0]["reason"] == "NotImplementedError: gemm: expected layout 3"

    def test_no_row_is_begun_after_the_limit(self):
        found = collector(limit_s=-1.0)
        found.add(fake_case(check=lambda: pytest.fail("checked")))
        assert found.not_timed[0]["reason"] == "the time limit was reached"

    def test_a_group_without_data_is_noted(self, monkeypatch):
        def broken(group, preset, names=()):
            if group == "gemm":
                raise NotImplementedError("no packing")
            yield fake_case(shape=group)

        monkeypatch.setattr("bench.gpu.group_cases", broken)
        found = collector()
        shapes = [c.shape for c in guarded_cases("gpu", {"gemm": [], "norm": []}, found)]
        assert shapes == ["norm"]
        assert found.not_timed == [
            {"op": "gemm", "shape": "", "reason": "NotImplementedError: no packing"}
        ]


class HostGpu:
    """The CPU as a device that is always behind the host."""

    def flush(self):
        pass

    def spin(self, seconds):
        pass

    def synchronize(self):
        pass

    def event(self):
        class Event:
            def record(self):
                self.at = time.perf_counter()

            def query(self):
                return False

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


class TestRun:
    """All of bench.gpu but the device: real operators on the CPU."""

    @pytest.fixture
    def small(self, monkeypatch):
        monkeypatch.setattr(gpu, "WARM_UP_SIZE", 8)
        monkeypatch.setattr(gpu, "WARM_UP_SECONDS", 0.0)
        monkeypatch.setattr(gpu, "PROBE_COPY_BYTES", 1 << 16)
        monkeypatch.setattr(gpu, "PROBE_GEMM_SIZE", {"int8": 64, "float32": 64})
        monkeypatch.setattr("bench.roofs.PROBE_SECONDS", 0.0)
        monkeypatch.setattr("bench.ops.gemm.cold_bytes", lambda: 1 << 16)
        monkeypatch.setitem(MODELS, "tiny", [LayerShape("tiny", 32, 64, 8)])
        monkeypatch.setitem(DECODE_TOKENS, "tiny", [1, 3])
        monkeypatch.setitem(PREFILL_TOKENS, "tiny", [40])
        images = [ImageShape("tiny", 9, 8, 64), ImageShape("tiny", 9, 8, 64, kernel=7, stride=2)]
        monkeypatch.setitem(IMAGES, "tiny", images)
        monkeypatch.setitem(IMAGE_BATCH, "tiny", [1, 3])

    @pytest.mark.parametrize("group", list(groups_of()))
    def test_rows_of_every_group(self, group, small):
        found = Collector(make_timer(HostGpu()), 0.0, 8, 60.0, lambda _run: 1.0)
        cases = guarded_cases("tiny", {group: []}, found)
        rows = found.rows(gpu.collect("cpu", HostGpu(), cases, found))
        assert found.not_timed == []
        assert len(rows) >= 3
        for row in rows:
            assert COPY in row["timings"]
            assert row["share_of_roof"] > 0
            assert len(cells(row)) == len(HEADER)

    def test_a_fault_ends_the_run_and_keeps_its_rows(self, small):
        class Faulty(HostGpu):
            count = 0

            def synchronize(self):
                if found.measured:
                    raise torch.AcceleratorError("an illegal memory access was encountered")

        found = Collector(fixed_timer, 0.0, 2, 60.0, None)
        cases = [fake_case(shape="a"), fake_case(shape="b")]
        roofs = gpu.collect("cpu", Faulty(), cases, found)
        assert [row["shape"] for row in found.rows(roofs)] == ["a"]
        assert "illegal memory access" in found.not_timed[0]["reason"]

    def test_without_a_gpu_it_says_what_to_do(self):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(typer.BadParameter, match="make bench-gpu"):
            gpu.run()


def test_a_baseline_that_fails_is_dropped_with_its_reason():
    def fails():
        raise RuntimeError("self.size(0) needs to be greater than 16\nand more")

    case = fake_case(baselines={"copy": lambda: None, "good": lambda: None, "bad": fails})
    usable, dropped = usable_baselines(case)
    assert list(usable) == [COPY, "good"]
    assert dropped == ["bad: RuntimeError: self.size(0) needs to be greater than 16"]


class AllOnMeta(TorchDispatchMode):
    """Refuses an operation with an operand elsewhere: fakes look at shapes alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", f"{function}: an operand on {value.device}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("group", list(groups_of()))
def test_every_tensor_of_a_case_is_made_on_the_default_device(group):
    count = 0
    with torch.device("meta"):
        for case in group_cases(group, "gpu"):
            with AllOnMeta():
                case.run()
                for run in case.baselines.values():
                    run()
            count += 1
    assert count >= 10


def test_no_two_cases_share_a_name():
    with torch.device("meta"):
        names = [
            (case.op, case.shape) for group in groups_of() for case in group_cases(group, "gpu")
        ]
    assert len(names) == len(set(names))


def test_what_nvidia_smi_says_is_read():
    found = parse_query("580.159.04, 345, 2619, 1980, 2619, 700.00, [N/A]\n")
    assert found["driver"] == "580.159.04"
    assert found["sm_clock_mhz"] == 345.0
    assert found["temperature_c"] is None


def test_without_nvidia_smi_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert query("0:1:2.0") == dict.fromkeys(QUERIES)


def test_a_bus_that_nvidia_smi_does_not_know_stands_for_the_first_gpu(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--id*) exit 6;; esac\necho "580.1, 1, 2, 3, 4, 5, 6"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert query("0:1:2.0")["driver"] == "580.1"


@pytest.mark.parametrize("text", ["", "No devices were found", "1, 2"])
def test_another_answer_of_nvidia_smi_tells_nothing(text):
    assert parse_query(text) == dict.fromkeys(QUERIES)


def test_the_gpu_comes_first_in_a_result(tmp_path):
    told = {
        "name": "NVIDIA H100", "compute_capability": "9.0", "multiprocessors": 132,
        "memory_bytes": 80 << 30, "l2_bytes": 50 << 20, "count": 1, "cuda": "13.0",
        **parse_query("580.1, 345, 2619, 1980, 2619, 700.00, [N/A]"),
    }  # fmt: skip
    assert "580.1" in lines(told)[1]
    assert "345 of 1980 MHz" in lines(told)[1]
    machine = {
        "cpu": "c", "isa": "scalar", "threads": 1, "pinned_cores": [], "l2_bytes": 0, "l3_bytes": 0,
        "load_average": [0.0], "is_busy": False, "cores": 2, "date": "d", "commit": "c",
        "versions": {"torch": "2"}, "gpu": told,
    }  # fmt: skip
    assert report.machine_lines({"machine": machine})[0].startswith("NVIDIA H100, compute")
    assert report.machine_lines({"machine": {**machine, "gpu": {**told, "driver": None}}})
