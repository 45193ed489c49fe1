"""self_test: ok on every instruction set, and a report that names the kernel where one is wrong."""

import pytest
import torch

from mambaquant_ext import ops, self_test

CONV, CONV_UPDATE = "causal_conv1d_quantize", "causal_conv1d_update_quantize"
KERNELS = [
    *("quantize", "quantize_dynamic", "dequantize", "rmsnorm_quantize", "layernorm_quantize"),
    *("hadamard_transform", "hadamard_quantize", "gemm", "gemm_dequantize", "gemm_requantize"),
    *(CONV, CONV_UPDATE, "depthwise_conv2d_quantize", "selective_scan", "selective_scan_update"),
]


def test_every_kernel_is_ok(isa):
    assert self_test() == dict.fromkeys(KERNELS, "ok")


def test_every_operator_is_tested():
    """Packing is part of the gemms."""
    operators = {name for name in ops.__all__ if hasattr(torch.ops.mambaquant, name)}
    assert operators - {"pack_gemm_weight"} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_wrong_result_is_reported(name, monkeypatch):
    """One value off by two int8 steps, or by a thousandth of the largest float."""
    original = getattr(ops, name)

    def wrong(*args, **kwargs):
        result = original(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        flat = first.view(-1)
        index = int(flat.float().abs().argmin())
        flat[index] += 1e-3 * flat.abs().max() if first.is_floating_point() else 2
        return result

    monkeypatch.setattr(ops, name, wrong)
    report = self_test()
    assert report[name] != "ok"
    others = {key: status for key, status in report.items() if key != name and status != "ok"}
    # A step of the conv is held against the whole.
    assert set(others) <= ({CONV_UPDATE} if name == CONV else set())


def test_operator_that_raises_is_reported(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "gemm", broken)
    assert self_test()["gemm"] == "RuntimeError: no such kernel"
