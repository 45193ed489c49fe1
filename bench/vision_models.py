"""Every family of vision models, quantized to W8A8 at a small size with random weights.

    python -m bench.vision_models [--json FILE] [--markdown FILE]

Nothing is trained: the figures say that routes, transforms and kernels of each family are right, not how accurate it
is. A cell that cannot be measured says why, and the command exits with 1.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench import report, small_models
from bench.machine import describe
from mambaquant_ext import Fidelity
from mambaquant_ext.artifacts import PackedModel
from mambaquant_ext.cli.console import print_line, progress_bar
from mambaquant_ext.config import PRESETS
from mambaquant_ext.model.vision import (
    mamba_nd,
    mamba_nd_config,
    mhs_vm,
    msvmamba,
    rsmamba,
    unet,
    vim,
    vim_config,
    vmamba,
)
from mambaquant_ext.model.vision.mamba_mixer import MambaMixer
from mambaquant_ext.model.vision.multi_head_scan import MultiHeadScan
from mambaquant_ext.run.modules import QuantLinear
from mambaquant_ext.run.swap import QuantCalledBlock

RECIPE = PRESETS["w8a8"]
CALIBRATION_BATCHES, BATCH, UNSEEN = 4, 8, 32
ADAPTERS_PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
BEGIN, END = "<!-- python -m bench.vision_models -->", "<!-- end of the table -->"
HEADER = [
    "family", "checked names and shapes", "routes a block", "transforms change", "int8 blocks", "int8 head", "R1",
    "integer / emulated, dB", "equal arg max", "integer / float, dB (random weights)",
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        name: in the table.
        make: the small float model, with weights of any value.
        block: class name of its Mamba blocks.
        shape: of one input.
        published: label to what makes the whole model, of those whose names and shapes the tests check. Where it is
            empty they check small ones by the same rules; None: there are no names but the user's.
    """

    name: str
    make: Callable[[], nn.Module]
    block: str
    shape: tuple[int, ...]
    published: Mapping[str, Callable[[], nn.Module]] | None = field(default_factory=dict)


def makers(
    model_class: Callable[[Any], nn.Module], configs: Mapping[str, Any]
) -> dict[str, Callable[[], nn.Module]]:
    """Label to what makes a model of a configuration."""
    return {name: lambda config=config: model_class(config) for name, config in configs.items()}


def vim_family(name: str, **changes: Any) -> Family:
    """Vim over 4 by 4 patches and a class token."""
    config = vim_config.VimConfig(
        img_size=16, channels=2, patch_size=4, stride=4, embed_dim=24, depth=3, num_classes=7,
        d_state=8, dt_rank=4, mean=(0.5, 0.4), std=(0.2, 0.3), **changes,
    )  # fmt: skip
    sizes = {"T": "TINY", "S": "SMALL", "B": "BASE"}
    sizes |= {f"{short}+": f"{long}_PLUS" for short, long in sizes.items()}
    published = {short: getattr(vim_config, f"VIM_{n}") for short, n in sizes.items()}
    return Family(
        name,
        lambda: vim.VisionMamba(config),
        "VimBlock",
        (2, 16, 16),
        {} if changes else makers(vim.VisionMamba, published),
    )


def mamba_nd_family(
    name: str, model_class: Any, published: Mapping[str, Any], **changes: Any
) -> Family:
    """Mamba-ND over an image or three frames."""
    values = {
        "embed_dim": 48, "depth": 4, "num_classes": 7, "channels": 2, "mean": (0.4, 0.5),
        "std": (0.2, 0.3), **changes,
    }  # fmt: skip
    config = mamba_nd_config.MambaNDConfig(**values)
    return Family(
        name,
        lambda: model_class(config),
        "MambaNDBlock",
        (2, *config.input_size),
        makers(model_class, published),
    )


def vmamba_family(name: str, suffix: str, **changes: Any) -> Family:
    """VMamba with maps of 6 by 8 and 3 by 4 tokens."""
    config = vmamba.VMambaConfig(depths=(1, 2), dims=(8, 16), classes=5, **changes)
    published = {
        preset: known for preset, known in vmamba.PRESETS.items() if re.search(suffix, preset)
    }
    make = makers(vmamba.VMamba, published)
    return Family(name, lambda: vmamba.VMamba(config), "SS2D", (3, 24, 32), make)


def unet_family(name: str, placement: unet.Placement) -> Family:
    """A U-Net over a volume of 8 by 8 by 8 voxels."""
    config = unet.UNetConfig(
        features=(4, 8, 12), image_channels=2, classes=3, dstate=4, image_size=(8, 8, 8),
        placement=placement,
    )  # fmt: skip
    return Family(name, lambda: unet.MambaUNet(config), MambaMixer.__name__, (2, 8, 8, 8))


def documented() -> Family:
    """The model and the adapter that docs/adapters.md shows; making it registers that adapter."""

    def make() -> nn.Module:
        text = ADAPTERS_PAGE.read_text(encoding="utf-8")
        names: dict[str, Any] = {}
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[:2]:
            exec(compile(code, ADAPTERS_PAGE.name, "exec"), names)
        model = names["Net"]()
        assert isinstance(model, nn.Module)
        return model

    return Family("a user's own, docs/adapters.md", make, "TwoWay", (3, 32, 32), None)


def families() -> list[Family]:
    """All rows."""
    volume = {"input_size": (6, 8, 4), "patch_size": (2, 2, 2)}
    small_ms = msvmamba.MSVMambaConfig(depths=(1, 2), dims=(8, 16), classes=5, dstate=4)
    small_rs = rsmamba.RSMambaConfig(
        embed_dim=48, depth=2, num_classes=7, img_size=12, patch_size=4, stride=3, shuffle_seed=5
    )
    small_mhs = mhs_vm.MHSConfig(
        depths=(1, 1), decoder_depths=(1, 1), classes=2, dstate=2, hidden=16
    )
    rsmambas = {size: getattr(rsmamba, f"RSMAMBA_{size}") for size in "BLH"}
    return [
        vim_family("Vim v2"),
        vim_family("Vim v1", bimamba_type=vim_config.BimambaType.V1),
        vim_family("Vim v2, LayerNorm", rms_norm=False),
        mamba_nd_family(
            "Mamba-ND, images",
            mamba_nd.MambaND,
            {
                "2D-S": mamba_nd_config.MAMBA_2D_S,
                "2D-B": mamba_nd_config.MAMBA_2D_B,
            },
            input_size=(12, 8),
            patch_size=(2, 2),
            downsample=(1,),
            final_norm=True,
            pooled_norm=True,
        ),
        mamba_nd_family(
            "Mamba-ND, video",
            mamba_nd.MambaND,
            {"3D-S": mamba_nd_config.MAMBA_3D_S},
            **volume,
        ),
        mamba_nd_family(
            "Mamba-ND, 3-D encoder",
            mamba_nd.MambaNDEncoder,
            {"3D-S encoder": mamba_nd_config.MAMBA_3D_S_ENCODER},
            **{**volume, "num_classes": 0, "out_indices": (1, 3)},
        ),
        vmamba_family(
            "VMamba with gate (v0)",
            "v0$",
            dstate=4,
            ssm_ratio=2.0,
            has_gate=True,
            has_conv_bias=True,
            mlp_ratio=0.0,
        ),
        vmamba_family("VMamba without gate (v05_noz), one state", "s[12]l"),
        Family(
            "MSVMamba",
            lambda: msvmamba.MSVMamba(small_ms),
            "MultiScaleSS2D",
            (3, 24, 32),
            makers(msvmamba.MSVMamba, msvmamba.PRESETS),
        ),
        Family(
            "RSMamba, gated",
            lambda: rsmamba.RSMamba(small_rs),
            rsmamba.RSMambaLayer.__name__,
            (3, 12, 12),
            makers(rsmamba.RSMamba, rsmambas),
        ),
        Family(
            "MHS-VM",
            lambda: mhs_vm.MHSUNet(small_mhs),
            MultiHeadScan.__name__,
            (3, 24, 32),
            makers(mhs_vm.MHSUNet, mhs_vm.PRESETS),
        ),
        unet_family("U-Mamba, bottleneck", unet.Placement.BOTTLENECK),
        unet_family("U-Mamba, encoder", unet.Placement.ENCODER),
        unet_family("MambaMIM", unet.Placement.MIM),
        documented(),
    ]


class Subject:
    """A family's models and inputs, each made when a cell first needs it."""

    def __init__(self, family: Family) -> None:
        self.family = family

    @cached_property
    def model(self) -> nn.Module:
        """Float, with uneven random weights."""
        return small_models.uneven_model(lambda _: self.family.make(), None)

    @cached_property
    def batches(self) -> list[Tensor]:
        """To calibrate on."""
        return small_models.random_batches((BATCH, *self.family.shape), CALIBRATION_BATCHES)

    @cached_property
    def integer(self) -> tuple[nn.Module, PackedModel]:
        """On the int8 kernels."""
        return small_models.quantized(self.model, self.batches, RECIPE)

    @cached_property
    def results(self) -> dict[str, list[Tensor]]:
        """Outputs on inputs that calibration has not seen, of the three ways to run."""
        emulated, _ = small_models.quantized(self.model, self.batches, RECIPE, Fidelity.EMULATED)
        (unseen,) = small_models.random_batches((UNSEEN, *self.family.shape), 1, seed=5)
        models = {"float": self.model, "integer": self.integer[0], "emulated": emulated}
        return {name: small_models.outputs(model, unseen) for name, model in models.items()}

    def sqnr_db(self, found: str, wanted: str) -> float | None:
        """Of one way to run against another; None where they are equal."""
        values = [small_models.flat(self.results[name]) for name in (found, wanted)]
        decibels = small_models.sqnr_db(*values)
        return None if math.isinf(decibels) else decibels


def parameters(make: Callable[[], nn.Module]) -> int:
    """How many a model has, without their memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def configurations(subject: Subject) -> dict[str, int] | None:
    """Label to number of parameters; see Family.published."""
    published = subject.family.published
    if published is None:
        return None
    return {label: parameters(make) for label, make in published.items()}


def routes(subject: Subject) -> list[int]:
    """The numbers of routes that blocks have."""
    return sorted({len(block.layout.routes) for block in subject.integer[1].blocks})


def function(subject: Subject) -> float:
    """Largest relative error that the transforms make in float64."""
    return small_models.preserved(subject.model, subject.batches, RECIPE)


def blocks(subject: Subject) -> dict[str, int]:
    """Quantized blocks in the quantized model, and modules in the float one that have the class of a block."""
    quantized, _ = subject.integer
    return {
        "swapped": sum(type(m) is QuantCalledBlock for m in quantized.modules()),
        "found": sum(type(m).__name__ == subject.family.block for m in subject.model.modules()),
    }


def head(subject: Subject) -> str | None:
    """Name of the linear layer behind the blocks that is int8 now."""
    names = [n for n, m in subject.integer[0].named_modules() if type(m) is QuantLinear]
    return names[0] if names else None


def first_rotation(subject: Subject) -> str:
    """Where R1 is: in each block, which rotates its input, or folded into what writes and reads the stream."""
    is_local = {block.layout.has_in_rotation for block in subject.integer[1].blocks}
    return {(True,): "block", (False,): "stream"}[tuple(is_local)]


def equal_argmax(subject: Subject) -> dict[str, int]:
    """Places of all outputs where integer and emulation have the same largest channel."""
    pairs = zip(subject.results["integer"], subject.results["emulated"], strict=True)
    same = [found.argmax(1) == wanted.argmax(1) for found, wanted in pairs]
    return {
        "equal": sum(int(part.sum()) for part in same),
        "of": sum(part.numel() for part in same),
    }


CELLS: dict[str, Callable[[Subject], Any]] = {
    "configurations": configurations,
    "routes": routes,
    "function_error": function,
    "blocks": blocks,
    "head": head,
    "first_rotation": first_rotation,
    "integer_emulated_db": lambda subject: subject.sqnr_db("integer", "emulated"),
    "equal_argmax": equal_argmax,
    "integer_float_db": lambda subject: subject.sqnr_db("integer", "float"),
}


def measure(family: Family) -> dict[str, Any]:
    """A row: every cell, and under "failed" why a cell has no value."""
    subject = Subject(family)
    row: dict[str, Any] = {"family": family.name, "failed": {}}
    for name, cell in CELLS.items():
        try:
            row[name] = cell(subject)
        except Exception as error:  # whatever it is, the other cells and rows still say something
            row["failed"][name] = f"{type(error).__name__}: {error}"
    return row


def _configurations_text(found: Mapping[str, int] | None) -> str:
    if found is None:
        return "the user's"
    if not found:
        return "a small one"
    return ", ".join(f"{label} {count / 1e6:.1f} M" for label, count in found.items())


def _decibels_text(found: float | None) -> str:
    return "equal bits" if found is None else f"{found:.1f}"


TEXTS: dict[str, Callable[[Any], str]] = {
    "configurations": _configurations_text,
    "routes": lambda found: " or ".join(map(str, found)),
    "function_error": lambda found: f"{found:.0e}",
    "blocks": lambda found: f"{found['swapped']} of {found['found']}",
    "head": lambda found: "no" if found is None else f"`{found}`",
    "first_rotation": lambda found: found,
    "integer_emulated_db": _decibels_text,
    "equal_argmax": lambda found: f"{found['equal']} of {found['of']}",
    "integer_float_db": _decibels_text,
}


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """A row as text, in the order of HEADER."""
    failed = row["failed"]
    return [
        row["family"],
        *(
            f"failed: {failed[name].partition(':')[0]}" if name in failed else text(row[name])
            for name, text in TEXTS.items()
        ),
    ]


def table(values: Mapping[str, Any]) -> str:
    """The table of a result, as Markdown."""
    return "\n".join(report.markdown_table(HEADER, [cells_of(row) for row in values["rows"]]))


def insert(page: str, values: Mapping[str, Any]) -> str:
    """A page with the table of a result between its two markers.

    Raises:
        ValueError: not one marker each, in this order.
    """
    return report.insert(page, BEGIN, END, table(values))


def failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every cell without a value."""
    return [
        f"{row['family']}: {cell}: {why}" for row in rows for cell, why in row["failed"].items()
    ]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write figures.")] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Also write the table between a page's markers."
        ),
    ] = None,
) -> None:
    """Measures and prints."""
    values = {"schema": report.SCHEMA, "command": "vision-models", "machine": describe([])}
    rows: list[dict[str, Any]] = []
    todo = families()
    with progress_bar("families", len(todo), "family") as update:
        for family in todo:
            rows.append(measure(family))
            update(len(rows))
    values["rows"] = rows
    print_line(table(values))
    if json_file is not None:
        report.write_json(values, json_file)
    if markdown is not None:
        text = insert(markdown.read_text(encoding="utf-8"), values)
        markdown.write_text(text, encoding="utf-8")
    if failed := failures(rows):
        sys.stderr.write("".join(f"{line}\n" for line in failed))
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
