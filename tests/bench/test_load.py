"""bench.load without processes: which ways are measured, and which of the rounds counts."""

import pytest
import typer
from bench.cpu.engines import WAYS
from bench.cpu.engines.engine import PREPACKED, W8A8

from bench import load


@pytest.fixture
def measured(monkeypatch, tmp_path):
    dropped, rounds = [], dict.fromkeys(WAYS, 0)

    def first_token(way, folder, threads, _cores):
        assert (folder, threads) == (tmp_path, 2)
        rounds[way] += 1
        # The first of two rounds, warm and cold, is the slower one, though it imports more quickly.
        is_first = rounds[way] <= 2
        parts = {
            "import_s": 1.0 if is_first else 5.0,
            "load_s": 0.5,
            "prompt_s": 0.25 * (1 + is_first),
        }
        sizes = {"own_bytes": 1 << 20, "mapped_bytes": 2 << 20, "peak_bytes": 3 << 20}
        return {**parts, "seconds": sum(parts.values()), **sizes}

    monkeypatch.setattr(load, "first_token", first_token)
    monkeypatch.setattr(load, "drop_from_cache", dropped.append)
    return load.rows_of(tmp_path, 2, 2), dropped


def test_every_way_is_measured_warm_and_cold(measured, tmp_path):
    rows, dropped = measured
    assert [(row["op"], row["shape"]) for row in rows] == [
        (way, cache) for way in WAYS for cache in ("warm", "cold")
    ]
    assert dropped == [tmp_path / kind.file for kind in WAYS.values()] * 2
    assert {kind.file for kind in WAYS.values()} == {W8A8, PREPACKED}


def test_the_quickest_from_disk_counts_and_parts_add_up(measured):
    for row in measured[0]:
        cells = dict(zip(load.HEADER, load.cells(row), strict=True))
        assert (cells["imports ms"], cells["from disk ms"], cells["process ms"]) == (
            "5,000",
            "750",
            "5,750",
        )
        assert (cells["own MiB"], cells["mapped MiB"], cells["peak MiB"]) == ("1", "2", "3")


def test_an_unknown_size_is_refused():
    with pytest.raises(typer.BadParameter, match=r"expected one of mamba-130m, .*got mamba-9b"):
        load.run(size="mamba-9b")
