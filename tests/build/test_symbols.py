"""No object of one instruction set may define a function that the linker could pick for another."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_symbols.py"


def check(build_dir):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(build_dir)], capture_output=True, text=True, check=False
    )


def release_builds():
    """Folders that `pip install .` built in; the sanitizer's objects are of another kind."""
    return [p for p in (ROOT / "build").glob("cp*") if any(p.rglob("*.o"))]


def test_release_objects_define_no_shared_weak_symbol():
    builds = release_builds()
    if not builds:
        pytest.skip("no release build under build/ (make test makes one)")
    for build in builds:
        result = check(build)
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_weak_symbol_is_found(tmp_path):
    """The check can fail: an inline function outside the ISA's namespace is named."""
    folder = tmp_path / "CMakeFiles" / "mambaquant_avx2.dir"
    folder.mkdir(parents=True)
    source = tmp_path / "bad.cc"
    source.write_text(
        "inline int shared_helper() { return 1; }\nint use() { return shared_helper(); }\n"
    )
    command = ["c++", "-O0", "-c", str(source), "-o", str(folder / "bad.cc.o")]
    subprocess.run(command, check=True)
    result = check(tmp_path)
    assert result.returncode == 1
    assert "shared_helper" in result.stdout


def test_a_folder_without_objects_is_refused(tmp_path):
    assert check(tmp_path).returncode == 2
