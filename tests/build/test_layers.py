"""What each layer of the C++ may include, and how its files are named."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
TOOLKIT = re.compile(r"^(cuda_|cuda\.h|cub/|cutlass|cute/|thrust/)")
# A kernel is compiled once per instruction set: a standard header with inline code could leave an AVX-512 copy
# of a shared function behind (csrc/cpu/simd/simd.h, NOTE(odr)).
KERNEL_HEADERS = {"cstdint", "cmath", "cstring", "immintrin.h"}
BINDING_MAY_KNOW = {"cpu/isa.h", "cuda/gemm_path.h", "cuda/gemm_plan.h", "cuda/gemm_tiles.h"}
COMPILED_ONCE = {
    "isa.cc",
    "isa.h",
    "language_model.cc",
    "selective_scan_plan.cc",
    "team.cc",
    "team.h",
}


def includes(path):
    return INCLUDE.findall(path.read_text(encoding="utf-8"))


def files(*folders):
    found = [p for folder in folders for p in sorted((CSRC / folder).rglob("*")) if p.is_file()]
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda p: str(p.relative_to(CSRC)))


@files("cpu", "cuda", "include")
def test_kernels_know_no_torch(path):
    assert [name for name in includes(path) if FOREIGN.match(name)] == []


@files("cpu", "include")
def test_the_cpu_needs_no_toolkit(path):
    own = ("cpu/", "mambaquant/")
    names = [name for name in includes(path) if not name.startswith(own)]
    assert [name for name in names if TOOLKIT.match(name) or name.startswith("cuda/")] == []


@files("cuda")
def test_the_gpu_knows_no_cpu_kernel(path):
    assert [name for name in includes(path) if name.startswith("cpu/")] == []


@files("cuda")
def test_cutlass_stays_in_its_files(path):
    uses = [name for name in includes(path) if name.startswith(("cutlass/", "cute/"))]
    assert uses == [] or path.name.startswith(("gemm_cutlass", "gemm_sm90"))


@files("cuda")
def test_machine_instructions_stay_in_common(path):
    is_common = path.parent.name == "common"
    assert is_common or not re.search(r"\basm\b", path.read_text(encoding="utf-8"))


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
    """Only which instruction set, or which kernel of gemm, is in use: headers without kernels."""
    reached = [name for name in includes(path) if name.startswith(("cpu/", "cuda/"))]
    assert [name for name in reached if name not in BINDING_MAY_KNOW] == []


@files("torch")
def test_one_file_knows_torchs_cuda_library(path):
    uses = [name for name in includes(path) if name.startswith(("c10/cuda", "ATen/cuda"))]
    assert uses == [] or path.name == "backend_cuda.cpp"


@files("cpu", "cuda", "include", "torch")
def test_extension_tells_the_layer(path):
    allowed = {
        "cpu": {".cc", ".h"},
        "cuda": {".cu", ".cuh", ".h"},
        "include": {".h"},
        "torch": {".cpp", ".h"},
    }
    assert path.suffix in allowed[path.relative_to(CSRC).parts[0]]
