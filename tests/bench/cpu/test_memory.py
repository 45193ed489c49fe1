"""Memory as /proc tells it, of a process that is made up."""

import pytest

from bench.cpu import memory

SMAPS = """\
7f0000000000-7f0000100000 r--p 00000000 00:01 5      {folder}/model.safetensors
Rss:                 100 kB
Anonymous:             0 kB
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
Rss:                  64 kB
Anonymous:            64 kB
7f0000400000-7f0000500000 r-xp 00000000 00:01 6      /usr/lib/libc.so.6
Rss:                  32 kB
Anonymous:             4 kB
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    (tmp_path / "smaps").write_text(SMAPS.format(folder=tmp_path.resolve() / "model"))
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    return tmp_path


def test_resident_and_peak(process):
    assert (memory.resident(), memory.peak()) == (1 << 20, 2 << 20)


def test_what_is_its_own_and_what_is_mapped_by_any_name_of_the_folder(process, monkeypatch):
    expected = (68 << 10, 100 << 10)
    assert memory.own_and_mapped(process / "model") == expected
    monkeypatch.chdir(process)
    assert memory.own_and_mapped(memory.Path("model")) == expected


def test_of_another_folder_nothing_is_mapped(process):
    assert memory.own_and_mapped(process / "mod")[1] == 0
