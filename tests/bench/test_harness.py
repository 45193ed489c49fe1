"""The bench commands: what they call, refuse, write and compare. Nothing here measures time."""

import json
import time
from dataclasses import replace

import pytest
import typer
from bench.compare import compare, ratios, slower
from bench.harness import COMPILED, EAGER, BenchCase, Timing, all_cases, interleave, measure
from bench.machine import describe
from bench.roofs import Roofs
from bench.run import collect

from bench import report

ROOFS = Roofs({"L2": 4e9, "L3": 2e9, "memory": 1e9}, {"int8": 8e9, "float32": 1e9}, 5.0)


def pause():
    time.sleep(0.0015)


def fake_case(check=lambda: None, run=lambda: None, **changes):
    values = {"op": "fake", "shape": "1x1", "bytes_moved": 1000, "operations": 10, **changes}
    return BenchCase(run=run, check=check, **values)


def timings(median_us, **baselines):
    """Timings of "ours" and of baselines, given by their medians."""
    return {
        name: Timing(m, m - 1, m + 1, m - 2) for name, m in {"ours": median_us, **baselines}.items()
    }


def result(**medians):
    rows = [
        {"op": "op", "shape": shape, **report.timing_values(timings(median))}
        for shape, median in medians.items()
    ]
    machine = {"cpu": "c", "isa": "scalar", "threads": 1}
    return {"schema": report.SCHEMA, "machine": machine, "rows": rows}


class TestInterleave:
    def test_calls_take_turns_in_equal_rounds(self):
        # Each call outlasts the millisecond of a sample, so that a sample is one call.
        calls = []
        runs = {name: lambda name=name: calls.append(name) or pause() for name in "abc"}
        interleave(runs, seconds=0.0, minimum_rounds=4)
        warm_up, rounds = calls[:6], calls[6:]
        assert warm_up == ["a", "a", "b", "b", "c", "c"]
        assert rounds == ["a", "b", "c"] * 4

    def test_quartiles_are_in_order(self):
        timing = interleave({"a": pause}, seconds=0.0, minimum_rounds=4)["a"]
        assert timing.best_us <= timing.lower_us <= timing.median_us <= timing.upper_us


class TestMeasure:
    def test_a_wrong_kernel_is_never_timed(self):
        def wrong():
            raise AssertionError("off by one")

        case = fake_case(wrong, lambda: pytest.fail("timed"))
        with pytest.raises(AssertionError, match="off by one"):
            measure(case)

    def test_a_wrong_kernel_is_named(self):
        def wrong():
            raise AssertionError("off by one")

        with pytest.raises(AssertionError, match="fake 1x1: wrong result: off by one"):
            collect([fake_case(wrong)], 0.0, probe=lambda: ROOFS)

    def test_the_check_comes_first_and_baselines_are_timed(self):
        order = []
        case = fake_case(
            lambda: order.append("check"),
            lambda: order.append("ours"),
            baselines={"plain": lambda: order.append("plain")},
        )
        assert set(measure(case, 0.0, 2)) == {"ours", "plain"}
        assert order[0] == "check"
        assert order.count("check") == 1
        assert {"ours", "plain"} <= set(order)

    def test_plain_torch_is_compiled_where_a_run_asks_for_it(self, monkeypatch):
        monkeypatch.setattr("torch.compile", lambda run, dynamic: lambda: compiled.append(run))
        compiled = []

        def eager():
            pass

        case = fake_case(baselines={EAGER: eager})
        assert set(measure(case, 0.0, 2)) == {"ours", EAGER}
        assert set(measure(case, 0.0, 2, compiled=True)) == {"ours", EAGER, COMPILED}
        assert set(compiled) == {eager}
        own = fake_case(baselines={EAGER: eager, COMPILED: lambda: compiled.append("own")})
        measure(own, 0.0, 2, compiled=True)
        assert compiled[-1] == "own"


class TestRow:
    def test_memory_bound(self):
        # 40 kB at 4 GB/s are 10 us, of 40: a quarter of the roof.
        row = report.case_row(fake_case(bytes_moved=40_000), timings(40, plain=80), ROOFS)
        assert row["bound"] == "memory"
        assert row["share_of_roof"] == pytest.approx(0.25)
        assert row["bytes_per_second"] == pytest.approx(1e9)
        assert row["times_baseline"] == {"plain": pytest.approx(2.0)}

    def test_arithmetic_bound_by_the_rate_of_its_arithmetic(self):
        case = fake_case(operations=80_000, arithmetic="int8")
        row = report.case_row(case, timings(20), ROOFS)
        assert row["bound"] == "arithmetic"
        assert row["share_of_roof"] == pytest.approx(0.5)
        assert row["operations_per_second"] == pytest.approx(4e9)

    def test_too_small_for_its_call(self):
        assert report.case_row(fake_case(), timings(20), ROOFS)["bound"] == "call"

    def test_a_rotating_working_set_is_held_against_memory(self, monkeypatch):
        sizes = {2: 1 << 10, 3: 1 << 20}
        monkeypatch.setattr("bench.machine.cache_bytes", sizes.get)
        case = fake_case(bytes_moved=40_000, working_set_bytes=1 << 30)
        row = report.case_row(case, timings(40), ROOFS)
        assert row["working_set_in"] == "memory"
        assert row["share_of_roof"] == pytest.approx(1.0)


def test_the_higher_roof_counts():
    other = Roofs({"L2": 1e9, "L3": 3e9, "memory": 1e9}, {"int8": 9e9, "float32": 1e8}, 7.0)
    best = ROOFS.best(other)
    assert best.copy == {"L2": 4e9, "L3": 3e9, "memory": 1e9}
    assert best.arithmetic == {"int8": 9e9, "float32": 1e9}
    assert best.call_us == 5.0
    assert best.read is None


def test_a_roof_that_only_one_probed_counts():
    probed = replace(ROOFS, read=2e9)
    assert ROOFS.best(probed).read == probed.best(ROOFS).read == 2e9
    assert probed.best(replace(ROOFS, read=3e9)).read == 3e9


def test_a_run_survives_json(tmp_path):
    values = {
        "schema": report.SCHEMA,
        "machine": describe([0]),
        **collect([fake_case(baselines={"plain": lambda: None})], 0.0, 2, probe=lambda: ROOFS),
    }
    path = tmp_path / "deep" / "run.json"
    report.write_json(values, path)
    assert report.read_json(path) == json.loads(path.read_text()) == values
    assert set(values["roofs"]) == {"copy", "arithmetic", "call_us", "read"}
    assert set(values["machine"]) == {
        "cpu", "cores", "isa", "threads", "pinned_cores", "l2_bytes", "l3_bytes", "load_average",
        "is_busy", "date", "commit", "versions",
    }  # fmt: skip
    assert set(values["machine"]["versions"]) == {"mambaquant_ext", "torch", "python", "compiler"}
    (row,) = values["rows"]
    assert set(row) == {
        "op", "shape", "bytes_moved", "operations", "arithmetic", "working_set_bytes",
        "working_set_in", "timings", "times_baseline", "bytes_per_second",
        "operations_per_second", "share_of_roof", "bound",
    }  # fmt: skip
    assert set(row["timings"]) == {"ours", "plain"}
    assert set(row["timings"]["ours"]) == {"median_us", "lower_us", "upper_us", "best_us"}


def test_markdown_has_a_line_for_each_row():
    values = {"machine": describe([0]), **collect([fake_case()], 0.0, 2, probe=lambda: ROOFS)}
    body = [report.cells(row) for row in values["rows"]]
    lines = report.markdown("T", values, report.HEADER, body).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(body)
    assert {line.count("|") for line in table} == {len(report.HEADER) + 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0}'])
def test_a_file_that_is_no_result_is_refused(text, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected"):
        report.read_json(path)


class TestCompare:
    def test_ratios_are_of_rows_that_both_have(self):
        found = ratios(result(a=10, b=10, gone=1), result(a=15, b=5, new=1))
        assert found == {("op", "a"): 1.5, ("op", "b"): 0.5}

    def test_exactly_the_allowed_loss_is_no_loss(self):
        assert slower({("op", "a"): 1.25, ("op", "b"): 1.26}, 25.0) == [("op", "b")]

    @pytest.mark.parametrize(
        ("after", "max_loss", "code"), [(10.9, 10.0, 0), (11.1, 10.0, 1), (11.1, 20.0, 0)]
    )
    def test_exit_code(self, after, max_loss, code, tmp_path):
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        report.write_json(result(a=10), old)
        report.write_json(result(a=after), new)
        if code == 0:
            compare(old, new, max_loss)
            return
        with pytest.raises(typer.Exit) as error:
            compare(old, new, max_loss)
        assert error.value.exit_code == code

    def test_nothing_in_common_is_an_error(self, tmp_path):
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        report.write_json(result(a=10), old)
        report.write_json(result(b=10), new)
        with pytest.raises(typer.BadParameter, match="no row in common"):
            compare(old, new)


def test_names_select_groups_and_operators():
    assert {case.op for case in all_cases("quick", ["quantize_dynamic"])} == {"quantize_dynamic"}
    with pytest.raises(ValueError, match=r"expected one of .*norm.*got 'speed'"):
        list(all_cases("quick", ["speed"]))
    assert {case.op for case in all_cases("quick", ["norm"])} == {
        "rmsnorm_quantize", "layernorm_quantize",
    }  # fmt: skip


def test_no_two_cases_share_a_name():
    names = [
        (case.op, case.shape)
        for group in ("conv1d", "norm", "quantize")
        for case in all_cases("quick", [group])
    ]
    assert len(names) == len(set(names)) > 0
