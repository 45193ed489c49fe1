"""Builds the extension for the GPU that is here, and tests or times it: `make test-gpu`, `make bench-gpu`.

Runs, as `python -m scripts.gpu_run test`, with the Python that holds torch, a CUDA build of 2.10 or newer, and needs
g++. What else is missing (nvcc too, beside a torch of CUDA 13) is installed beside it: from the network, or from the
folder that WHEELS names (`make gpu-wheels` fills one). Everything is written below build/gpu:

  venv            that Python's packages, and those that it lacked
  python          the extension, for this GPU alone
  *.log           the output of each step
  test-gpu.json, bench-gpu.json, bench-gpu.md   the results; bench/results/gpu-*.json is where they are kept

Python's standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from scripts import gen_docs
from scripts.gpu_setup import (
    LIMITS,
    NVCC_PACKAGES,
    OUT,
    PROGRAMS,
    ROOT,
    Build,
    GpuRunError,
    Outcome,
    build_extension,
    missing,
    needed,
    pinned,
    run_step,
    with_version,
)

SCHEMA = 1
GLIBC = (28, 27, 24, 17, 12, 5)  # minor versions that wheels are made for, 2.28 (2018) the newest
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_FOUND = 99
# A sanitizer slows a kernel down tenfold to a hundredfold: odd sizes, offsets, a whole layer, and the updates.
SANITIZED = (
    "cuda and not cudasim and (updates_equal or (reference and (dim33 or offset or view or views or layer"
    " or size24 or size160 or chunk7 or m13 or n129 or k127)))"
)


def word_of(case: ElementTree.Element) -> str:
    """passed, failed or skipped."""
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def counts_of(junit: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Passed, failed and skipped, and the names of what failed, from pytest's JUnit file.

    The operators' tests count for their kernel group, the others for their folder.
    """
    groups: dict[str, Counter[str]] = {}
    failures = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        where = case.get("classname", "")
        match = re.search(r"(\w+)\.test_(\w+)", where)
        group = where or "unknown"
        if match:
            group = match[2] if match[1] == "ops" else match[1]
        word = word_of(case)
        groups.setdefault(group, Counter(passed=0, failed=0, skipped=0))[word] += 1
        if word == "failed":
            failures.append(f"{where}::{case.get('name')}")
    return {name: dict(groups[name]) for name in sorted(groups)}, failures


def run_tests(build: Build, workers: int, out: Path = OUT) -> dict[str, Any]:
    """The operators' tests on the GPU, tests/gpu, and whole blocks where transformers is there to make them."""
    folders = ["tests/ops", "tests/gpu"]
    if not missing(build.python, ["transformers"]):
        folders.append("tests/stages/test_cuda.py")
    junit = out / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [
        build.python, "-m", "pytest", "-q", "-rs", "-n", str(workers), "-m", "not slow", "-k", "cuda and not cudasim",
        f"--junitxml={junit}", *folders,
    ]  # fmt: skip
    environment = {**build.environment, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    outcome = run_step("tests", command, LIMITS["test"], environment, out)
    groups, failures = counts_of(junit) if junit.is_file() else ({}, [])
    untested = untested_groups(groups)
    # A test that needs no GPU passes anywhere, and a skipped one is no failure: neither is a pass of a kernel.
    word = "failed" if outcome.word == "passed" and untested else outcome.word
    return {
        "outcome": word,
        "seconds": outcome.seconds,
        "groups": groups,
        "untested_groups": untested,
        "failures": failures[:50],
    }


def untested_groups(groups: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The kernel groups, and tests/gpu, of which no test passed."""
    wanted = dict.fromkeys([*gen_docs.groups().values(), "gpu"])
    return [group for group in wanted if not groups.get(group, {}).get("passed")]


def sanitizer_command(program: str, tool: str, help_text: str) -> list[str]:
    """compute-sanitizer with one tool, on our kernels alone where it can select them and the tool allows it."""
    command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
    if tool == "initcheck":  # takes what other kernels wrote for unwritten, unless it watches them
        return command
    for option in ("--kernel-name", "--kernel-regex"):  # the newer and the older spelling
        if re.search(rf"{option}\b(?!-)", help_text):
            return [*command, option, "kns=mambaquant"]
    return command


def run_sanitizers(build: Build, tools: Sequence[str], out: Path = OUT) -> dict[str, Any]:
    """compute-sanitizer over a small part of the tests, one entry a tool; the tools side by side."""
    program = shutil.which("compute-sanitizer", path=build.environment["PATH"])
    if program is None:
        beside = Path(build.environment["CUDACXX"]).parent / "compute-sanitizer"
        program = str(beside) if beside.is_file() else None
    if program is None:
        print("compute-sanitizer: absent, skipped (it comes with the CUDA toolkit)")
        return {tool: {"outcome": "absent"} for tool in tools}
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    # Each tensor an allocation of its own, so that a step over its end is seen.
    environment = {**build.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [build.python, "-m", "pytest", "-q", "-p", "no:xdist", "-k", SANITIZED, "tests/ops"]

    def run(tool: str) -> dict[str, Any]:
        command = [*sanitizer_command(program, tool, done.stdout + done.stderr), *tests]
        return sanitizer_result(run_step(tool, command, LIMITS["sanitizer"], environment, out))

    with ThreadPoolExecutor(max(1, len(tools))) as pool:
        return dict(zip(tools, pool.map(run, tools), strict=True))


def sanitizer_result(outcome: Outcome) -> dict[str, Any]:
    """clean, errors, failed (the tests or the tool itself) or timed out; how many errors and tests."""
    summary = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", outcome.text)
    ran = re.search(r"(\d+) passed", outcome.text)
    tests = int(ran.group(1)) if ran else 0
    word = outcome.word
    if outcome.code == SANITIZER_FOUND or (summary and int(summary.group(1))):
        word = "errors"
    elif word == "passed":
        word = "clean" if tests and summary else "failed"
    return {
        "outcome": word,
        "errors": int(summary.group(1)) if summary else None,
        "tests": tests,
        "seconds": outcome.seconds,
    }


def test_record(
    build: Build, tests: Mapping[str, Any], sanitizer: Mapping[str, Any]
) -> dict[str, Any]:
    """What test-gpu.json holds."""
    return {
        "schema": SCHEMA,
        "command": "test-gpu",
        "machine": build.machine,
        "architectures": build.architecture,
        "build": {"seconds": build.seconds},
        "tests": dict(tests),
        "sanitizer": dict(sanitizer),
    }


def is_good(record: Mapping[str, Any]) -> bool:
    """No failed test and no finding of a sanitizer; an absent sanitizer is no failure."""
    outcomes = {result["outcome"] for result in record["sanitizer"].values()}
    return record["tests"]["outcome"] == "passed" and outcomes <= {"clean", "absent"}


def result_name(device: str, command: str) -> str:
    """Where a result is kept: bench/results/gpu-h100-80gb-hbm3-test.json."""
    short = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").removeprefix("nvidia-")
    return f"bench/results/gpu-{short}-{command.removesuffix('-gpu')}.json"


def write(record: Mapping[str, Any], path: Path) -> None:
    """A record as JSON."""
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def test(arguments: argparse.Namespace) -> int:
    """Builds, tests, writes test-gpu.json."""
    build = build_extension(arguments.wheels, os.environ)
    tests = run_tests(build, arguments.workers)
    for group, counts in tests["groups"].items():
        print(f"  {group}: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    if tests["untested_groups"]:
        print(f"  no test passed of {', '.join(tests['untested_groups'])}: see {OUT / 'tests.log'}")
    for name in tests["failures"]:
        print(f"  failed: {name}")
    path = OUT / "test-gpu.json"
    not_run = {tool: {"outcome": "not run"} for tool in arguments.sanitizers}
    write(test_record(build, tests, not_run), path)  # whoever stops the next steps keeps this
    sanitizer = run_sanitizers(build, arguments.sanitizers)
    record = test_record(build, tests, sanitizer)
    write(record, path)
    verdict = "passed" if is_good(record) else "failed"
    tools = ", ".join(f"{tool} {result['outcome']}" for tool, result in sanitizer.items())
    print(f"test-gpu {verdict}: tests {tests['outcome']}; {tools or 'no sanitizer'}")
    kept = result_name(record["machine"]["gpu"]["name"], record["command"])
    print(f"to keep it: cp {path.relative_to(ROOT)} {kept} && make gpu-status")
    return 0 if is_good(record) else 1


def bench(arguments: argparse.Namespace) -> int:
    """Builds, times, writes bench-gpu.json."""
    build = build_extension(arguments.wheels, os.environ)
    path = OUT / "bench-gpu.json"
    path.unlink(missing_ok=True)
    command = [build.python, "-m", "bench.gpu", "--json", str(path), *arguments.arguments]
    outcome = run_step("bench", command, LIMITS["bench"], build.environment)
    print(outcome.text)
    kept = result_name(build.machine["gpu"]["name"], "bench-gpu")
    if path.is_file():
        print(f"to keep it: cp {path.relative_to(ROOT)} {kept} && make gpu-status")
    return 0 if outcome.code == 0 else 1


def wheels(arguments: argparse.Namespace) -> int:
    """Downloads what another machine may lack, for its Python."""
    version = arguments.python_version
    names = {*needed(version).values(), *PROGRAMS, *(NVCC_PACKAGES if arguments.nvcc else ())}
    versions = pinned(version)
    wanted = [with_version(name, versions) for name in sorted(names)]
    print("\n".join(wanted))
    if arguments.list:
        return 0
    tag = version.replace(".", "")
    # pip takes a platform literally: one that runs newer wheels must be named with all that it also runs.
    platforms = [*(f"manylinux_2_{n}_x86_64" for n in GLIBC), "manylinux2014_x86_64"]
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
        "--implementation", "cp", "--python-version", version, "--abi", f"cp{tag}", "--abi", "abi3", "--abi", "none",
        *(f"--platform={platform}" for platform in platforms), "-d", str(arguments.folder), *wanted,
    ]  # fmt: skip
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run_step("wheels", command, LIMITS["install"], os.environ).check()
    count = len(list(arguments.folder.glob("*.whl")))
    print(f"{arguments.folder}: {count} wheels for Python {version}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="test|bench|wheels")

    def add(function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        return command

    command = add(test)
    command.add_argument("--wheels", type=Path, help="folder to install from, without the network")
    workers = min(8, os.cpu_count() or 1)
    command.add_argument("--workers", type=int, default=workers, help="test processes")
    command.add_argument(
        "--sanitizers", type=lambda text: [tool for tool in text.split(",") if tool],
        default=list(SANITIZERS), metavar="LIST",
        help="tools of compute-sanitizer, such as memcheck,racecheck,initcheck; '' for none",
    )  # fmt: skip
    command = add(bench)
    command.add_argument("--wheels", type=Path, help="folder to install from, without the network")
    command.add_argument("arguments", nargs="*", help="for bench.gpu, after --")
    command = add(wheels)
    command.add_argument("folder", type=Path)
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    command.add_argument("--python-version", default=this, help="of the other machine")
    command.add_argument("--nvcc", action="store_true", help="the CUDA compiler too")
    command.add_argument("--list", action="store_true", help="print the packages, download nothing")
    parsed = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d+", getattr(parsed, "python_version", this)):
        parser.error(f"--python-version: expected such as 3.12, got {parsed.python_version!r}")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    parsed = parse(arguments)
    try:
        return int(parsed.function(parsed))
    except GpuRunError as error:
        print(f"gpu_run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
