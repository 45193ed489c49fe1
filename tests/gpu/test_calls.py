"""What tests/gpu calls, on the CPU: the arguments fit, and a token's way through a block works."""

from pathlib import Path

import pytest
import torch
from scripts import gen_docs
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu import calls
from mambaquant_ext import ops
from tolerances import assert_equal

ROOT = Path(__file__).parents[2]


def test_every_operator_has_arguments():
    assert set(calls.MAKERS) == set(gen_docs.schemas())


@pytest.mark.parametrize("name", calls.MAKERS)
def test_arguments_fit(name):
    arguments = calls.arguments_of(name, "cpu")
    found = calls.outputs(calls.operator(name)(*arguments.values()), arguments)
    other = calls.arguments_of(name, "cpu", seed=1)
    changed = calls.outputs(calls.operator(name)(*other.values()), other)
    assert any(not torch.equal(a, b) for a, b in zip(found, changed, strict=True))


def test_a_decode_step_depends_on_its_input_and_its_states():
    step = calls.DecodeStep("cpu")
    states = step.states()
    first, second = step(step.stream(1), *states), step(step.stream(2), *states)
    again = step.states()
    assert_equal(step(step.stream(1), *again), first)
    assert_equal(step(step.stream(2), *again), second)
    assert not torch.equal(step(step.stream(2), *step.states()), second)
    assert all(first.isfinite().flatten())
    assert (first - step.stream(1)).abs().max() > 0
    assert states[1].abs().max() > 0


@pytest.mark.parametrize("name", calls.MAKERS)
def test_tensors_of_mixed_devices_are_refused(name):
    """The binding's own check, without a GPU: its CPU kernel meets one tensor on meta at a time."""
    arguments = calls.arguments_of(name, "cpu")
    tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for moved in tensors if len(tensors) > 1 else []:
        mixed = {**arguments, moved: arguments[moved].to("meta")}
        with pytest.raises(ValueError, match=r"expected \w+ on device"):
            calls.operator(name).redispatch(cpu, *mixed.values())


def test_a_weight_on_a_gpu_has_the_layout_of_its_kernels():
    """As a compiled program sees it: a fake of another layout would be refused by the product that takes it."""
    with FakeTensorMode():
        weight = torch.empty(9, 7, dtype=torch.int8, device="cuda")
        packed, layout = ops.pack_gemm_weight(weight)
    header = (ROOT / "csrc" / "include" / "mambaquant" / "gemm.h").read_text(encoding="utf-8")
    assert f"kCudaGemmLayout = {layout};" in header
    assert packed.device.type == "cuda"
