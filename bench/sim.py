"""Counts what the CUDA kernels do, without a GPU: `python -m bench.sim`, or `make bench-sim`.

Runs each kernel in the simulator (third_party/cudasim) and reads its counters; takes registers and spills from
what ptxas said when the kernels were compiled. No figure here is a time. See bench/README.md.
"""

from __future__ import annotations

import json as json_module
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from scripts import ptxas_report

from bench import machine, report
from bench.command import show_progress
from bench.sim_cases import GROUPS, SimCase
from mambaquant_ext import _C

DEVICES = ("a100", "h100")
# The launchers of these choose by the number of multiprocessors and the compute capability; the others
# launch the same kernels the same way everywhere.
DEVICE_DEPENDENT = ("selective_scan", "gemm")
SECTOR_BYTES, WARP = 32, 32
COUNTERS = (
    "thread_instructions", "mma_macs", "global_load_bytes", "global_store_bytes", "global_load_sectors",
    "global_store_sectors", "shared_load_wavefronts", "shared_store_wavefronts",
    "shared_load_wavefronts_ideal", "shared_store_wavefronts_ideal",
)  # fmt: skip
FIGURES = ("bytes", "sectors", "wavefronts", "instructions")
HEADER = ["op", "shape", "device", *FIGURES, "limits", "kernels"]


def figures_of(counters: Counter[str], case: SimCase) -> dict[str, float | None]:
    """Ratios to the ideal, and thread instructions per element; None where there is nothing to count.

    bytes: requested from global memory by loads and stores. sectors: 32-byte sectors of all requests, as
    bytes. Caches are not modelled: a byte that is read twice counts twice.
    """
    moved = counters["global_load_bytes"] + counters["global_store_bytes"]
    sectors = counters["global_load_sectors"] + counters["global_store_sectors"]
    wavefronts = counters["shared_load_wavefronts"] + counters["shared_store_wavefronts"]
    ideal = counters["shared_load_wavefronts_ideal"] + counters["shared_store_wavefronts_ideal"]
    return {
        "bytes": moved / case.ideal_bytes,
        "sectors": sectors * SECTOR_BYTES / case.ideal_bytes,
        "wavefronts": wavefronts / ideal if ideal else None,
        "instructions": counters["thread_instructions"] / case.elements,
    }


def run_case(case: SimCase, device: str) -> dict[str, Any]:
    """One row: the figures of a case, summed over its launches."""
    _C.reset_simulator_stats()
    case.run()
    launches = json_module.loads(_C.simulator_stats())
    counters: Counter[str] = Counter()
    for launch in launches:
        counters.update({k: v for k, v in launch.items() if isinstance(v, int)})
    figures = figures_of(counters, case)
    names = ptxas_report.demangle([launch["kernel"] for launch in launches])
    return {
        "op": case.op,
        "shape": case.shape,
        "device": device,
        "figures": figures,
        "limits": case.limits,
        "is_within_limits": all((figures[k] or 0) <= limit for k, limit in case.limits.items()),
        "ideal_bytes": case.ideal_bytes,
        "elements": case.elements,
        "counters": {k: counters[k] for k in COUNTERS if counters[k]},
        "launches": [
            {
                "kernel": names[launch["kernel"]],
                **{k: launch[k] for k in ("grid", "block", "shared_bytes")},
            }
            for launch in launches
        ],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """The table's line of a row; a figure beyond its limit is marked."""
    shown = []
    for name in FIGURES:
        value, limit = row["figures"][name], row["limits"].get(name)
        mark = " !" if limit is not None and value is not None and value > limit else ""
        shown.append("-" if value is None else f"{value:.3f}{mark}")
    limits = ", ".join(f"{k} {v:g}" for k, v in row["limits"].items())
    kernels = ", ".join(launch["kernel"] for launch in row["launches"])
    return [row["op"], row["shape"], row["device"], *shown, limits, kernels]


def tile_table(kernels: list[ptxas_report.KernelResources]) -> list[str]:
    """The tiles of gemm: stages, shared memory, and how many blocks fit a multiprocessor of each kind."""
    names = ptxas_report.architectures_of(kernels)
    header = ["tile", "kernel", "threads", "stages", "operand KiB", "splits K", *names]
    rows = []
    for index, (tile, facts) in enumerate(_C.gemm_tiles()):
        kernel = "cutlass::device_kernel" if "sm90" in tile else f"gemm_tile_kernel<{index}>"
        fits = {
            k.architecture: f"{k.registers} / "
            f"{ptxas_report.blocks_per_multiprocessor(k, facts['threads'], facts['shared_bytes'])}"
            for k in kernels
            if k.kernel == kernel
        }
        rows.append(
            [
                tile, f"`{kernel}`", str(facts["threads"]), str(facts["stages"]),
                str(facts["shared_bytes"] // 1024), "yes" if facts["can_split"] else "no",
                *(fits.get(name, "-") for name in names),
            ]
        )  # fmt: skip
    return report.markdown_table(header, rows)


def page(values: dict[str, Any], body: list[list[str]], kernels: list[Any]) -> str:
    """The tables as Markdown."""
    made = values["machine"]
    lines = [
        "# CUDA kernels, counted",
        "",
        f"- in the simulator (third_party/cudasim); commit {made['commit']}; {made['date']}",
        "- bytes, sectors: global memory, over ideal; wavefronts: shared memory, over ideal;",
        "  instructions: thread instructions an element (scan: a token, channel and state)",
        "- `!` marks a figure beyond its limit",
        "",
        *report.markdown_table(HEADER, body),
        "",
        "## Tiles of gemm",
        "",
        "Rows x columns x depth of a block; registers a thread / blocks that fit a multiprocessor, by registers,",
        "shared memory and threads. Up to 16 rows of a run on `gemm_small_kernel` instead.",
        "",
        *tile_table(kernels),
        "",
        "## Registers",
        "",
        f"{sum(bool(k.spill_bytes) for k in kernels)} of {len(kernels)} spill. A thread has 255 at most.",
        "",
        *ptxas_report.table(kernels),
    ]
    return "\n".join(lines) + "\n"


def run(
    group: Annotated[
        list[str] | None, typer.Option("--group", help="Such as conv1d; may be repeated.")
    ] = None,
    build_dir: Annotated[
        Path, typer.Option(help="Where csrc/cuda was compiled to machine code.")
    ] = Path("build/kernels"),
    json: Annotated[Path, typer.Option("--json", dir_okay=False)] = Path("bench-output/sim.json"),
) -> None:
    """Count bytes, sectors, wavefronts, instructions, registers and spills of the CUDA kernels."""
    if not hasattr(_C, "set_simulating"):
        raise typer.BadParameter("this build has no simulator; `make bench-sim` makes one")
    unknown = set(group or ()) - set(GROUPS)
    if unknown:
        raise typer.BadParameter(f"--group: expected {', '.join(GROUPS)}, got {unknown.pop()}")
    kernels = ptxas_report.read_reports(build_dir)
    if not kernels:
        raise typer.BadParameter(f"no reports of ptxas under {build_dir}")
    rows = []
    _C.set_simulating(True)
    for name in group or GROUPS:
        for device in DEVICES if name in DEVICE_DEPENDENT else DEVICES[:1]:
            _C.set_simulated_device(device)
            for case in GROUPS[name]():
                show_progress(f"{case.op} {case.shape}")
                rows.append(run_case(case, device))
    _C.set_simulating(False)
    values = {
        "schema": report.SCHEMA,
        "command": "sim",
        "machine": machine.describe([]),
        "gemm_tiles": dict(_C.gemm_tiles()),
        "kernels": [asdict(kernel) for kernel in kernels],
        "rows": rows,
    }
    show_progress("")
    body = [cells(row) for row in rows]
    report.print_table("CUDA kernels in the simulator", HEADER, body)
    report.write_json(values, json)
    json.with_suffix(".md").write_text(page(values, body, kernels), encoding="utf-8")
    beyond = [row for row in rows if not row["is_within_limits"]]
    spills = [k for k in kernels if k.spill_bytes]
    print(
        f"{len(rows) - len(beyond)} of {len(rows)} rows within their limits; {len(spills)} spills"
    )
    print(f"{json}, {json.with_suffix('.md')}")


if __name__ == "__main__":
    typer.run(run)
