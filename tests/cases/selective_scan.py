"""Cases of selective_scan and selective_scan_update."""

from dataclasses import dataclass

import torch

from cases import inputs
from reference import selective_scan as reference


@dataclass(frozen=True)
class ScanCase:
    name: str
    batch: int = 2
    seqlen: int = 5
    dim: int = 17
    dstate: int = 16
    dt_dtype: torch.dtype = torch.float32
    B_dtype: torch.dtype = torch.int8
    C_dtype: torch.dtype = torch.int8
    z_dtype: torch.dtype | None = torch.int8
    dtype: torch.dtype = torch.float32
    optional: bool = True  # x_zero_point, dt_bias, D and gate_scale
    state: bool = True
    reverse: bool = False
    order: str | None = None  # random, transposed: column by column of a grid with 5 columns
    addend_dtype: torch.dtype | None = None
    chunk_size: int = 10**6  # in sequence
    kind: str = "normal"  # normal, zeros, extreme: dt +-50 and A down to -64
    view: bool = False

    def make(self, generator):
        """The keyword arguments of selective_scan, with a float read-out."""
        channels, tokens = (self.dim,), (self.batch, self.seqlen)
        dt, A = self._steps(generator)
        z = self._operand((*tokens, self.dim), self.z_dtype, generator) if self.z_dtype else None
        x = inputs.int8((*tokens, self.dim), generator)
        x = torch.zeros_like(x) if self.kind == "zeros" else x
        zero_point = torch.randint(-100, 100, channels, generator=generator, dtype=torch.int32)
        B = self._operand((*tokens, self.dstate), self.B_dtype, generator)
        C = self._operand((*tokens, self.dstate), self.C_dtype, generator)
        has_B_scale, has_C_scale = self.B_dtype == torch.int8, self.C_dtype == torch.int8
        state = inputs.normal((self.batch, self.dstate, self.dim), generator)
        return {
            "x": self._view(x),
            "x_scale": inputs.positive(channels, generator, 0.001, 0.02),
            "x_zero_point": zero_point if self.optional else None,
            "dt": self._view(dt),
            "dt_bias": inputs.normal(channels, generator) if self.optional else None,
            "A": A,
            "B": self._view(B),
            "B_scale": inputs.positive((self.dstate,), generator, 0.005, 0.02)
            if has_B_scale
            else None,
            "C": self._view(C),
            "C_scale": inputs.positive((1,), generator, 0.005, 0.02) if has_C_scale else None,
            "D": inputs.normal(channels, generator) if self.optional else None,
            "z": None if z is None else self._view(z),
            "z_scale": inputs.positive(channels, generator) if self.z_dtype == torch.int8 else None,
            "gate_scale": self._gate_scale(generator),
            "initial_state": state if self.state else None,
            "reverse": self.reverse,
            "order": self._order(generator),
            "addend": self._addend(generator),
        }

    def _order(self, generator):
        if self.order is None:
            return None
        if self.order == "random":
            return torch.randperm(self.seqlen, generator=generator).int()
        return torch.arange(self.seqlen, dtype=torch.int32).view(-1, 5).T.flatten()

    def _addend(self, generator):
        if self.addend_dtype is None:
            return None
        shape = (self.batch, self.seqlen, self.dim)
        return self._view(inputs.normal(shape, generator, self.addend_dtype))

    def _steps(self, generator):
        """dt around softplus^-1 of Mamba's 0.001 to 0.1, and A near -1 to -dstate."""
        dt = inputs.normal((self.batch, self.seqlen, self.dim), generator) - 3
        decays = torch.arange(1.0, self.dstate + 1)[:, None]
        A = -decays * inputs.positive((self.dstate, self.dim), generator, 0.75, 1.25)
        if self.kind == "extreme":
            dt = torch.where(dt > -3, 50.0, -50.0)
            A = -64 * torch.rand(A.shape, generator=generator)
        return dt.to(self.dt_dtype), A

    def _gate_scale(self, generator):
        if not self.optional or self.z_dtype is None:
            return None
        return inputs.positive((self.dim,), generator, 0.5, 2.0)

    def _operand(self, shape, dtype, generator):
        if dtype == torch.int8:
            return inputs.int8(shape, generator)
        return inputs.normal(shape, generator, dtype)

    def _view(self, t):
        """A column slice of a wider buffer with one token too many, as projections give their
        parts."""
        if not self.view:
            return t
        wide = torch.full((t.shape[0], t.shape[1] + 1, 2 * t.shape[2] + 3), 99).to(t.dtype)
        wide[:, 1:, 3 : 3 + t.shape[2]] = t
        return wide[:, 1:, 3 : 3 + t.shape[2]]


def with_int8_readout(arguments, rotate_state):
    """Adds a calibrated readout_scale: a channel's largest (rotated) state is 127 steps."""
    amax = torch.full((arguments["x"].shape[2],), 1e-3, dtype=torch.float64)
    _, states = reference.states(**{k: arguments[k] for k in reference.STATE_INPUTS})
    for h in states:
        seen = reference.rotated(h) if rotate_state else h
        amax = torch.maximum(amax, seen.abs().amax((0, 1)))
    return {**arguments, "readout_scale": (amax / 127).float(), "rotate_state": rotate_state}


def _table():
    for dim in (1, 7, 15, 16, 31, 100):
        yield ScanCase(f"dim{dim}", dim=dim)
    for seqlen in (0, 1, 2, 3, 63, 64, 65, 130):
        yield ScanCase(f"seqlen{seqlen}", seqlen=seqlen)
        yield ScanCase(f"seqlen{seqlen}-reverse", seqlen=seqlen, reverse=True, state=False)
    for dstate in (1, 2, 4, 8, 15, 32, 64, 256):
        yield ScanCase(f"dstate{dstate}", dstate=dstate, seqlen=20)
    for dtype in inputs.FLOAT_DTYPES:
        label = str(dtype)[6:]
        yield ScanCase(f"dt-B-C-z-{label}", 2, 40, 33, 16, dtype, dtype, dtype, dtype)
        yield ScanCase(f"y-{label}", dtype=dtype, view=True)
        yield ScanCase(f"mixed-{label}", 2, 9, 20, 8, dtype, torch.int8, dtype, None)
    for chunk_size in (1, 7, 64):
        yield ScanCase(f"chunk{chunk_size}", seqlen=130, chunk_size=chunk_size)
        yield ScanCase(
            f"chunk{chunk_size}-dstate4", seqlen=70, dstate=4, chunk_size=chunk_size, reverse=True
        )
    yield ScanCase("automatic-chunks", batch=1, seqlen=400, dim=5, chunk_size=0)
    # Several blocks in both directions where a block takes 64 channels and 256 tokens.
    yield ScanCase("automatic-blocks", seqlen=600, dim=130, chunk_size=0)
    for order in ("random", "transposed"):
        for dstate in (4, 16):
            case = {"seqlen": 70, "dim": 40, "dstate": dstate, "order": order}
            yield ScanCase(f"{order}-dstate{dstate}", **case, view=True)
            yield ScanCase(f"{order}-dstate{dstate}-reverse", **case, reverse=True)
            yield ScanCase(f"{order}-dstate{dstate}-chunks", **case, chunk_size=7)
    yield ScanCase("order-blocks", seqlen=600, dim=130, chunk_size=0, order="random")
    yield ScanCase("order-seqlen0", seqlen=0, order="random")
    yield ScanCase("order-seqlen1", seqlen=1, order="random", addend_dtype=torch.float32)
    for dtype in inputs.FLOAT_DTYPES:
        label = str(dtype)[6:]
        for dstate in (4, 16):
            case = {"seqlen": 9, "dstate": dstate, "addend_dtype": dtype}
            yield ScanCase(f"addend-{label}-dstate{dstate}", **case, dim=20, dtype=dtype)
            yield ScanCase(f"addend-{label}-dstate{dstate}-no-z", **case, z_dtype=None, view=True)
    case = {"seqlen": 600, "dim": 130, "chunk_size": 0, "addend_dtype": torch.float16}
    yield ScanCase("addend-blocks-order-reverse", **case, order="random", reverse=True)
    yield ScanCase("plain", optional=False, z_dtype=None, state=False)
    yield ScanCase("view", view=True, seqlen=70, dim=40)
    yield ScanCase("view-reverse", view=True, seqlen=70, dim=40, reverse=True)
    yield ScanCase("zeros", kind="zeros")
    yield ScanCase("extreme", kind="extreme", seqlen=40)
    yield ScanCase("extreme-chunks", kind="extreme", seqlen=40, chunk_size=10)
    yield ScanCase("batch0", batch=0)
    yield ScanCase("dim0", dim=0)
    yield ScanCase("layer", batch=1, seqlen=20, dim=768)


CASES = list(_table())
