"""Ours beside the peers on whole language models: `python -m bench.cpu`, or `make bench-cpu`. See bench/README.md."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import cpu_bars, cpu_report, machine, plot, report
from bench.cpu_bench import Bench
from bench.cpu_plan import PLANS
from bench.engines import ENGINES, OURS
from bench.run import OutputDir, show_progress
from bench.shapes import LANGUAGE_MODELS
from bench.workers import EngineError

KERNEL_GROUPS = ("conv1d", "gemm", "hadamard", "norm", "selective_scan")
PACKAGES = ("llama_cpp_python", "gguf", "mambapy", "transformers")
FORCED_ISA = "avx2"


class Preset(str, Enum):
    """See bench/cpu_plan.py."""

    QUICK = "quick"
    FULL = "full"


def kernel_rows(threads: int, path: Path, isa: str | None = None) -> dict[str, Any]:
    """A run of bench.run in a process of its own: kernels beside torch, eager and compiled, and their roofs.

    Args:
        threads: to compute with.
        path: of its JSON file.
        isa: to force; None for the best.

    Raises:
        EngineError: it failed; the message holds its last line.
    """
    command = [sys.executable, "-m", "bench.run", "--preset", "cpu", "--json", str(path)]
    command += ["--threads", str(threads), *(f"--op={group}" for group in KERNEL_GROUPS)]
    command += [] if isa is None else ["--isa", isa]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"bench.run: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return report.read_json(path)


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
        Preset, typer.Argument(help="quick, ten minutes; full, hours.")
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
    bench = Bench(plan, list(dict.fromkeys(names)), output_dir / "models")
    bench.run()
    if not bench.samples:
        raise typer.BadParameter(f"nothing could be measured: {bench.left_out}")
    threads = max(bench.roofs)
    described["threads"] = threads
    timed = {}
    if kernels:
        for isa in (None, FORCED_ISA) if preset is Preset.FULL else (None,):
            show_progress(f"kernels {isa or ''}")
            path = output_dir / f"cpu-kernels-{isa or 'best'}.json"
            try:
                timed[isa] = kernel_rows(threads, path, isa)
            except EngineError as error:
                bench.leave_out(OURS, f"kernels {isa or ''}", str(error))
    finish(collect(preset.value, described, bench, timed), output_dir / f"cpu-{preset.value}.json")


def collect(
    preset: str, described: dict[str, Any], bench: Bench, timed: dict[str | None, dict[str, Any]]
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    threads = max(bench.roofs)
    rows = timed[None]["rows"] if None in timed else []
    shares = cpu_report.shares(bench.samples, bench.probed, LANGUAGE_MODELS, bench.weight_bytes)
    return {
        "schema": report.SCHEMA,
        "command": "cpu",
        "preset": preset,
        "machine": described,
        "roofs": bench.roofs[threads].to_dict(),
        "roofs_by_threads": {str(n): roofs.to_dict() for n, roofs in bench.roofs.items()},
        "engines": bench.settings,
        "bars": [cpu_bars.values(bar) for bar in cpu_bars.bars(bench.samples, shares, rows)],
        "rows": cpu_report.peer_rows(bench.samples),
        "shares": [asdict(share) for share in shares],
        "long_prompts": bench.long_prompts,
        "first_tokens": bench.first_tokens,
        "kernels": rows,
        **{f"kernels_{isa}": values["rows"] for isa, values in timed.items() if isa is not None},
        "left_out": bench.left_out,
    }


def finish(values: dict[str, Any], path: Path) -> None:
    """Writes JSON, Markdown and, with matplotlib, a plot; prints the tables, the bars last."""
    show_progress("")
    tables = cpu_report.tables(values)
    for line in report.machine_lines(values):
        print(line)
    for title, header, body in tables:
        report.print_table(title, header, body)
    report.write_json(values, path)
    page, image = path.with_suffix(".md"), path.with_suffix(".png")
    page.write_text(cpu_report.page(values, tables), encoding="utf-8")
    written = [path, page]
    try:
        plot.draw(values, image)
    except ImportError as error:
        print(error)
    else:
        written.append(image)
    print(", ".join(map(str, written)))


if __name__ == "__main__":
    typer.run(run)
