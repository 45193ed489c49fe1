"""Ours beside the peers on whole language models: `python -m bench.cpu`, or `make bench-cpu`. See bench/README.md."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import machine, plot, report
from bench.command import OutputDir, result, show_progress
from bench.cpu import bars
from bench.cpu.engines import ENGINES, OURS
from bench.cpu.kernels import FORCED_ISA, KernelError, measure_kernels
from bench.cpu.plan import PLANS
from bench.cpu.report import page, tables
from bench.cpu.rows import kernel_rows, model_rows, start_rows
from bench.cpu.session import Session
from bench.cpu.shares import shares
from bench.report import Row
from bench.shapes import LANGUAGE_MODELS

PACKAGES = ("llama_cpp_python", "gguf", "mambapy", "transformers")


class Preset(str, Enum):
    """See bench/cpu/plan.py."""

    QUICK = "quick"
    FULL = "full"


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(
    preset: Annotated[
        Preset, typer.Argument(help="quick, eight minutes; full, hours.")
    ] = Preset.FULL,
    size: Annotated[
        list[str] | None, typer.Option("--size", help="mamba-130m ...; may be repeated.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Beside ours; may be repeated.")
    ] = None,
    kernels: Annotated[bool, typer.Option(help="Time the kernels too.")] = True,
    output_dir: OutputDir = Path("bench-output"),
) -> None:
    """Time whole models, ours and the peers in turn, and the kernels; hold both against the machine."""
    plan = PLANS[preset.value]
    unknown = [n for n in size or () if n not in LANGUAGE_MODELS]
    unknown += [n for n in engine or () if n not in ENGINES]
    if unknown:
        known = ", ".join([*LANGUAGE_MODELS, *ENGINES])
        raise typer.BadParameter(f"expected some of {known}, got {', '.join(unknown)}")
    plan = replace(plan, sizes=tuple(size)) if size else plan
    logging.getLogger("transformers").setLevel(logging.ERROR)
    described = machine.describe(machine.allowed_cores()[:2])
    described["versions"] |= versions()
    names = [OURS, *(n for n in ENGINES if n in engine)] if engine else list(ENGINES)
    bench = Session(plan, list(dict.fromkeys(names)), output_dir / "models")
    bench.run()
    if not bench.samples:
        raise typer.BadParameter(f"nothing could be measured: {bench.left_out}")
    described["threads"] = max(bench.roofs)
    timed = time_kernels(bench, preset, output_dir) if kernels else {}
    finish(collect(preset.value, described, bench, timed), output_dir / f"cpu-{preset.value}.json")


def time_kernels(bench: Session, preset: Preset, folder: Path) -> dict[str | None, list[Row]]:
    """Rows of bench.run by the instruction set that is forced, None for the best."""
    timed: dict[str | None, list[Row]] = {}
    for isa in (None, FORCED_ISA) if preset is Preset.FULL else (None,):
        show_progress(f"kernels {isa or ''}")
        path = folder / f"cpu-kernels-{isa or 'best'}.json"
        try:
            timed[isa] = measure_kernels(max(bench.roofs), path, isa)["rows"]
        except KernelError as error:
            bench.leave_out(OURS, f"kernels {isa or ''}", str(error))
    return timed


def collect(
    preset: str, described: dict[str, Any], bench: Session, timed: dict[str | None, list[Row]]
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    kernels = timed.get(None, [])
    found = shares(bench.samples, bench.probed, LANGUAGE_MODELS, bench.decoded_bytes)
    return result(
        "cpu",
        described,
        preset=preset,
        roofs=bench.roofs[max(bench.roofs)].to_dict(),
        roofs_by_threads={str(n): roofs.to_dict() for n, roofs in bench.roofs.items()},
        engines=bench.settings,
        bars=[bars.values(bar) for bar in bars.bars(bench.samples, found, kernels)],
        rows=[
            *model_rows(bench.samples),
            *start_rows(bench.first_tokens),
            *(row for isa, kernel in timed.items() for row in kernel_rows(kernel, isa)),
        ],
        shares=[asdict(share) for share in found],
        long_prompts=bench.long_prompts,
        first_tokens=bench.first_tokens,
        kernels=kernels,
        kernels_avx2=timed.get(FORCED_ISA, []),
        left_out=bench.left_out,
    )


def finish(values: dict[str, Any], path: Path) -> None:
    """Writes JSON, Markdown and, with matplotlib, a plot; prints the tables, the bars last."""
    show_progress("")
    found = tables(values)
    for line in report.machine_lines(values):
        print(line)
    for title, header, body in found:
        report.print_table(title, header, body)
    report.write_json(values, path)
    text, image = path.with_suffix(".md"), path.with_suffix(".png")
    text.write_text(page(values, found), encoding="utf-8")
    written = [path, text]
    try:
        plot.draw(values, image)
    except ImportError as error:
        print(error)
    else:
        written.append(image)
    print(", ".join(map(str, written)))


if __name__ == "__main__":
    typer.run(run)
