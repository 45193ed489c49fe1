"""What a result must say about the GPU: `python -m bench.gpu_machine` prints it, with bench.machine's, as JSON."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import torch

from bench import machine

# What nvidia-smi tells and torch does not, by the name that results use.
QUERIES = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "max_memory_clock_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def query(pci_bus_id: str | None = None) -> dict[str, Any]:
    """Driver, clocks, power limit and temperature now; None for what nvidia-smi does not tell.

    Args:
        pci_bus_id: of the GPU; None, or one that nvidia-smi does not know, stands for the first.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES.values())}"]
    command.append("--format=csv,noheader,nounits")
    for which in ([f"--id={pci_bus_id}"], []) if pci_bus_id else ([],):
        try:
            done = subprocess.run(
                [*command, *which], capture_output=True, text=True, check=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return parse_query(done.stdout)
    return dict.fromkeys(QUERIES)


def parse_query(text: str) -> dict[str, Any]:
    """The first line of nvidia-smi's answer; figures as numbers, "[N/A]" and its like as None."""
    fields = [field.strip() for field in (text.splitlines() or [""])[0].split(",")]
    if len(fields) != len(QUERIES):
        return dict.fromkeys(QUERIES)
    return {
        name: field if name == "driver" else _number(field)
        for name, field in zip(QUERIES, fields, strict=True)
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def l2_bytes() -> int:
    """Of the current GPU."""
    return int(torch.cuda.get_device_properties().L2_cache_size)


def describe_gpu() -> dict[str, Any]:
    """The current GPU and what drives it."""
    properties = torch.cuda.get_device_properties()
    bus = getattr(properties, "pci_bus_id", None)
    domain = getattr(properties, "pci_domain_id", 0)
    device = getattr(properties, "pci_device_id", 0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(),
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        **query(None if bus is None else f"{domain:08x}:{bus:02x}:{device:02x}.0"),
    }


def describe() -> dict[str, Any]:
    """bench.machine's description with the GPU's as "gpu"."""
    return {**machine.describe([]), "gpu": describe_gpu()}


def lines(gpu: dict[str, Any]) -> list[str]:
    """The GPU in two lines."""
    clocks = [
        f"{gpu[name]:.0f}" if gpu[name] is not None else "?"
        for name in ("sm_clock_mhz", "max_sm_clock_mhz", "memory_clock_mhz")
    ]
    return [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_bytes'] >> 20} MiB, "
        f"memory {gpu['memory_bytes'] / 2**30:.0f} GiB",
        f"driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}; clocks at the start {clocks[0]} of "
        f"{clocks[1]} MHz, memory {clocks[2]} MHz",
    ]


if __name__ == "__main__":
    print(json.dumps(describe()))
