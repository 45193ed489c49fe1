"""docs/gpu-status.md is current, and says no more than the results do."""

import json
from pathlib import Path

import pytest
from scripts import gen_gpu_status as status

ROOT = Path(__file__).parents[2]
STEMS = {"norm_quantize": "norm", "selective_scan": "selective_scan", "hadamard": "hadamard"}
MACHINE = {
    "gpu": {"name": "NVIDIA H100", "compute_capability": "9.0", "driver": "580.1"},
    "versions": {"torch": "2.11.0"},
    "commit": "abc123",
    "date": "2026-11-26T10:00:00+00:00",
}


def kernel(source, name, architecture, registers, spills=0):
    return {
        "source": source, "kernel": name, "architecture": architecture, "registers": registers,
        "spill_bytes": spills, "shared_bytes": 0, "stack_bytes": 0,
    }  # fmt: skip


def sim_row(op, device="a100", good=True):
    return {"op": op, "shape": "1x1", "device": device, "is_within_limits": good}


SIM = {
    "rows": [sim_row("norm_quantize"), sim_row("norm_quantize", "h100", good=False)],
    "kernels": [
        kernel("norm.cu", "row_kernel<f32, 8>", "sm_90a", 40),
        kernel("norm.cu", "row_kernel<f16, 8>", "sm_90a", 48),
        kernel("norm.cu", "row_kernel<f16, 8>", "sm_80", 44, spills=8),
        kernel("selective_scan_f16.cu", "scan_kernel", "sm_80", 64),
        kernel("other.cu", "lonely", "sm_80", 9),
    ],
}
TEST = {
    "schema": 1, "command": "test-gpu", "machine": MACHINE,
    "tests": {
        "outcome": "passed",
        "groups": {
            "norm": {"passed": 90, "failed": 0, "skipped": 2},
            "gpu": {"passed": 10, "failed": 1, "skipped": 0},
        },
    },
    "sanitizer": {"memcheck": {"outcome": "clean"}, "racecheck": {"outcome": "absent"}},
}  # fmt: skip
BENCH = {
    "schema": 1, "command": "bench-gpu", "machine": MACHINE, "not_timed": [{}],
    "rows": [{"op": "norm_quantize"}, {"op": "norm_quantize"}],
}  # fmt: skip


def evidence_of(folder, **files):
    for name, values in files.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(values))
    return status.read_evidence(folder)


def section(text, group):
    return text.partition(f"## {group}\n")[2].partition("\n## ")[0]


def test_the_page_is_current():
    text = (ROOT / "docs" / "gpu-status.md").read_text(encoding="utf-8")
    assert text == status.render(status.read_evidence()), "run make gpu-status"


def test_no_results_say_nothing(tmp_path):
    text = status.render(evidence_of(tmp_path), STEMS)
    assert "No kernel has been run on a GPU yet." in text
    for group, op in (("norm", "norm_quantize"), ("hadamard", "hadamard")):
        assert f"| `{op}` | not simulated | not yet |" in section(text, group)
        assert "Tested on a GPU: not yet." in section(text, group)
        assert "Compiled: not recorded." in section(text, group)


def test_the_simulator_alone(tmp_path):
    text = status.render(evidence_of(tmp_path, sim=SIM), STEMS)
    norm = section(text, "norm")
    assert "| `norm_quantize` | 2 cases as a100, h100, 1 beyond a limit | not yet |" in norm
    assert "Compiled for sm_80, sm_90a" in norm
    assert "| `row_kernel` | 2 | 44 | 48 | 8 |" in norm
    assert "| `scan_kernel` | 1 | 64 | 0 |" in section(text, "selective_scan")
    assert "| `selective_scan` | not simulated | not yet |" in section(text, "selective_scan")
    assert "`lonely`" in section(text, "Other sources")
    assert "No kernel has been run on a GPU yet." in text


def test_results_of_a_gpu(tmp_path):
    found = evidence_of(tmp_path, sim=SIM, gpu_h100_test=TEST, gpu_h100_bench=BENCH)
    text = status.render(found, STEMS)
    gpus = section(text, "GPUs")
    assert "No kernel" not in gpus
    assert (
        "NVIDIA H100, compute capability 9.0, driver 580.1, torch 2.11.0, commit abc123, 2026-11-26"
        in gpus
    )
    assert (
        "tests passed: 100 passed, 1 failed; compute-sanitizer: memcheck clean, racecheck absent"
        in gpus
    )
    assert "2 rows timed, 1 cases without a row" in gpus
    norm = section(text, "norm")
    assert "2 shapes on NVIDIA H100 (`gpu-h100-bench.json`)" in norm
    assert (
        "Tested on a GPU: NVIDIA H100: 90 passed, 0 failed, 2 skipped (`gpu-h100-test.json`)."
        in norm
    )
    assert "Tested on a GPU: not yet." in section(text, "hadamard")


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gpu-x\.json: expected a result of .* got 'run'"):
        evidence_of(tmp_path, gpu_x={"command": "run"})


@pytest.mark.parametrize(
    ("source", "group"),
    [
        ("norm.cu", "norm"),
        ("norm_f16.cu", "norm"),
        ("normal.cu", None),
        ("selective_scan_chunk_f16.cu", "selective_scan"),
        ("gemm.cu", None),
    ],
)
def test_group_of_source(source, group):
    assert status.group_of_source(source, ["norm", "selective_scan", "selective"]) == group
