"""What the tests of the float vision models share: random parameters, and a scan as plain loops."""

import math

import torch


def randomised(model, seed=0):
    """The model in float64, every parameter random, so that none is at a start that hides it."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 1
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_scale else noise / math.sqrt(fan_in))
    return model


def images(*shape, seed=7):
    """Random float64 values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def branch_scan(x, order, x_proj, dt_weight, dt_bias, A_log, D):
    """One branch over tokens x (tokens, dim) in the order given: results in storage order."""
    dstate, dt_rank = A_log.shape[1], dt_weight.shape[1]
    y = torch.zeros_like(x)
    h = x.new_zeros(x.shape[1], dstate)
    for token in order:
        projected = x_proj @ x[token]
        step = torch.log1p(torch.exp(dt_weight @ projected[:dt_rank] + dt_bias))
        B, C = projected[dt_rank:].split(dstate)
        h = torch.exp(-step[:, None] * A_log.exp()) * h + (step * x[token])[:, None] * B
        y[token] = h @ C + D * x[token]
    return y


def branch_weights(branches, k):
    """The weights of branch k of stacked ones, as branch_scan takes them."""
    dim = branches.dt_projs_bias.shape[1]
    rows = slice(k * dim, (k + 1) * dim)
    return (
        branches.x_proj_weight[k],
        branches.dt_projs_weight[k],
        branches.dt_projs_bias[k],
        branches.A_logs[rows],
        branches.Ds[rows],
    )


def permute_branches(branches, new):
    """Gives branch k the weights that branch new[k] had."""
    count, dim = branches.dt_projs_bias.shape
    with torch.no_grad():
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            parameter = getattr(branches, name)
            parameter.copy_(parameter[list(new)].clone())
        for name in ("A_logs", "Ds"):
            parameter = getattr(branches, name)
            stacked = parameter.view(count, dim, *parameter.shape[1:])
            parameter.copy_(stacked[list(new)].clone().view_as(parameter))


def shapes(model):
    """Name to shape of every entry of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
