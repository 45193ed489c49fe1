"""The report of registers and spills: what it reads, and that it refuses spills and missing architectures."""

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ptxas_report

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "ptxas_report.py"
LAUNCHER = ROOT / "scripts" / "nvcc_with_report.py"
ENTRY = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for '{architecture}'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]
"""
NAME = "_ZN10mambaquant4cuda10row_kernelI6__halfLi8EEEvNS_14QuantizeParamsE"


def write(folder, *entries):
    text = "".join(
        ENTRY.format(name=NAME, architecture=a, registers=r, spills=s) for a, r, s in entries
    )
    (folder / "row.cu.o.ptxas").write_text(text)


def check(folder):
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_registers_and_shared_memory_are_read(tmp_path):
    write(tmp_path, ("sm_80", 40, 0), ("sm_90a", 64, 0))
    first, second = ptxas_report.read_reports(tmp_path)
    assert first.kernel == second.kernel == "row_kernel<f16, 8>"
    assert (first.source, first.architecture, first.registers) == ("row.cu", "sm_80", 40)
    assert (second.registers, second.shared_bytes, second.spill_bytes) == (64, 4096, 0)
    done = check(tmp_path)
    assert done.returncode == 0
    assert "1 kernels on sm_80, sm_90a: no spills, at most 64 registers" in done.stdout


def test_a_spill_is_refused(tmp_path):
    write(tmp_path, ("sm_80", 255, 8))
    done = check(tmp_path)
    assert done.returncode == 1
    assert "row_kernel<f16, 8> spills 16 bytes on sm_80" in done.stdout


def test_a_missing_architecture_is_refused(tmp_path):
    write(tmp_path, ("sm_80", 40, 0))
    other = ENTRY.format(name="_Z5otherv", architecture="sm_90a", registers=9, spills=0)
    with (tmp_path / "row.cu.o.ptxas").open("a") as file:
        file.write(other)
    done = check(tmp_path)
    assert done.returncode == 1
    assert "lacks sm_90a" in done.stdout


def test_a_folder_without_reports_is_refused(tmp_path):
    assert check(tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # 2,048 threads
        (128, 256, 0, 2),  # 65,536 registers
        (32, 256, 80 * 1024, 2),  # 164 KiB
        (16, 32, 0, 32),  # 32 blocks
        (33, 1024, 0, 1),  # 40 x 1,024 registers
    ],
)
def test_blocks_per_multiprocessor(registers, threads, shared, blocks):
    kernel = ptxas_report.KernelResources("s", "k", "sm_80", registers, 0, 0, 0)
    assert ptxas_report.blocks_per_multiprocessor(kernel, threads, shared) == blocks


def test_the_launcher_keeps_the_report_and_the_exit_status(tmp_path):
    fake = tmp_path / "nvcc"
    fake.write_text('#!/bin/sh\necho "ptxas info    : Used 3 registers" >&2\nexit 3\n')
    fake.chmod(0o755)
    target = tmp_path / "x.cu.o"
    command = [sys.executable, str(LAUNCHER), str(fake), "-c", "x.cu", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == ""
    assert "Used 3 registers" in (tmp_path / "x.cu.o.ptxas").read_text()
