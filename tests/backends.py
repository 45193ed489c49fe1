"""The places where an operator can run: the CPU's instruction sets, the simulator, a GPU."""

from contextlib import contextmanager

import torch

import mambaquant_ext
from mambaquant_ext import _C, ops

ISAS = ("scalar", "avx2", "avx512_vnni")
HAS_SIMULATOR = hasattr(_C, "set_simulating")
# What the build holds. Whether this machine runs it is another question: reason_to_skip.
NAMES = (*ISAS, *(["cudasim"] if HAS_SIMULATOR else []), *(["cuda"] if _C.has_cuda else []))

if HAS_SIMULATOR:
    _C.set_simulator_checks("race=error")  # the others are on by default


def reason_to_skip(name):
    """Why this build or machine cannot run a backend, or None."""
    if name == "cudasim":
        return None if HAS_SIMULATOR else "this build has no simulator (make test-sim builds one)"
    if name == "cuda":
        if not _C.has_cuda:
            return "this build has no CUDA kernels"
        return None if torch.cuda.is_available() else "this machine has no GPU"
    return None if name in mambaquant_ext.supported_isas() else f"no {name} here"


class Backend:
    """`mambaquant_ext.ops` on one backend: takes CPU tensors and returns CPU tensors.

    An operator that writes into an argument writes into the caller's tensor here too.
    """

    def __init__(self, name):
        self.name = name
        self.is_cuda = name in ("cudasim", "cuda")

    def __getattr__(self, op):
        function = getattr(ops, op)

        def call(*args, **kwargs):
            with self.active():
                if self.name != "cuda":
                    return function(*args, **kwargs)
                return self._call_on_gpu(function, args, kwargs)

        return call

    @contextmanager
    def active(self):
        """Operators that are called on CPU tensors run on this backend; a GPU wants tensors of its own."""
        if self.name in ISAS:
            with mambaquant_ext.forced_isa(self.name):
                assert mambaquant_ext.current_isa() == self.name
                yield
        elif self.name == "cudasim":
            _C.set_simulating(True)
            # Fresh outputs hold NaN or the largest integer: what a kernel leaves unwritten shows.
            torch.use_deterministic_algorithms(True)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)
                _C.set_simulating(False)
        else:
            yield

    @staticmethod
    def _call_on_gpu(function, args, kwargs):
        moved = []

        def to_gpu(value):
            if not isinstance(value, torch.Tensor):
                return value
            # With the whole storage: strides and offset of a view are part of the case.
            whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).cuda()
            moved.append((value, whole))
            return whole.as_strided(value.shape, value.stride(), value.storage_offset())

        result = function(*map(to_gpu, args), **{k: to_gpu(v) for k, v in kwargs.items()})
        for value, whole in moved:
            after = whole.cpu().as_strided(value.shape, value.stride(), value.storage_offset())
            if not torch.equal(value, after):
                value.copy_(after)
        if isinstance(result, tuple):
            return tuple(r.cpu() if isinstance(r, torch.Tensor) else r for r in result)
        return result.cpu() if isinstance(result, torch.Tensor) else result
