"""Every kernel on a small input against its definition in float64: is this build right on this machine?

The full definitions and sweeps are the test-suite's; this is the part that an installed package carries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mambaquant_ext import ops

TOKENS, DIM, DSTATE, WIDTH, OUT = 5, 48, 16, 4, 33
# Float results: float32 rounding over sums of at most a few hundred terms.
RELATIVE_ERROR = 1e-5


class _Inputs:
    """Seeded inputs in the shapes of one small block."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def int8(*shape: int) -> Tensor:
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

        self.x = normal(TOKENS, DIM) * 3
        self.scale = torch.tensor([0.05])
        self.a, self.weight = int8(TOKENS, DIM), int8(OUT, DIM)
        self.channel_scale = normal(DIM).abs() * 0.01 + 0.01
        self.row_scale = normal(OUT).abs() * 0.01 + 0.01
        self.conv_weight = int8(WIDTH, DIM)
        self.zero_point = torch.arange(DIM, dtype=torch.int32) - DIM // 2
        self.dt = normal(1, TOKENS, DIM)
        self.A = -torch.rand(DSTATE, DIM, generator=generator) * 4
        self.B, self.C, self.D = normal(1, TOKENS, DSTATE), normal(1, TOKENS, DSTATE), normal(DIM)
        self.z = int8(1, TOKENS, DIM)
        self.conv_state = int8(1, WIDTH - 1, DIM)
        self.ssm_state = normal(1, DSTATE, DIM)
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.to(device))

    def conv(self) -> tuple[Tensor, Tensor]:
        """(1, TOKENS, DIM) int8 on channel_scale, and the definition's value in units of it."""
        padded = torch.cat([self.conv_state, self.a[None]], 1).double() * self.channel_scale
        taps = self.conv_weight.double() * self.channel_scale
        value = sum(padded[:, j : j + TOKENS] * taps[j] for j in range(WIDTH))
        assert isinstance(value, Tensor)
        q, _ = ops.causal_conv1d_quantize(
            self.a[None],
            self.channel_scale,
            self.conv_weight,
            self.channel_scale,
            None,
            self.channel_scale,
            self.zero_point,
            self.conv_state,
        )
        return q, F.silu(value) / self.channel_scale + self.zero_point

    def scan(self) -> Tensor:
        """(1, TOKENS, DIM), float64: the float read-out of the scan from ssm_state."""
        x = (self.a[None].double() - self.zero_point) * self.channel_scale
        delta, h, outputs = F.softplus(self.dt.double()), self.ssm_state.double(), []
        for t in range(TOKENS):
            drive = (delta[:, t] * x[:, t])[:, None] * self.B[:, t, :, None]
            h = torch.exp(delta[:, t, None] * self.A) * h + drive
            outputs.append((h * self.C[:, t, :, None]).sum(1) + self.D * x[:, t])
        z = self.z.double() * self.channel_scale
        return torch.stack(outputs, 1) * z * torch.sigmoid(z)


def self_test(device: str = "cpu") -> dict[str, str]:
    """Runs every kernel, on the CPU on the instruction set in use.

    Args:
        device: "cpu" or a CUDA device.

    Returns:
        Kernel name to "ok", or to what was wrong.
    """
    inputs = _Inputs(device)
    return {name: _outcome(check, inputs) for name, check in _CHECKS.items()}


def _outcome(check: Callable[[_Inputs], str], inputs: _Inputs) -> str:
    try:
        return check(inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def _int8_close(q: Tensor, value: Tensor, low: int = -127) -> str:
    """q is the rounding of value, up to the float32 error of value at a rounding boundary."""
    distance = (q.double() - value.clamp(low, 127)).abs().max()
    return "ok" if float(distance) <= 0.5 + 1e-3 else f"off by {float(distance):.3f} steps"


def _float_close(actual: Tensor, expected: Tensor) -> str:
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    return "ok" if error <= RELATIVE_ERROR else f"relative error {error:.1e}"


def _equal(actual: Tensor, expected: Tensor) -> str:
    return (
        "ok"
        if torch.equal(actual, expected)
        else f"{int((actual != expected).sum())} values differ"
    )


def _quantize(i: _Inputs) -> str:
    return _int8_close(ops.quantize(i.x, i.scale), i.x.double() / i.scale)


def _quantize_dynamic(i: _Inputs) -> str:
    q, scale = ops.quantize_dynamic(i.x, 0)
    return _int8_close(q, i.x.double() / scale[:, None])


def _dequantize(i: _Inputs) -> str:
    expected = (i.a.double() - i.zero_point) * i.channel_scale.double()
    return _float_close(ops.dequantize(i.a, i.channel_scale, i.zero_point, 1), expected)


def _rmsnorm(i: _Inputs) -> str:
    x = i.x.double()
    return _int8_close(
        ops.rmsnorm_quantize(i.x, None, None, i.scale, 1e-5)[0],
        x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) / i.scale,
    )


def _layernorm(i: _Inputs) -> str:
    q = ops.layernorm_quantize(i.x, None, None, None, i.scale, 1e-5)[0]
    return _int8_close(q, F.layer_norm(i.x.double(), (DIM,), eps=1e-5) / i.scale)


def _hadamard_transform(i: _Inputs) -> str:
    return _float_close(
        ops.hadamard_transform(i.x), i.x.double() @ ops.hadamard_matrix(DIM).to(i.x.device)
    )


def _hadamard_quantize(i: _Inputs) -> str:
    q, _ = ops.hadamard_quantize(i.x, i.scale)
    return _int8_close(q, i.x.double() @ ops.hadamard_matrix(DIM).to(i.x.device) / i.scale)


def _accumulators(i: _Inputs) -> Tensor:
    return i.a.double() @ i.weight.double().T


def _gemm(i: _Inputs) -> str:
    packed, layout = ops.pack_gemm_weight(i.weight)
    return _equal(ops.gemm(i.a, packed, layout, OUT), _accumulators(i).int())


def _gemm_dequantize(i: _Inputs) -> str:
    packed, layout = ops.pack_gemm_weight(i.weight)
    actual = ops.gemm_dequantize(i.a, packed, layout, i.scale, i.row_scale)
    return _float_close(actual, _accumulators(i) * (i.scale.double() * i.row_scale.double()))


def _gemm_requantize(i: _Inputs) -> str:
    packed, layout = ops.pack_gemm_weight(i.weight)
    out_scale = i.row_scale * 100
    actual = ops.gemm_requantize(i.a, packed, layout, i.scale, i.row_scale, out_scale)
    return _int8_close(
        actual, _accumulators(i) * (i.scale.double() * i.row_scale.double()) / out_scale
    )


def _conv(i: _Inputs) -> str:
    return _int8_close(*i.conv(), low=-128)


def _conv_update(i: _Inputs) -> str:
    state = i.conv_state.clone()
    steps = [
        ops.causal_conv1d_update_quantize(
            i.a[t : t + 1],
            state,
            i.channel_scale,
            i.conv_weight,
            i.channel_scale,
            None,
            i.channel_scale,
            i.zero_point,
        )
        for t in range(TOKENS)
    ]
    return _equal(torch.stack(steps, 1), i.conv()[0])


def _conv2d(i: _Inputs) -> str:
    height, width = 3, TOKENS
    x = torch.stack([i.a, i.z[0], -i.a])[None]
    weight = torch.stack([i.conv_weight[:3], i.z[0, :3], i.a[:3]])
    padded = F.pad(x.double() * i.channel_scale, (0, 0, 1, 1, 1, 1))
    taps = weight.double() * i.channel_scale
    value = sum(
        padded[:, m : m + height, n : n + width] * taps[m, n] for m in range(3) for n in range(3)
    )
    assert isinstance(value, Tensor)
    q = ops.depthwise_conv2d_quantize(
        x,
        i.channel_scale,
        weight,
        i.channel_scale,
        None,
        i.channel_scale,
        i.zero_point,
    )
    return _int8_close(q, F.silu(value) / i.channel_scale + i.zero_point, low=-128)


def _scan(i: _Inputs) -> str:
    y, _ = ops.selective_scan(
        i.a[None],
        i.channel_scale,
        i.zero_point,
        i.dt,
        None,
        i.A,
        i.B,
        None,
        i.C,
        None,
        i.D,
        i.z,
        i.channel_scale,
        initial_state=i.ssm_state,
    )
    return _float_close(y, i.scan())


def _scan_update(i: _Inputs) -> str:
    state = i.ssm_state.clone()
    steps = [
        ops.selective_scan_update(
            state,
            i.a[t : t + 1],
            i.channel_scale,
            i.zero_point,
            i.dt[:, t],
            None,
            i.A,
            i.B[:, t],
            None,
            i.C[:, t],
            None,
            i.D,
            i.z[:, t],
            i.channel_scale,
        )
        for t in range(TOKENS)
    ]
    return _float_close(torch.stack(steps, 1), i.scan())


_CHECKS: dict[str, Callable[[_Inputs], str]] = {
    "quantize": _quantize,
    "quantize_dynamic": _quantize_dynamic,
    "dequantize": _dequantize,
    "rmsnorm_quantize": _rmsnorm,
    "layernorm_quantize": _layernorm,
    "hadamard_transform": _hadamard_transform,
    "hadamard_quantize": _hadamard_quantize,
    "gemm": _gemm,
    "gemm_dequantize": _gemm_dequantize,
    "gemm_requantize": _gemm_requantize,
    "causal_conv1d_quantize": _conv,
    "causal_conv1d_update_quantize": _conv_update,
    "depthwise_conv2d_quantize": _conv2d,
    "selective_scan": _scan,
    "selective_scan_update": _scan_update,
}
