"""What the command refuses, and what a failure costs."""

from types import SimpleNamespace

import pytest
import typer
from bench.cpu.kernels import KernelError, measure_kernels

from bench.cpu import __main__ as cpu


class TestCommand:
    @pytest.mark.parametrize("options", [{"size": ["mamba-9b"]}, {"engine": ["onnx"]}])
    def test_unknown_names_are_refused(self, options):
        (name,) = (n for names in options.values() for n in names)
        with pytest.raises(typer.BadParameter, match=f"expected some of mamba-130m, .*got {name}"):
            cpu.run(**options)

    def test_kernels_that_fail_cost_no_other_result(self, monkeypatch, tmp_path):
        def failing(command, **_options):
            assert command[1:5] == ["-m", "bench.run", "--preset", "cpu"]
            assert command[-2:] == ["--isa", "avx2"]
            return SimpleNamespace(returncode=1, stderr="...\nAssertionError: gemm: wrong result\n")

        monkeypatch.setattr("bench.cpu.kernels.subprocess.run", failing)
        with pytest.raises(KernelError, match="AssertionError: gemm: wrong result"):
            measure_kernels(2, tmp_path / "x.json", "avx2")
