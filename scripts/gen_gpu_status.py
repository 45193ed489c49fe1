"""Writes docs/gpu-status.md: for each CUDA kernel, what was simulated, compiled and run, and on which GPU.

Usage: python -m scripts.gen_gpu_status [--check]; with --check it writes nothing and exits 1 where the file is not
current.

Reads bench/results/sim.json (`make bench-sim`) and bench/results/gpu-*.json (`make test-gpu`, `make bench-gpu`). What
none of them holds is said to be missing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import gen_docs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TARGET = ROOT / "docs" / "gpu-status.md"
HEADER = """# State of the CUDA kernels

Written by `make gpu-status` from `bench/results/sim.json` and `bench/results/gpu-*.json`; do not edit.

- **simulated**: run by `third_party/cudasim`, which checks bounds, alignment and races, by `make bench-sim`
- **compiled**: to machine code by nvcc, which tells registers and spills
- **run**: tested (`make test-gpu`) and timed (`make bench-gpu`) on a GPU
"""
NOT_YET = "not yet"

Record = Mapping[str, Any]


@dataclass
class Evidence:
    """Everything that the results say.

    Attributes:
        sim_rows: of sim.json.
        kernels: of sim.json: one entry a kernel and architecture.
        tests: file name and record of each `make test-gpu`.
        benches: file name and record of each `make bench-gpu`.
    """

    sim_rows: list[Record] = field(default_factory=list)
    kernels: list[Record] = field(default_factory=list)
    tests: list[tuple[str, Record]] = field(default_factory=list)
    benches: list[tuple[str, Record]] = field(default_factory=list)


def read_evidence(folder: Path = RESULTS) -> Evidence:
    """The results of a folder; files that are not there say nothing.

    Raises:
        ValueError: a gpu-*.json that neither command wrote.
    """
    evidence = Evidence()
    simulated = folder / "sim.json"
    if simulated.is_file():
        values = json.loads(simulated.read_text(encoding="utf-8"))
        evidence.sim_rows, evidence.kernels = values.get("rows", []), values.get("kernels", [])
    for path in sorted(folder.glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"test-gpu": evidence.tests, "bench-gpu": evidence.benches}
        if record.get("command") not in kinds:
            raise ValueError(
                f"{path}: expected a result of test-gpu or bench-gpu, got {record.get('command')!r}"
            )
        kinds[record["command"]].append((path.name, record))
    return evidence


def group_of_source(source: str, groups: Iterable[str]) -> str | None:
    """The group of norm.cu, norm_f16.cu and the like: the longest that its name begins with."""
    stem = source.removesuffix(".cu")
    found = [group for group in groups if stem == group or stem.startswith(f"{group}_")]
    return max(found, key=len) if found else None


def order_of(architecture: str) -> int:
    """sm_90a as 90."""
    return int(re.sub(r"\D", "", architecture))


def family_of(kernel: str) -> str:
    """A kernel's name without its template arguments."""
    return kernel.partition("<")[0]


def simulated_cell(op: str, rows: Iterable[Record]) -> str:
    """How many cases of an operator were simulated, as which devices, and how many missed a limit."""
    own = [row for row in rows if row["op"] == op]
    if not own:
        return "not simulated"
    devices = ", ".join(dict.fromkeys(str(row.get("device", "?")) for row in own))
    beyond = sum(not row.get("is_within_limits", True) for row in own)
    cases = f"{len(own)} case{'s' if len(own) > 1 else ''} as {devices}"
    return cases + (f", {beyond} beyond a limit" if beyond else "")


def timed_cell(op: str, benches: Iterable[tuple[str, Record]]) -> str:
    """How many shapes of an operator were timed, on which GPU."""
    found = []
    for name, record in benches:
        count = sum(row["op"] == op for row in record["rows"])
        if count:
            found.append(f"{count} shapes on {record['machine']['gpu']['name']} (`{name}`)")
    return "; ".join(found) or NOT_YET


def tested_lines(group: str, tests: Iterable[tuple[str, Record]]) -> list[str]:
    """What the tests of a group gave on each GPU."""
    lines = []
    for name, record in tests:
        counts = record["tests"]["groups"].get(group)
        if counts:
            told = ", ".join(f"{count} {word}" for word, count in counts.items())
            lines.append(f"{record['machine']['gpu']['name']}: {told} (`{name}`)")
    return lines


def kernel_table(kernels: list[Record]) -> list[str]:
    """A line for each kernel: instantiations, the most registers on each architecture, spills."""
    architectures = sorted({k["architecture"] for k in kernels}, key=order_of)
    lines = [
        f"| kernel | instantiations | {' | '.join(architectures)} | spilled bytes |",
        f"| --- | ---: |{' ---: |' * len(architectures)} ---: |",
    ]
    families: dict[str, list[Record]] = {}
    for kernel in kernels:
        families.setdefault(family_of(kernel["kernel"]), []).append(kernel)
    for family, members in sorted(families.items()):
        registers = []
        for architecture in architectures:
            own = [k["registers"] for k in members if k["architecture"] == architecture]
            registers.append(str(max(own)) if own else "-")
        count = len({(k["source"], k["kernel"]) for k in members})
        spills = sum(k["spill_bytes"] for k in members)
        lines.append(f"| `{family}` | {count} | {' | '.join(registers)} | {spills} |")
    return lines


def render_group(group: str, ops: list[str], evidence: Evidence, kernels: list[Record]) -> str:
    """One group's section."""
    lines = [f"## {group}", "", "| operator | simulated | timed |", "| --- | --- | --- |"]
    for op in ops:
        simulated = simulated_cell(op, evidence.sim_rows)
        lines.append(f"| `{op}` | {simulated} | {timed_cell(op, evidence.benches)} |")
    tested = tested_lines(group, evidence.tests)
    lines += ["", f"Tested on a GPU: {'; '.join(tested) or NOT_YET}.", ""]
    if not kernels:
        return "\n".join([*lines, "Compiled: not recorded.", ""])
    architectures = sorted({k["architecture"] for k in kernels}, key=order_of)
    lines += [f"Compiled for {', '.join(architectures)}; most registers a thread:", ""]
    return "\n".join([*lines, *kernel_table(kernels), ""])


def render_gpus(evidence: Evidence) -> str:
    """Every record of a GPU, in a line."""
    lines = ["## GPUs", ""]
    for name, record in evidence.tests:
        checks = ", ".join(f"{t} {r['outcome']}" for t, r in record["sanitizer"].items()) or "none"
        groups = record["tests"]["groups"].values()
        passed, failed = (sum(g[word] for g in groups) for word in ("passed", "failed"))
        lines.append(
            f"- `{name}`: {_machine(record)}; tests {record['tests']['outcome']}: {passed} passed, "
            f"{failed} failed; compute-sanitizer: {checks}"
        )
    for name, record in evidence.benches:
        without = len(record.get("not_timed", []))
        lines.append(
            f"- `{name}`: {_machine(record)}; {len(record['rows'])} rows timed"
            + (f", {without} cases without a row" if without else "")
        )
    if len(lines) == 2:
        lines.append("No kernel has been run on a GPU yet.")
    return "\n".join([*lines, ""])


def _machine(record: Record) -> str:
    machine = record["machine"]
    gpu = machine["gpu"]
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}, "
        f"torch {machine['versions']['torch']}, commit {machine['commit']}, {machine['date'][:10]}"
    )


def render(evidence: Evidence, stems: Mapping[str, str] | None = None) -> str:
    """The text of docs/gpu-status.md.

    Args:
        evidence: what the results say.
        stems: operator to group; None stands for those of schema.cpp.
    """
    stems = gen_docs.groups() if stems is None else stems
    groups: dict[str, list[str]] = {}
    for op, group in stems.items():
        groups.setdefault(group, []).append(op)
    kernels: dict[str | None, list[Record]] = {}
    for kernel in evidence.kernels:
        kernels.setdefault(group_of_source(kernel["source"], groups), []).append(kernel)
    parts = [HEADER, render_gpus(evidence)]
    parts += [render_group(g, ops, evidence, kernels.get(g, [])) for g, ops in groups.items()]
    if None in kernels:
        parts.append("\n".join(["## Other sources", "", *kernel_table(kernels[None]), ""]))
    return "\n".join(parts)


def main() -> int:
    """Writes or checks the file."""
    text = render(read_evidence())
    if "--check" not in sys.argv[1:]:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print("docs/gpu-status.md is not current: run make gpu-status", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
