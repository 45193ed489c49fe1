"""Adapters of users: the documented one, and what is refused before it can quantize nonsense."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mambaquant_ext import quantize_, recipe, routes
from mambaquant_ext.calibrate import agreement
from mambaquant_ext.model.adapters import BlockKind, KindsAdapter, register_adapter, registry
from mambaquant_ext.model.adapters.vmamba import ss2d_weights
from mambaquant_ext.model.sites import BlockSite, ChannelsLast, TokenSequence
from mambaquant_ext.model.vision.mamba_mixer import MambaMixer
from mambaquant_ext.model.vision.mixer import MixerSizes
from mambaquant_ext.model.vision.vim import VimMixer
from mambaquant_ext.model.vision.vim_config import BimambaType
from mambaquant_ext.model.vision.vmamba import SS2D, VMamba, VMambaConfig
from mambaquant_ext.pipeline import ModuleSource
from mambaquant_ext.routes import ScanRoute
from mambaquant_ext.run.swap import QuantCalledBlock
from stages.vision import quantizing
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR, assert_equal, sqnr_db

DOCUMENT = Path(__file__).parents[3] / "docs" / "adapters.md"
LINES_OF_AN_ADAPTER = 30
RECIPE = recipe("w8a8")


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is forgotten."""
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    monkeypatch.setattr(routes, "_ORDERS", dict(routes._ORDERS))


# The document


def test_the_documented_adapter_runs(tmp_path, monkeypatch):
    text = DOCUMENT.read_text(encoding="utf-8")
    model_code, adapter_code, use = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(adapter_code.splitlines()) <= LINES_OF_AN_ADAPTER
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for code in (model_code, adapter_code, use):
        exec(compile(code, DOCUMENT.name, "exec"), names)
    assert [name for name, m in names["model"].named_modules() if type(m) is QuantCalledBlock] == [
        "blocks.0",
        "blocks.1",
    ]
    assert type(names["model"].head).__name__ == "QuantLinear"
    assert_equal(names["again"](names["images"][0]), names["model"](names["images"][0]))
    # The description is exact, and int8 close to it.
    fresh = quantizing.uneven_model(lambda _: names["Net"](), None)
    quantizing.assert_stand_ins_equal(fresh, names["images"][0])
    assert quantizing.preserved(fresh, names["images"], RECIPE) < RELATIVE_ERROR[torch.float64]
    model, _ = quantizing.quantized(fresh, quantizing.random_batches((8, 3, 32, 32), 8))
    (unseen,) = quantizing.random_batches((4, 3, 32, 32), 1, seed=5)
    actual, expected = (quantizing.outputs(m, unseen)[0] for m in (model, fresh))
    assert sqnr_db(actual, expected) >= MODEL_SQNR_DB["documented"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("block.out_proj.weight) / 2", "block.out_proj.weight)"),
        ("reverse=True", "reverse=False"),
        ('TokenOrder("checkerboard")', "TokenOrder()"),
        ("branch=1", "branch=0"),
        ("(in_x, in_z), (x_bias, z_bias)", "(in_z, in_x), (z_bias, x_bias)"),
        ("(block.rows, block.squares)", "(block.squares, block.rows)"),
    ],
)
def test_mistakes_in_the_documented_adapter_are_found(right, wrong):
    text = DOCUMENT.read_text(encoding="utf-8")
    model_code, adapter_code, _ = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert right in adapter_code
    names = {}
    for code in (model_code, adapter_code.replace(right, wrong)):
        exec(compile(code, DOCUMENT.name, "exec"), names)
    model = quantizing.uneven_model(lambda _: names["Net"](), None)
    images = [torch.randn(4, 3, 32, 32)]
    before = quantizing.outputs(model, images[0])[0]
    with pytest.raises(
        ValueError, match=r"adapter 'two-way' does not describe Net.*block blocks\.0"
    ):
        quantize_(model, images, RECIPE)
    assert_equal(quantizing.outputs(model, images[0])[0], before)


# What is refused


def vmamba(**changes):
    config = VMambaConfig(depths=(1, 2), dims=(8, 16), classes=5, **changes)
    return quantizing.uneven_model(VMamba, config)


def wrong_in_block(index, change):
    """An adapter of VMamba that describes one block wrongly."""

    class Wrong(KindsAdapter):
        name = "wrong"
        kinds = (BlockKind(lambda m: isinstance(m, SS2D), lambda _: ChannelsLast(), ss2d_weights),)

        def sites(self, model):
            sites = super().sites(model)
            right = sites[index]
            sites[index] = BlockSite(
                right.name, right.contract, lambda: change(right.weights()), right.keeps
            )
            return sites

    return register_adapter(Wrong())


def reverse_all(weights):
    return weights.replace(
        routes=tuple(
            ScanRoute(route.order, not route.reverse, route.branch) for route in weights.routes
        )
    )


@pytest.mark.parametrize(
    ("index", "name"), [(0, "layers.0.blocks.0.op"), (2, "layers.1.blocks.1.op")]
)
def test_the_block_that_is_described_wrongly_is_named(index, name):
    wrong_in_block(index, reverse_all)
    with pytest.raises(ValueError, match=rf"adapter 'wrong' .* block {re.escape(name)}, .*off by"):
        quantize_(vmamba(), quantizing.random_batches((2, 3, 24, 32)), RECIPE)


def test_values_that_are_not_finite_are_a_difference():
    wrong_in_block(1, lambda weights: weights.replace(out=weights.out * torch.nan))
    with pytest.raises(ValueError, match=r"block layers\.1\.blocks\.0\.op, .*off by inf"):
        quantize_(vmamba(), quantizing.random_batches((2, 3, 24, 32)), RECIPE)


def test_a_mixer_that_walks_both_ways_is_no_mamba_mixer():
    """It has all parts of one, and more that nothing here would read."""
    sizes = MixerSizes(
        hidden=16,
        dim=32,
        dstate=4,
        dt_rank=4,
        width=4,
        has_in_bias=False,
        has_conv_bias=True,
        has_out_bias=False,
    )
    model = nn.Sequential(nn.Linear(3, 16), VimMixer(sizes, BimambaType.V2, takes_mean=True)).eval()
    with pytest.raises(
        ValueError, match=r"adapter 'mixers' does not describe Sequential.*block 1,"
    ):
        quantize_(model, [torch.randn(2, 20, 3)], RECIPE)


def test_a_block_that_cannot_be_read_is_named():
    def refuse(_weights):
        raise TypeError("expected something else")

    wrong_in_block(1, refuse)
    with pytest.raises(TypeError, match=r"^layers\.1\.blocks\.0\.op: expected something else$"):
        ModuleSource(vmamba())


class Nested(nn.Module):
    """Outputs in every kind of container, of which only one knows of the second mixer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = MambaMixer(16, 4), MambaMixer(16, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.drop(self.first(x))
        return {"features": [x, (self.second(x) * scale,)], "count": 3, "ids": torch.arange(4)}


class Second(KindsAdapter):
    """Wrong for the second mixer if its gate is halved."""

    name = "second"

    def matches(self, model):
        return isinstance(model, Nested)

    def sites(self, model):
        mixers = registry.adapter("mixers").sites(model)
        return [
            mixers[0],
            BlockSite("second", TokenSequence(), lambda: self.change(mixers[1].weights())),
        ]

    def change(self, weights):
        return weights


def test_outputs_inside_containers_are_compared():
    batches = [(torch.randn(2, 20, 16), 0.5), {"x": torch.randn(2, 20, 16)}]
    adapter = register_adapter(Second())
    # Dropout would make every output another: a model is compared as it is used, in eval mode.
    model = Nested().train()
    quantize_(model, batches, RECIPE)
    assert type(model.second) is QuantCalledBlock
    adapter.change = lambda weights: weights.replace(out=1.01 * weights.out)
    model = Nested().train()
    with pytest.raises(ValueError, match=r"adapter 'second' .*block second, .*off by 0\.01 "):
        quantize_(model, batches, RECIPE)
    assert model.training


def test_a_model_whose_own_output_is_not_finite_is_left_to_calibration():
    model = vmamba()
    model.patch_embed[0].weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="calibration: expected finite activations"):
        quantize_(model, [torch.randn(2, 3, 24, 32)], RECIPE)


class InsistsOnFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = MambaMixer(16, 4)

    def forward(self, x):
        return self.mixer(x.float())


def test_where_float64_cannot_run_float32_decides():
    model = InsistsOnFloat32().eval()
    source = ModuleSource(model)
    wrong = [source.layers[0].replace(out=1.1 * source.layers[0].out)]
    with pytest.raises(ValueError, match=r"block mixer, .*off by 0\.1 "):
        agreement.check_stand_ins(model, source.sites, wrong, torch.randn(1, 5, 16), "mixers")
