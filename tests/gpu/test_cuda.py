"""What a GPU does that the simulator has none of: streams, threads, graphs, several devices, a host that runs ahead.

Skipped where the build has no CUDA kernels or the machine no GPU; `make test-gpu` builds and runs them.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import backends
from gpu import calls
from tolerances import assert_equal

REASON = backends.reason_to_skip("cuda")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

every_operator = pytest.mark.parametrize("name", calls.MAKERS)
every_launcher = pytest.mark.parametrize("name", calls.WITHOUT_WAITING)
SPIN_CYCLES = 400_000_000  # a fifth of a second at 2 GHz, far beyond what the host needs for a call


def call(name, arguments):
    return calls.outputs(calls.operator(name)(*arguments.values()), arguments)


def expected_of(name, seed=calls.SEED):
    """The results alone on the default stream, as copies."""
    found = call(name, calls.arguments_of(name, "cuda", seed))
    torch.cuda.synchronize()
    return [tensor.clone() for tensor in found]


def assert_all_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)


def overwrite(arguments, others):
    """Copies the values of other arguments into the tensors of `arguments`."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value.copy_(others[name])


@every_launcher
def test_a_graph_replayed_with_new_inputs_gives_the_same_bits(name):
    buffers, other = calls.arguments_of(name, "cuda"), calls.arguments_of(name, "cuda", seed=1)
    expected = expected_of(name, seed=1)
    call(name, buffers)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(name, buffers)
    for _ in range(2):
        overwrite(buffers, other)
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(found, expected)


def test_a_graph_of_a_decode_step_follows_the_eager_one():
    step = calls.DecodeStep("cuda")
    eager_states, states = step.states(), step.states()
    stream = step.stream(0)
    step(stream, *step.states())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(stream, *states)
    for seed in range(5):
        expected = step(step.stream(seed), *eager_states)
        stream.copy_(step.stream(seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal([out, *states], [expected, *eager_states])


def test_four_threads_on_four_streams_give_the_same_bits():
    step = calls.DecodeStep("cuda")
    tokens = 20

    def generate(seed):
        states = step.states()
        outs = [step(step.stream(seed + t), *states) for t in range(tokens)]
        return [*outs, *states]

    expected = [generate(100 * thread) for thread in range(4)]
    torch.cuda.synchronize()
    together = threading.Barrier(4)

    def run(thread):
        with torch.cuda.stream(torch.cuda.Stream()):
            together.wait()
            found = generate(100 * thread)
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run, range(4)), expected, strict=True):
            assert_all_equal(found, wanted)


@every_operator
def test_a_call_runs_on_the_current_stream(name):
    """The new inputs arrive late on that stream: a launch elsewhere would read the old ones."""
    expected = expected_of(name, seed=1)
    buffers, other = calls.arguments_of(name, "cuda"), calls.arguments_of(name, "cuda", seed=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES // 4)
        overwrite(buffers, other)
        found = [tensor.clone() for tensor in call(name, buffers)]
    stream.synchronize()
    assert_all_equal(found, expected)


@every_launcher
def test_a_call_returns_while_the_gpu_is_still_busy(name):
    arguments = calls.arguments_of(name, "cuda")
    call(name, arguments)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # what waits through torch raises
    try:
        torch.cuda._sleep(SPIN_CYCLES)
        before = torch.cuda.Event()
        before.record()
        call(name, arguments)
        is_busy = not before.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert is_busy, "the call returned after the GPU was done with what came before it"


@every_operator
def test_opcheck(name):
    torch.library.opcheck(calls.operator(name), tuple(calls.arguments_of(name, "cuda").values()))


@every_operator
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_a_tensor_of_the_second_device_is_served_there(name):
    expected = expected_of(name)
    assert torch.cuda.current_device() == 0
    found = call(name, calls.arguments_of(name, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {tensor.device.index for tensor in found} == {1}
    assert_all_equal([tensor.to("cuda:0") for tensor in found], expected)


# Last: a kernel that reads host memory would take the tests after it down.
@every_operator
def test_tensors_of_mixed_devices_are_refused(name):
    arguments = calls.arguments_of(name, "cuda")
    tensors = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]
    if len(tensors) == 1:
        pytest.skip("takes one tensor")
    for moved in tensors:
        mixed = {**arguments, moved: arguments[moved].cpu()}
        with pytest.raises((ValueError, RuntimeError), match="device"):
            call(name, mixed)
    torch.cuda.synchronize()
