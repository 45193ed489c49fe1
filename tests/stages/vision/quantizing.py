"""What the tests of quantized vision models share.

Each check takes a float32 model that an adapter knows, and batches that the model takes as its one argument.
"""

import copy

import torch
from bench.small_models import (
    error_of,
    exact,
    flat,
    outputs,
    preserved,
    quantized,
    random_batches,
    transformed,
    uneven_model,
)

from mambaquant_ext import Fidelity, Rotation, load, recipe, save
from mambaquant_ext.config import PRESETS
from mambaquant_ext.model.adapters import adapter_for
from mambaquant_ext.model.sites import FloatBlock
from mambaquant_ext.run.modules import QuantLinear
from mambaquant_ext.run.swap import QuantCalledBlock
from tolerances import MODEL_SQNR_DB, assert_equal, assert_relative, sqnr_db

__all__ = [  # what the tests take from here though it is made in bench, too
    "error_of",
    "preserved",
    "random_batches",
    "transformed",
    "uneven_model",
]

PLAIN = recipe("rtn")
# All presets, and each transform alone.
RECIPES = {
    **PRESETS,
    "residual hadamard": PLAIN.replace(residual_rotation=Rotation.HADAMARD),
    "residual klt": PLAIN.replace(residual_rotation=Rotation.KLT),
    "dt hadamard": PLAIN.replace(dt_rotation=Rotation.HADAMARD),
    "dt klt": PLAIN.replace(dt_rotation=Rotation.KLT),
    **{
        name: PLAIN.replace(**{name: True})
        for name in (
            "out_rotation",
            "state_rotation",
            "smooth_gate",
            "smooth_state",
            "smooth_dt",
            "center_dt",
            "separate_class_token",
        )
    },
}


def assert_stand_ins_equal(model, batch):
    """The model with float blocks that the adapter describes is the model."""
    sites = adapter_for(model).sites(model)
    described = copy.deepcopy(model).double()
    for site in sites:
        block = FloatBlock(site.weights().to(torch.float64), site.contract)
        site.replace_in(described, block)
    assert len(sites) == sum(isinstance(module, FloatBlock) for module in described.modules())
    batch = batch.double()
    found, wanted = outputs(described, batch), outputs(exact(model), batch)
    for actual, expected in zip(found, wanted, strict=True):
        assert_relative(actual, expected)


def assert_swaps_exactly(model, batches, names, head=None):
    """Blocks `names`, in this order, and the head become quantized modules; the rest stays as it is.

    Args:
        model: float.
        batches: to calibrate on.
        names: of the blocks' modules.
        head: name of the linear layer that becomes int8, or None.
    """
    sites = adapter_for(model).sites(model)
    assert [site.name for site in sites] == names
    keeps = {f"{site.name}.{child}" for site in sites for child in site.keeps}
    replaced = {*names, *([] if head is None else [head])}

    def is_rest(name):
        parents = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)}
        return bool(parents & keeps) or not parents & replaced

    # Without a rotation nothing around the blocks has another value.
    found, packed = quantized(model, batches, PLAIN)
    assert (list(packed.names), packed.linear_name) == (names, head)
    modules, tensors = dict(found.named_modules()), found.state_dict()
    for name, module in model.named_modules():
        if is_rest(name):
            assert type(modules[name]) is type(module), name
    for name, tensor in model.state_dict().items():
        if is_rest(name):
            assert_equal(tensors[name], tensor)
    blocks = [name for name, module in modules.items() if type(module) is QuantCalledBlock]
    assert sorted(blocks) == sorted(names)
    assert [name for name, module in modules.items() if type(module) is QuantLinear] == (
        [] if head is None else [head]
    )
    # What a block kept of the module in its place is nothing but what the site says.
    for site in sites:
        kept = {name for name, _ in modules[site.name].named_children()}
        assert kept == {"block", *site.keeps}


def assert_integer_equals_emulated(model, batches, batch, recipe=PRESETS["w8a8"]):
    """The kernels and their emulation agree, and both are close to float; returns the SQNR against float."""
    integer, _ = quantized(model, batches, recipe)
    emulated, _ = quantized(model, batches, recipe, Fidelity.EMULATED)
    actual, expected = outputs(integer, batch), outputs(emulated, batch)
    assert sqnr_db(flat(actual), flat(expected)) >= MODEL_SQNR_DB["emulated, twice"]
    for a, e in zip(actual, expected, strict=True):
        # A map has so many places that classes are level at one or another.
        assert a.dim() > 2 or torch.equal(a.argmax(1), e.argmax(1))
    return sqnr_db(flat(actual), flat(outputs(model, batch)))


def assert_survives_saving(model, batches, batch, folder):
    """Saved and loaded, with nothing but the folder, the model gives the same bits, on both fidelities."""
    config = adapter_for(model).config(model)
    for fidelity in Fidelity:
        before, packed = quantized(model, batches, fidelity=fidelity)
        save(packed, config, folder / fidelity.value)
        after = load(folder / fidelity.value, fidelity)
        assert type(after) is type(model)
        for actual, expected in zip(outputs(after, batch), outputs(before, batch), strict=True):
            assert_equal(actual, expected)


def _one_by_one(forward):
    return lambda x: torch.cat([forward(sample) for sample in x.split(1)])


def assert_rows_stand_alone(model, batch):
    """A sample of a batch has the bits that it has alone, but for what torch's float layers around the blocks do."""
    model = copy.deepcopy(model)
    float_layers = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)
    for module in model.modules():
        if isinstance(module, float_layers):
            module.forward = _one_by_one(module.forward)
    whole = outputs(model, batch)
    for row in range(len(batch)):
        alone = outputs(model, batch[row : row + 1])
        for actual, expected in zip(alone, whole, strict=True):
            assert_equal(actual, expected[row : row + 1])
