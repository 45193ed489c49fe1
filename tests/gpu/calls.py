"""Arguments for every operator, on any device, and one token's way through a block."""

import torch

from cases import inputs
from cases.conv1d import ConvCase
from cases.conv2d import Conv2dCase
from cases.gemm import GemmCase
from cases.selective_scan import ScanCase
from mambaquant_ext import ops

SEED = 20261
INT8_ROWS = (9, 48)  # not a multiple of any tile


def _quantize(generator):
    x = inputs.normal(INT8_ROWS, generator, torch.float16)
    return {"x": x, "scale": inputs.positive((48,), generator), "zero_point": None, "axis": 1}


def _quantize_dynamic(generator):
    return {"x": inputs.normal(INT8_ROWS, generator), "axis": 0}


def _dequantize(generator):
    given = {"q": inputs.int8(INT8_ROWS, generator), "scale": inputs.positive((9,), generator)}
    return {**given, "zero_point": None, "axis": 0, "dtype": torch.float16}


def _norm(generator):
    x, residual = (inputs.normal(INT8_ROWS, generator) for _ in range(2))
    weight = inputs.normal((48,), generator)
    return {"x": x, "weight": weight, "residual": residual, "scale": None, "eps": 1e-5}


def _layernorm(generator):
    return {**_norm(generator), "bias": inputs.normal((48,), generator)}


def _hadamard_transform(generator):
    return {"x": inputs.normal((9, 192), generator), "inverse": True}


def _hadamard_quantize(generator):
    return {"x": inputs.normal((9, 192), generator, torch.float16), "scale": torch.tensor([0.05])}


GEMM = GemmCase(
    "", 9, 80, 48, per_token=True, has_acc_offset=True, has_bias=True, has_out_zero_point=True,
    residual_dtype=torch.float32,
)  # fmt: skip


def _gemm(generator):
    a, weight = GEMM.operands(generator)
    return {"a": a, "weight": weight, "n": GEMM.n, "dtype": torch.float16, **GEMM.scales(generator)}


def _pack(generator):
    return {"weight": inputs.int8((80, 48), generator)}


def _conv(generator):
    return ConvCase("", seqlen=70, dim=40, state=True, order="random").make(generator)


def _conv_update(generator):
    given = _conv(generator)
    return {**given, "x": given["x"][:, 0].contiguous(), "conv_state": given["initial_state"]}


def _conv2d(generator):
    return Conv2dCase("", height=9, width=16, dim=40, kernel=(7, 7), stride=2).make(generator)


def _scan(generator):
    case = ScanCase("", seqlen=70, dim=40, order="random", addend_dtype=torch.float16)
    given = case.make(generator)
    readout = {"readout_scale": inputs.positive((40,), generator), "rotate_state": True}
    return {**given, **readout, "chunk_size": 0, "dtype": torch.float32}


def _scan_update(generator):
    given = _scan(generator)
    step = {k: given[k][:, 0].contiguous() for k in ("x", "dt", "B", "C", "z")}
    return {**given, **step, "ssm_state": given["initial_state"]}


MAKERS = {
    "quantize": _quantize,
    "quantize_dynamic": _quantize_dynamic,
    "dequantize": _dequantize,
    "rmsnorm_quantize": _norm,
    "layernorm_quantize": _layernorm,
    "hadamard_transform": _hadamard_transform,
    "hadamard_quantize": _hadamard_quantize,
    "pack_gemm_weight": _pack,
    "gemm": _gemm,
    "gemm_dequantize": _gemm,
    "gemm_requantize": _gemm,
    "causal_conv1d_quantize": _conv,
    "causal_conv1d_update_quantize": _conv_update,
    "depthwise_conv2d_quantize": _conv2d,
    "selective_scan": _scan,
    "selective_scan_update": _scan_update,
}
# Packing looks at the weight's values, and happens once, at load: it may wait.
WITHOUT_WAITING = [name for name in MAKERS if name != "pack_gemm_weight"]


def operator(name):
    return getattr(torch.ops.mambaquant, name).default


def arguments_of(name, device, seed=SEED):
    """The operator's arguments by name, in the order of its schema."""
    made = MAKERS[name](torch.Generator().manual_seed(seed))
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    if name.startswith("gemm"):
        given["packed"], given["layout"] = ops.pack_gemm_weight(given["weight"])
    return {argument.name: given[argument.name] for argument in operator(name)._schema.arguments}


def outputs(result, arguments):
    """Everything that a call gives: what it returns and the state that it wrote."""
    returned = result if isinstance(result, tuple) else (result,)
    written = [arguments[k] for k in ("conv_state", "ssm_state") if k in arguments]
    return [value for value in (*returned, *written) if isinstance(value, torch.Tensor)]


class DecodeStep:
    """One token through one block of random weights: stream in, stream out, states in place."""

    BATCH, HIDDEN, DIM, RANK, DSTATE, WIDTH = 3, 192, 384, 12, 16, 4

    def __init__(self, device):
        self.device = device
        self.generator = torch.Generator().manual_seed(SEED)
        n_x = self.RANK + 2 * self.DSTATE
        self.in_proj = self._linear(2 * self.DIM, self.HIDDEN)
        self.x_proj = self._linear(n_x, self.DIM)
        self.dt_proj = self._linear(self.DIM, self.RANK)
        self.out_proj = self._linear(self.HIDDEN, self.DIM)
        self.one = self._to(torch.tensor([0.02]))
        self.norm_weight = self._to(inputs.normal((self.HIDDEN,), self.generator))
        self.xz_scale = self._positive(2 * self.DIM)
        self.x_scale, self.z_scale = self.xz_scale[: self.DIM], self.xz_scale[self.DIM :]
        self.conv_weight = self._to(inputs.int8((self.WIDTH, self.DIM), self.generator))
        self.dbc_scale = self._positive(n_x)
        self.zero_point = self._to(torch.full((self.DIM,), -90, dtype=torch.int32))
        self.A = self._to(-torch.arange(1.0, self.DSTATE + 1)[:, None].repeat(1, self.DIM))
        self.channel = self._positive(self.DIM)

    def _to(self, tensor):
        return tensor.to(self.device)

    def _positive(self, size):
        return self._to(inputs.positive((size,), self.generator))

    def _linear(self, n, k):
        weight = self._to(inputs.int8((n, k), self.generator))
        scale = self._to(inputs.positive((n,), self.generator, 1e-3, 1e-2))
        return *ops.pack_gemm_weight(weight), scale

    def states(self):
        """Fresh conv_state and ssm_state."""
        conv = torch.zeros(self.BATCH, self.WIDTH - 1, self.DIM, dtype=torch.int8)
        return self._to(conv), self._to(torch.zeros(self.BATCH, self.DSTATE, self.DIM))

    def stream(self, seed):
        """A token's hidden vectors."""
        generator = torch.Generator().manual_seed(seed)
        return self._to(inputs.normal((self.BATCH, self.HIDDEN), generator))

    def __call__(self, stream, conv_state, ssm_state):
        q, _, _ = ops.rmsnorm_quantize(stream, self.norm_weight, None, self.one)
        packed, layout, scale = self.in_proj
        xz = ops.gemm_requantize(q, packed, layout, self.one, scale, out_scale=self.xz_scale)
        x = ops.causal_conv1d_update_quantize(
            xz[:, : self.DIM], conv_state, self.x_scale, self.conv_weight, self.channel, None,
            self.channel, self.zero_point,
        )  # fmt: skip
        packed, layout, scale = self.x_proj
        dbc = ops.gemm_requantize(x, packed, layout, self.one, scale, out_scale=self.dbc_scale)
        dt, B, C = dbc.split([self.RANK, self.DSTATE, self.DSTATE], dim=1)
        packed, layout, scale = self.dt_proj
        dt = ops.gemm_dequantize(dt, packed, layout, self.one, scale * 0.01)
        y = ops.selective_scan_update(
            ssm_state, x, self.channel, self.zero_point, dt, self.channel, self.A, B,
            self.dbc_scale[: self.DSTATE], C, self.one, self.channel, xz[:, self.DIM :],
            self.z_scale, readout_scale=self.channel, rotate_state=True,
        )  # fmt: skip
        packed, layout, scale = self.out_proj
        return ops.gemm_dequantize(
            ops.hadamard_quantize(y, self.one)[0], packed, layout, self.one, scale, residual=stream
        )
