"""Probes that find the quickest way, whatever the machine."""

import pytest
import torch
from bench.cpu.plan import Figure
from bench.cpu.probes import INT8, READ, REREAD, SCAN, Probes
from bench.roofs import Reader, memory_readers
from bench.shapes import LanguageShape, LayerShape

from bench.cpu import probes

TINY = LanguageShape(LayerShape("tiny", 16, 32, 4), layers=2)


@pytest.fixture
def clocked(monkeypatch):
    """Probes whose calls take as long as they say."""
    sizes = []

    def readers(size_bytes=1 << 40):
        sizes.append(size_bytes)
        return [Reader(f"{s} s", 10, lambda s=s: s) for s in (4.0, 2.0, 3.0)]

    monkeypatch.setattr(probes, "memory_readers", readers)
    monkeypatch.setattr(probes, "int8_gemm", lambda: lambda: 1.0)
    monkeypatch.setattr(probes, "_scan", lambda _shape, tokens: lambda: 1e-3 * tokens**1.5)
    monkeypatch.setattr(probes, "seconds_of", lambda run, _calls: run())
    return sizes


def figure(op, tokens):
    return Figure(op, "tiny", 1, 1, tokens)


def test_the_quickest_reader_counts(clocked):
    found = Probes(1 << 20).calls(figure("decode", 1), TINY)
    assert {name: probe() for name, probe in found.items()} == {READ: 0.2, REREAD: 0.2}
    assert clocked == [1 << 40, 1 << 20]


def test_nothing_is_read_again_where_the_size_is_unknown(clocked):
    assert set(Probes(0).calls(figure("decode", 1), TINY)) == {READ}


def test_a_scan_in_pieces_counts_where_it_is_quicker(clocked):
    found = Probes(0).calls(figure("prefill", 512), TINY)
    assert found[SCAN]() == pytest.approx(4 * 1e-3 * 128**1.5)
    assert set(found) == {INT8, SCAN}


def test_a_short_prompt_has_no_probe(clocked):
    assert Probes(0).calls(figure("prefill", 1), TINY) == {}


def test_a_sample_is_the_mean_of_as_many_calls_as_fill_it(monkeypatch):
    asked = []

    def seconds_of(_run, calls):
        asked.append(calls)
        return 0.005

    monkeypatch.setattr(probes, "seconds_of", seconds_of)
    sample = probes._mean_of_calls(lambda: None, 2)
    assert sample() == 0.0025
    assert asked == [1, 10]


def test_every_reader_reads_all_of_it():
    readers = memory_readers(1 << 12)
    assert [reader.size_bytes for reader in readers] == [1 << 12] * 3
    ones = torch.ones(512, dtype=torch.float64)
    for reader, dtype in zip(readers, (torch.float64, torch.float32, torch.int64), strict=True):
        assert reader.run() == ones.view(dtype).sum()
    assert readers[0].run() == 512
