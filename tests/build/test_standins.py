"""scripts/torch_cuda_standins.py makes libraries load that need absent ones."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "torch_cuda_standins.py"


def build(folder, name, code, *flags):
    command = ["cc", "-shared", "-fPIC", "-xc", "-", "-xnone", "-o", str(folder / name)]
    command += [f"-Wl,-soname,{name}", *map(str, flags)]
    subprocess.run(command, input=code, text=True, check=True)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    """libtorch_x.so, which needs two CUDA libraries, one with versions; and the runtime, which is there."""
    lib, absent = tmp_path / "lib", tmp_path / "absent"
    lib.mkdir()
    absent.mkdir()
    versions = absent / "versions.map"
    versions.write_text("libcublas.so.13 { global: *; };\n")
    runtime = tmp_path / "runtime.map"
    runtime.write_text("libcudart.so.13 { global: *; };\n")
    needed = [
        build(
            absent,
            "libcublas.so.13",
            "int cublasMake(void) { return 0; }\n",
            f"-Wl,--version-script={versions}",
        ),
        build(absent, "libnccl.so.2", "int ncclMake(void) { return 0; }\n"),
        build(
            tmp_path,
            "libcudart.so.13",
            "int cudaMake(void) { return 5; }\n",
            f"-Wl,--version-script={runtime}",
        ),
    ]
    code = """
int cublasMake(void); int ncclMake(void); int cudaMake(void);
int nothing(void) { return cudaMake(); }
int blas(void) { return cublasMake(); }
int nccl(void) { return ncclMake(); }
"""
    build(lib, "libtorch_x.so", code, "-Wl,--no-as-needed", *needed)
    for path in absent.iterdir():
        path.unlink()
    return lib


def make(folder, out):
    command = [sys.executable, str(SCRIPT), str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def call(folder, function, *paths):
    code = f"import ctypes; print(ctypes.CDLL({str(folder / 'libtorch_x.so')!r}).{function}())"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"LD_LIBRARY_PATH": ":".join(map(str, (*paths, folder.parent)))},
        check=False,
    )


def test_the_libraries_load(folder, tmp_path):
    assert call(folder, "nothing").returncode != 0
    out = tmp_path / "out"
    assert make(folder, out) == "libcublas.so.13: 1 functions\nlibnccl.so.2: 1 functions\n"
    assert sorted(path.name for path in out.iterdir()) == ["libcublas.so.13", "libnccl.so.2"]
    result = call(folder, "nothing", out)
    assert (result.stdout, result.stderr) == ("5\n", "")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("blas", "libcublas.so.13: cublasMake was called"),
        ("nccl", "libnccl.so.2: ncclMake was called"),
    ],
)
def test_a_call_ends_the_process_and_is_named(folder, tmp_path, function, message):
    make(folder, tmp_path / "out")
    result = call(folder, function, tmp_path / "out")
    assert result.returncode != 0
    assert message in result.stderr


def test_bad_arguments_are_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nowhere"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2
