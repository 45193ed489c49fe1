"""A result as JSON, tables and a picture."""

import json
from dataclasses import asdict

import pytest
from bench.cpu.bars import PEER
from bench.cpu.engines import OURS
from bench.cpu.engines.engine import MAPPED, PACKING
from bench.cpu.picture import compared_engines
from bench.cpu.plan import Figure
from bench.cpu.probes import READ, REREAD
from bench.cpu.report import tables
from bench.cpu.rows import kernel_rows, model_rows, start_rows
from bench.cpu.shares import shares
from bench.harness import BenchCase, Timing
from bench.plot import draw
from bench.shapes import LANGUAGE_MODELS
from tests.bench.cpu.samples import M130, ROOFS, decode, prefill, samples_of

from bench import report

KERNEL = report.case_row(
    BenchCase("fake", "1x1", print, print, bytes_moved=1000, operations=10),
    {OURS: Timing(2, 1, 3, 1), "torch": Timing(4, 3, 5, 1)},
    ROOFS,
)


def start(engine, *seconds):
    parts = {"import_s": 0.1, "load_s": 0.2, "prompt_s": 0.3}
    sizes = {"own_bytes": 1 << 20, "mapped_bytes": 2 << 20, "peak_bytes": 3 << 20}
    starts = [{"seconds": s, **parts, **sizes} for s in seconds]
    return {"size": "m", "threads": 1, "engine": engine, "starts": starts}


def document():
    starts = [start(MAPPED, 1.0, 2.0), start(PACKING, 2.0, 4.0), start(PEER, 3.0, 6.0)]
    read = [1e-11, 1e-11]
    found = shares(
        samples_of(), {decode(1): {READ: read, REREAD: read}}, LANGUAGE_MODELS, {M130.name: 1 << 27}
    )
    return {
        "schema": report.SCHEMA,
        "command": "cpu",
        "preset": "quick",
        "rows": [*model_rows(samples_of()), *start_rows(starts), *kernel_rows([KERNEL])],
        "kernels": [KERNEL],
        "kernels_avx2": [],
        "bars": [],
        "long_prompts": [
            {"size": "m", "threads": 2, "tokens": 1024, "seconds": 0.5, "peak_bytes": 3 << 20, "grown_bytes": 0}
        ],
        "first_tokens": starts,
        "shares": [asdict(share) for share in found],
        "left_out": [{"engine": "e", "figure": "f", "why": "w"}],
        "engines": {},
    }  # fmt: skip


class TestDocument:
    def test_every_table_has_as_many_cells_as_titles(self):
        found = tables(document())
        assert [title for title, _, _ in found] == [
            "Kernels", "Whole models", "Prompts by length", "First token, from a process's start", "Left out",
            "Shares of the roofs",
        ]  # fmt: skip
        for _, header, body in found:
            assert {len(line) for line in body} == {len(header)}

    def test_a_long_prompt_in_tokens_and_mebibytes(self):
        (line,) = next(
            body for title, _, body in tables(document()) if title == "Prompts by length"
        )
        assert line == ["1,024", "m, 2 threads", "2,048", "3", "0.0"]

    def test_every_row_has_what_a_reader_of_json_looks_for(self):
        rows = document()["rows"]
        assert {row["unit"] for row in rows} == {"tokens/s", "s", "us"}
        for row in rows:
            assert set(row["spread"]) == {"ours", "peer", "ratio"}
            assert row["figure"] == f"{row['op']} {row['shape']}"
            assert row["timings"][OURS]["median_us"] > 0
            assert (row["peer"] is None) == (row["peer_name"] is None) == (row["ratio"] is None)

    def test_a_start_beside_every_other_way(self):
        rows = [row for row in document()["rows"] if row["unit"] == "s"]
        found = {row["peer_name"]: row["ratio"] for row in rows}
        assert found == {f"ours, {PACKING}": 2.0, PEER: 3.0}
        assert {row["figure"] for row in rows} == {"start m, 1 thread, 128 tokens"}

    def test_a_kernel_beside_its_baseline(self):
        (row,) = kernel_rows([KERNEL], "avx2")
        assert row["figure"] == "fake 1x1, avx2"
        assert (row["ours"], row["peer"], row["ratio"]) == (2, 4, 2.0)
        assert row["spread"] == {"ours": [1, 3], "peer": [3, 5], "ratio": None}

    def test_the_state_stands_beside_a_share(self):
        (line,) = next(body for t, _, body in tables(document()) if t == "Shares of the roofs")
        assert line[-1] == (
            "134.2 MB; read at 100.0 GB/s, again and again at 100.0; not counted: state 4.9 MB"
        )

    def test_json_keeps_every_list_of_rows(self, tmp_path):
        path = tmp_path / "cpu.json"
        values = json.loads(json.dumps(document()))
        report.write_json(values, path)
        assert report.read_json(path) == values
        assert len(path.read_text().splitlines()) > len(values["rows"]) + len(values["shares"])

    def test_the_plot_compares_the_longest_of_the_figures_that_most_engines_have(self):
        both, other = {OURS: [1.0, 1.0], PEER: [2.0, 2.0]}, Figure("prefill", "other", 2, 1, 4096)
        rows = model_rows({prefill(128): both, **samples_of(), prefill(512, 4): both, other: both})
        name, rates = compared_engines(rows, "prefill")
        assert name == f"prefill {prefill(512).shape}"
        assert set(rates) == {OURS, PEER}
        assert compared_engines(rows, "unheard") is None

    def test_a_picture_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        values = {
            **document(), "roofs": ROOFS.to_dict(), "machine": {"cpu": "c", "isa": "i", "threads": 2},
        }  # fmt: skip
        draw(values, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    def test_a_result_without_roofs_is_no_picture(self, tmp_path):
        with pytest.raises(ValueError, match="which has roofs"):
            draw(document(), tmp_path / "x.png")
