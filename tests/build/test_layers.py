"""What each layer of the C++ may include, and how its files are named."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|cuda|Python\.h)")
# A kernel is compiled once per instruction set: a standard header with inline code could leave an AVX-512 copy
# of a shared function behind (csrc/cpu/simd/simd.h, NOTE(odr)).
KERNEL_HEADERS = {"cstdint", "cmath", "cstring", "immintrin.h"}
COMPILED_ONCE = {"isa.cc", "isa.h", "selective_scan_plan.cc"}


def includes(path):
    return INCLUDE.findall(path.read_text(encoding="utf-8"))


def files(*folders):
    found = [p for folder in folders for p in sorted((CSRC / folder).rglob("*")) if p.is_file()]
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda p: str(p.relative_to(CSRC)))


@files("cpu", "include")
def test_kernels_know_no_torch(path):
    assert [name for name in includes(path) if FOREIGN.match(name)] == []


@files("cpu")
def test_kernels_use_no_standard_header_with_inline_code(path):
    if path.name in COMPILED_ONCE:
        return
    own = ("cpu/", "mambaquant/")
    assert [n for n in includes(path) if not n.startswith(own) and n not in KERNEL_HEADERS] == []


@files("include")
def test_params_know_no_backend(path):
    own = [name for name in includes(path) if "/" in name]
    assert [name for name in own if not name.startswith("mambaquant/")] == []


@files("torch")
def test_bindings_know_no_kernel(path):
    """Only which instruction set is in use: the packing of weights depends on it."""
    reached = [name for name in includes(path) if name.startswith("cpu/")]
    assert [name for name in reached if name != "cpu/isa.h"] == []


@files("cpu", "include", "torch")
def test_extension_tells_the_layer(path):
    allowed = {"cpu": {".cc", ".h"}, "include": {".h"}, "torch": {".cpp", ".h"}}
    assert path.suffix in allowed[path.relative_to(CSRC).parts[0]]
