"""scripts/check_link.py names what a module lacks, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_link.py"


def build(folder, name, code, *flags):
    source = folder / f"{name}.cc"
    source.write_text(code)
    library = folder / f"lib{name}.so"
    command = ["c++", "-shared", "-fPIC", "-O0", str(source), "-o", str(library), *flags]
    subprocess.run(command, check=True)
    return library


def check(*paths):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, paths)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def module(tmp_path):
    """Uses the C library, the interpreter, a weak symbol and one function of another library."""
    return build(
        tmp_path,
        "module",
        "#include <cstdio>\n"
        'extern "C" void Py_Initialize();\n'
        "[[gnu::weak]] void perhaps();\n"
        "namespace other { int used(int); }\n"
        'int f() { Py_Initialize(); if (perhaps) perhaps(); std::puts("x"); return other::used(1); }\n',
    )


def test_what_is_missing_is_named(tmp_path, module):
    library = build(tmp_path, "other", "namespace other { int used(long) { return 1; } }\n")
    result = check(module, library)
    assert result.returncode == 1
    assert result.stdout == "libmodule.so: nothing defines other::used(int)\n"


def test_a_complete_module_passes(tmp_path, module):
    empty = build(tmp_path, "empty", "")
    library = build(tmp_path, "other", "namespace other { int used(int) { return 1; } }\n")
    result = check(module, empty, library)
    assert result.returncode == 0, result.stdout


def test_a_versioned_library_counts(tmp_path, module):
    script = tmp_path / "script.map"
    script.write_text("libother.so.1 { global: *; };\n")
    code = "namespace other { int used(int) { return 1; } }\n"
    library = build(tmp_path, "other", code, f"-Wl,--version-script={script}")
    assert check(module, library).returncode == 0


def test_bad_arguments_are_refused(tmp_path, module):
    assert check(module).returncode == 2
    result = check(module, tmp_path / "nowhere.so")
    assert result.returncode == 2
    assert "nowhere.so" in result.stderr
