"""What `bench.sim` runs: each CUDA kernel at the shapes of real layers, with the bytes that it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.shapes import IMAGES, M130, M2800, MODELS, VIM_GRID, VIM_TINY
from mambaquant_ext import ops

TOKENS = 2048
DTYPES = {"f32": torch.float32, "f16": torch.float16}


@dataclass(frozen=True)
class SimCase:
    """One operator at one shape.

    Attributes:
        op: name of the operator.
        shape: what makes it unique among the cases of the operator.
        run: calls the operator.
        ideal_bytes: each input once and each output once.
        elements: what instructions are counted per: elements of x, and states for the scan.
        limits: figure to the most that it may be; a figure without limit is shown all the same.
    """

    op: str
    shape: str
    run: Callable[[], object]
    ideal_bytes: int
    elements: int
    limits: dict[str, float] = field(default_factory=dict)


ONE_PASS = {"bytes": 1.05, "sectors": 1.05}
CONFLICT_FREE = {"wavefronts": 1.10}
CONV2D = {"bytes": 1.20, "sectors": 1.20}
SCAN = {"bytes": 1.15, "wavefronts": 1.10, "instructions": 15.0}


def nbytes(*tensors: object) -> int:
    """Bytes of the tensors among the arguments, nested tuples and dictionaries included."""
    total = 0
    for item in tensors:
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, dict):
            total += nbytes(*item.values())
        elif isinstance(item, tuple | list):
            total += nbytes(*item)
    return total


def _case(
    op: str, shape: str, arguments: dict[str, Any], elements: int, limits: dict[str, float]
) -> SimCase:
    """A case of `op`; the outputs' sizes come from its fake."""
    function = getattr(ops, op)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()
        }
        outputs = function(**fakes)
    written = 0
    for name in ("conv_state", "ssm_state"):  # updated in place: read and written
        written += nbytes(arguments.get(name))
    ideal = nbytes(arguments, outputs) + written
    return SimCase(op, shape, lambda: function(**arguments), ideal, elements, limits)


def quantize_cases() -> Iterator[SimCase]:
    """Float to int8 and back, static and dynamic."""
    for label, dtype in DTYPES.items():
        for dim in (M130.dim, M2800.dim):
            x = torch.randn(TOKENS, dim).to(dtype)
            shape = f"{TOKENS}x{dim} {label}"
            one, channels = torch.tensor([0.05]), torch.full((dim,), 0.05)
            static = {"x": x, "scale": one}
            yield _case("quantize", f"{shape} per tensor", static, x.numel(), ONE_PASS)
            per_channel = {"x": x, "scale": channels, "axis": 1}
            yield _case("quantize", f"{shape} per channel", per_channel, x.numel(), ONE_PASS)
            dynamic = {"x": x, "axis": 0}
            yield _case("quantize_dynamic", f"{shape} per token", dynamic, x.numel(), ONE_PASS)
        q = torch.randint(-127, 128, (TOKENS, M130.dim), dtype=torch.int8)
        back = {"q": q, "scale": torch.tensor([0.05]), "dtype": dtype}
        yield _case("dequantize", f"{TOKENS}x{M130.dim} {label}", back, q.numel(), ONE_PASS)


def norm_cases() -> Iterator[SimCase]:
    """Norm, residual add and quantize."""
    for label, dtype in DTYPES.items():
        for hidden in (M130.hidden, M2800.hidden):
            # Each block fetches weight and bias once. Of the few rows of a short prompt every
            # multiprocessor gets some, and what a block fetches is more of its bytes.
            for tokens, limits in ((TOKENS, {}), (4 * TOKENS, ONE_PASS)):
                x = torch.randn(tokens, hidden).to(dtype)
                shape = f"{tokens}x{hidden} {label}"
                for op in ("rmsnorm_quantize", "layernorm_quantize"):
                    given = {"x": x, "weight": torch.ones(hidden)}
                    if op == "layernorm_quantize":
                        given["bias"] = torch.randn(hidden)
                    static = {**given, "scale": torch.tensor([0.05])}
                    yield _case(op, f"{shape} static", static, x.numel(), limits)
                    added = {**given, "residual": torch.randn_like(x)}
                    yield _case(op, f"{shape} residual, dynamic", added, x.numel(), limits)


def hadamard_cases() -> Iterator[SimCase]:
    """Every size from 64 on at few tokens; the layers' sizes at many."""
    limits = {**ONE_PASS, **CONFLICT_FREE}
    for size in ops.supported_hadamard_sizes():
        if size >= 64:
            x = torch.randn(64, size).half()
            given = {"x": x, "scale": torch.tensor([0.05])}
            yield _case("hadamard_quantize", f"64x{size} f16 static", given, x.numel(), limits)
    for model in MODELS["full"][1:]:
        for label, dtype in DTYPES.items():
            x = torch.randn(512, model.dim).to(dtype)
            given = {"x": x}
            shape = f"512x{model.dim} {label}"
            yield _case("hadamard_quantize", f"{shape} dynamic", given, x.numel(), limits)
            given = {"x": x, "inverse": True}
            yield _case("hadamard_transform", f"{shape} inverse", given, x.numel(), limits)


def conv1d_cases() -> Iterator[SimCase]:
    """Whole sequences and single tokens."""
    for dim in (M130.dim, M2800.dim):
        channels = {
            "x_scale": torch.full((dim,), 0.02),
            "weight": torch.randint(-127, 128, (4, dim), dtype=torch.int8),
            "weight_scale": torch.full((dim,), 0.003),
            "bias": torch.randn(dim),
            "out_scale": torch.full((dim,), 0.02),
            "out_zero_point": torch.randint(-100, 100, (dim,), dtype=torch.int32),
        }
        for batch in (1, 4):
            x = torch.randint(-127, 128, (batch, TOKENS, dim), dtype=torch.int8)
            # One sequence is split further, so that it fills the device: more is read again.
            limits = ONE_PASS if batch > 1 else {}
            yield _case(
                "causal_conv1d_quantize", f"{batch}x{TOKENS}x{dim}", {"x": x, **channels},
                x.numel(), limits,
            )  # fmt: skip
        for batch in (1, 64):
            x = torch.randint(-127, 128, (batch, dim), dtype=torch.int8)
            state = torch.zeros(batch, 3, dim, dtype=torch.int8)
            given = {"x": x, "conv_state": state, **channels}
            yield _case(
                "causal_conv1d_update_quantize", f"{batch}x{dim}", given, x.numel(),
                ONE_PASS if batch == 1 else {},
            )  # fmt: skip


def conv2d_cases() -> Iterator[SimCase]:
    """Each stage of a vision model, many images; one image, where the device must be filled by splitting it."""
    for image in IMAGES["gpu"]:
        for batch in (1, 64):
            shape = (batch, image.height, image.width, image.dim)
            kernel = (image.kernel, image.kernel, image.dim)
            given = {
                "x": torch.randint(-127, 128, shape, dtype=torch.int8),
                "x_scale": torch.full((image.dim,), 0.02),
                "weight": torch.randint(-127, 128, kernel, dtype=torch.int8),
                "weight_scale": torch.full((image.dim,), 0.002),
                "bias": torch.randn(image.dim),
                "out_scale": torch.full((image.dim,), 0.02),
                "out_zero_point": torch.randint(-100, 100, (image.dim,), dtype=torch.int32),
                "stride": image.stride,
            }
            outputs = batch * image.out_height * image.out_width * image.dim
            name = f"{image.name} batch {batch}"
            # Strips read columns twice, and the shorter chunks of less work more rows.
            limits = CONV2D if image.kernel == 3 and outputs > 10**7 else {}
            yield _case(
                "depthwise_conv2d_quantize", name, given, outputs, {**CONFLICT_FREE, **limits}
            )


def _scan_arguments(
    batch: int, seqlen: int, dim: int, readout: str, dt_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, Any]:
    dstate = 16
    tokens = (batch, seqlen) if seqlen else (batch,)

    def int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    given: dict[str, Any] = {
        "x": int8(*tokens, dim),
        "x_scale": torch.full((dim,), 0.02),
        "x_zero_point": torch.randint(-100, 100, (dim,), dtype=torch.int32),
        "dt": torch.randn(*tokens, dim).to(dt_dtype),
        "dt_bias": torch.randn(dim),
        "A": -torch.rand(dstate, dim) * 8,
        "B": int8(*tokens, dstate),
        "B_scale": torch.full((dstate,), 0.02),
        "C": int8(*tokens, dstate),
        "C_scale": torch.tensor([0.02]),
        "D": torch.randn(dim),
        "z": int8(*tokens, dim),
        "z_scale": torch.full((dim,), 0.02),
        "gate_scale": torch.ones(dim),
        "dtype": dtype,
    }
    if readout != "float":
        given["readout_scale"] = torch.full((dim,), 0.05)
        given["rotate_state"] = readout == "rotated"
    return given


def selective_scan_cases() -> Iterator[SimCase]:
    """One long sequence, where the device must be filled by splitting it, and many; single tokens."""
    f32, f16 = torch.float32, torch.float16
    for readout in ("float", "int8", "rotated"):
        given = _scan_arguments(1, TOKENS, M130.dim, readout, f32, f32)
        shape = f"1x{TOKENS}x{M130.dim} {readout} f32, in sequence"
        states = TOKENS * M130.dim * 16
        yield _case("selective_scan", shape, {**given, "chunk_size": TOKENS}, states, SCAN)
    for chunk_size, how in ((0, "dt and y f16"), (TOKENS, "dt and y f16, in sequence")):
        given = _scan_arguments(1, TOKENS, M130.dim, "rotated", f16, f16)
        shape = f"1x{TOKENS}x{M130.dim} rotated, {how}"
        yield _case("selective_scan", shape, {**given, "chunk_size": chunk_size}, states, SCAN)
    for dim in (M130.dim, M2800.dim):
        for readout in ("float", "int8", "rotated"):
            given = _scan_arguments(1, TOKENS, dim, readout, f32, f32)
            states = TOKENS * dim * 16
            shape = f"1x{TOKENS}x{dim} {readout}"
            yield _case("selective_scan", f"{shape} f32", given, states, SCAN)
        given = _scan_arguments(1, TOKENS, dim, "rotated", f32, f16)
        yield _case(
            "selective_scan", f"1x{TOKENS}x{dim} rotated, y f16", given, TOKENS * dim * 16, SCAN
        )
    for readout in ("float", "rotated"):
        given = _scan_arguments(16, 512, M2800.dim, readout, f32, f16)
        shape = f"16x512x{M2800.dim} {readout}, y f16"
        yield _case("selective_scan", shape, given, 16 * 512 * M2800.dim * 16, SCAN)
    # Images walked column by column, without an order and with it.
    height, width = VIM_GRID
    tokens, dim = height * width, VIM_TINY.dim
    columns = torch.arange(tokens, dtype=torch.int32).view(height, width).T.flatten()
    for chunk_size, how in ((tokens, ", in sequence"), (0, "")):
        given = _scan_arguments(8, tokens, dim, "rotated", f32, f32) | {"chunk_size": chunk_size}
        addend = torch.randn(8, tokens, dim)
        for route, more in (
            ("by rows", {}),
            ("by columns", {"order": columns}),
            ("by columns, addend", {"order": columns, "addend": addend}),
        ):
            shape = f"8x{height}x{width}x{dim} rotated {route}{how}"
            yield _case("selective_scan", shape, {**given, **more}, 8 * tokens * dim * 16, {})
    for batch in (1, 64):
        given = _scan_arguments(batch, 0, M2800.dim, "rotated", f32, f32)
        given["ssm_state"] = torch.randn(batch, 16, M2800.dim)
        shape = f"{batch}x{M2800.dim} rotated"
        yield _case(
            "selective_scan_update", shape, given, batch * M2800.dim * 16,
            {"bytes": 1.05} if batch == 1 else {},
        )  # fmt: skip


def gemm_cases() -> Iterator[SimCase]:
    """The four linear layers: one token, a few, and a prompt."""
    for model in (M130, M2800):
        for name, n, k in (
            ("in_proj", 2 * model.dim, model.hidden),
            ("x_proj", model.dt_rank + 2 * model.dstate, model.dim),
            ("dt_proj", model.dim, model.dt_rank),
            ("out_proj", model.hidden, model.dim),
        ):
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            packed, layout = ops.pack_gemm_weight(weight)
            for m in (1, 8, 64, 512) if model is M130 else (1, 8):
                given = {
                    "a": torch.randint(-127, 128, (m, k), dtype=torch.int8),
                    "packed": packed,
                    "layout": layout,
                    "a_scale": torch.tensor([0.02]),
                    "b_scale": torch.full((n,), 0.003),
                    "out_scale": torch.full((n,), 0.5),
                }
                shape = f"{model.name} {name} {m}x{n}x{k}"
                yield _case("gemm_requantize", shape, given, m * n * k, {})
                given = {key: given[key] for key in ("a", "packed", "layout", "a_scale", "b_scale")}
                added = {**given, "residual": torch.randn(m, n)}
                yield _case("gemm_dequantize", f"{shape} residual", added, m * n * k, {})
            given = {"a": given["a"], "packed": packed, "layout": layout, "n": n}
            yield _case("gemm", shape, given, m * n * k, {})
            yield _case("pack_gemm_weight", f"{model.name} {name}", {"weight": weight}, n * k, {})


GROUPS: dict[str, Callable[[], Iterator[SimCase]]] = {
    "quantize": quantize_cases,
    "norm": norm_cases,
    "hadamard": hadamard_cases,
    "conv1d": conv1d_cases,
    "conv2d": conv2d_cases,
    "selective_scan": selective_scan_cases,
    "gemm": gemm_cases,
}
