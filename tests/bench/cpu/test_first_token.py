"""The time to a first token: parts that add up, and what they hold in memory."""

import time

import pytest
from bench.cpu.engines.engine import MAPPED, PREPACKED
from bench.cpu.first_token import TOKENS, first_token

from bench.cpu import first_token as module


class FakeWorker:
    def __init__(self, name, folder, threads, cores):
        assert (name, threads, cores) == (MAPPED, 2, [0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ready(self):
        return {"imported_at": time.time() + 1.5, "load_s": 0.25, "own_bytes_before": 100}

    def ask(self, call, **arguments):
        if call == "memory":
            assert arguments["folder"].endswith(f"models/{PREPACKED}")
            return {"own_bytes": 150, "mapped_bytes": 7, "peak_bytes": 1000}
        assert (call, arguments) == ("prefill", {"batch": 1, "tokens": TOKENS, "calls": 1})
        return {"seconds": 0.5}


def test_parts_add_up(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "Worker", FakeWorker)
    found = first_token(MAPPED, tmp_path / "models", 2, [0])
    assert found["import_s"] == pytest.approx(1.5, abs=0.5)
    assert found["seconds"] == found["import_s"] + 0.25 + 0.5
    assert (found["own_bytes"], found["mapped_bytes"], found["peak_bytes"]) == (50, 7, 1000)


def test_a_folder_is_dropped_from_the_cache_file_by_file(monkeypatch, tmp_path):
    names = {"a": 3, "b": 0}
    for name, size in names.items():
        (tmp_path / name).write_bytes(bytes(size))
    dropped = []
    monkeypatch.setattr(module.os, "posix_fadvise", lambda *args: dropped.append(args[1:3]))
    module.drop_from_cache(tmp_path)
    assert dropped == [(0, 0)] * len(names)  # from the start, to the end
