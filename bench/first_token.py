"""One load and one prompt in a process that does nothing else; `bench.load` starts it and reads what it prints."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch

from mambaquant_ext import load, load_runner
from mambaquant_ext.model.hf import import_transformers

PROMPT = 16  # tokens


def resident_mb(folder: Path) -> tuple[float, float]:
    """Memory of this process that is its own, and that is mapped from a folder's files."""
    own, mapped, is_inside = 0, 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_inside = f" {folder}/" in line
        elif name == "Anonymous:":
            own += int(values[0])
        elif name == "Rss:" and is_inside:
            mapped += int(values[0])
    return own / 1e3, mapped / 1e3


def peak_mb() -> float:
    """The most memory that this process has had resident at a time."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1e3


def child(folder: Path, call: str, verify: bool | None, started: float) -> dict[str, float]:
    """Loads a model and reads a prompt, in a process that has done nothing else."""
    if call == "load":
        import_transformers().MambaForCausalLM  # noqa: B018, imported when it is asked for
    ids = torch.arange(PROMPT)[None]
    gc.collect()  # of what the imports left behind: it would fall on the load or not, by chance
    imports = time.time()
    before, _ = resident_mb(folder)
    begin = time.perf_counter()
    if call == "load":
        model = load(folder, verify=verify)
        loaded = time.perf_counter()
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
    else:
        runner = load_runner(folder, verify=verify)
        loaded = time.perf_counter()
        runner.forward(ids, runner.new_state()).argmax().item()
    end = time.perf_counter()
    own, mapped = resident_mb(folder)
    return {
        "imports_ms": (imports - started) * 1e3,
        "load_ms": (loaded - begin) * 1e3,
        "first_token_ms": (end - loaded) * 1e3,
        "from_disk_ms": (end - begin) * 1e3,
        "process_ms": (imports - started + end - begin) * 1e3,
        "own_mb": own - before,
        "mapped_mb": mapped,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    _, folder_name, call_name, verify_json, threads, started_at = sys.argv
    torch.set_num_threads(int(threads))
    found = child(Path(folder_name), call_name, json.loads(verify_json), float(started_at))
    print(json.dumps(found))
