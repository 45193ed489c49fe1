"""What the tests of the float vision models share: official names and shapes, small random models."""

import torch


def mixer_shapes(hidden, dim, dstate=16, rank=None, width=4, *, backward=(), biases=("conv1d",)):
    """Names and shapes of a mixer's parameters; `backward` names those that exist a second time."""
    rank = -(-hidden // 16) if rank is None else rank
    shapes = {
        "A_log": (dim, dstate),
        "D": (dim,),
        "in_proj.weight": (2 * dim, hidden),
        "conv1d.weight": (dim, 1, width),
        "x_proj.weight": (rank + 2 * dstate, dim),
        "dt_proj.weight": (dim, rank),
        "dt_proj.bias": (dim,),
        "out_proj.weight": (hidden, dim),
    }
    shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biases}
    for name, shape in tuple(shapes.items()):
        head, _, tail = name.partition(".")
        if head in backward:
            second = "A_b_log" if head == "A_log" else f"{head}_b"
            shapes[f"{second}.{tail}" if tail else second] = shape
    return shapes


def prefixed(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def shapes_on_meta(model_class, config):
    """Names and shapes of a model's state, and its number of parameters, without its memory."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, sum(parameter.numel() for parameter in model.parameters())


def random_model(model_class, config, seed=1):
    """A float64 model with no parameter at a value that hides it, such as a bias of zero or a weight of one."""
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(torch.full_like(parameter, 0.1) + 0.3 * noise)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.rpartition(".")[2] in {"D", "D_b"}:
                parameter.add_(1)
    return model.requires_grad_(False)


def parameters(module):
    """Public name to tensor."""
    return dict(module.named_parameters())


def patch_rows(image, patch, stride):
    """(channels, *size) -> (patches, channels * patch volume), patches and their values row-major."""
    for axis, (length, step) in enumerate(zip(patch, stride, strict=True)):
        image = image.unfold(1 + axis, length, step)
    grid = len(patch)
    order = [*range(1, 1 + grid), 0, *range(1 + grid, 1 + 2 * grid)]
    image = image.permute(order)
    return image.flatten(grid).flatten(0, grid - 1)
