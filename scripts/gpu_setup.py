"""What scripts/gpu_run.py stands on: finds the GPU, torch and the toolkit, installs what is missing, builds.

Python's standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "gpu"
REQUIREMENTS = (ROOT / "requirements" / "constraints.txt", ROOT / "requirements" / "cuda.txt")

# Module to distribution: what the build, the tests and the bench import, with what that imports in turn. torch and
# its own requirements are whoever installed torch's.
MODULES = {
    "annotated_doc": "annotated-doc",
    "click": "click",
    "execnet": "execnet",
    "hypothesis": "hypothesis",
    "iniconfig": "iniconfig",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "numpy": "numpy",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "pybind11": "pybind11",
    "pygments": "Pygments",
    "pytest": "pytest",
    "rich": "rich",
    "safetensors": "safetensors",
    "shellingham": "shellingham",
    "sortedcontainers": "sortedcontainers",
    "tqdm": "tqdm",
    "typer": "typer",
    "typing_extensions": "typing_extensions",
    "xdist": "pytest-xdist",
}
MODULES_BEFORE_3_11 = {"exceptiongroup": "exceptiongroup", "tomli": "tomli"}
CUTLASS = {"cutlass_library": "nvidia-cutlass"}
NVCC_PACKAGES = (
    "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl",
)  # fmt: skip
NVCC_PACKAGES_CUDA = "13"  # of requirements/cuda.txt
PROGRAMS = ("cmake", "ninja")  # each also a distribution of that name
OLDEST = {"cmake": (3, 28), "ninja": (1, 10)}  # CMake 3.25 knows no C++20 of nvcc

# Seconds that a step may take before it is stopped with all that it started.
LIMITS = {
    "install": 300, "configure": 120, "build": 1200, "test": 600, "sanitizer": 240, "bench": 420,
}  # fmt: skip
PROBE = """
import json, sys
import torch
has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "name": torch.cuda.get_device_name(0) if has_gpu else None,
    "capability": list(torch.cuda.get_device_capability(0)) if has_gpu else None,
}))
"""


class GpuRunError(Exception):
    """One line that says what is missing and how to get it."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        name: of the step.
        code: exit status; None where it ran out of time.
        seconds: that it took.
        log: file with its output.
    """

    name: str
    code: int | None
    seconds: float
    log: Path

    @property
    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def word(self) -> str:
        """passed, failed or timed out."""
        if self.code is None:
            return "timed out"
        return "passed" if self.code == 0 else "failed"

    def check(self, hint: str = "") -> None:
        """Raises GpuRunError with the end of the log unless the step passed."""
        if self.code != 0:
            end = "\n".join(f"  {line}" for line in self.text.splitlines()[-12:])
            advice = f"; {hint}" if hint else ""
            raise GpuRunError(f"{self.name} {self.word}, see {self.log}{advice}\n{end}")


def run_step(
    name: str,
    command: Sequence[str],
    limit_s: float,
    environment: Mapping[str, str],
    out: Path = OUT,
) -> Outcome:
    """Runs a command with its output in a log, and stops it and its children at the limit."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name}.log"
    print(f"{name}: at most {limit_s:.0f} s ...", flush=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment}, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            code = None
    outcome = Outcome(name, code, round(time.monotonic() - start, 1), log)
    print(f"{name}: {outcome.word}, {outcome.seconds:.0f} s", flush=True)
    return outcome


# --- What is here ---------------------------------------------------------------------------------


def architecture_of(capability: Sequence[int]) -> str:
    """A compute capability as CMake's CUDA_ARCHITECTURES: machine code for this GPU alone.

    Raises:
        GpuRunError: older than 8.0.
    """
    major, minor = capability
    if (major, minor) < (8, 0):
        raise GpuRunError(f"expected a GPU of compute capability 8.0 or later, got {major}.{minor}")
    suffix = "a" if (major, minor) == (9, 0) else ""  # wgmma and TMA need the a
    return f"{major}{minor}{suffix}-real"


def probe_torch(python: str = sys.executable) -> dict[str, Any]:
    """The torch and the GPU that `python` sees.

    Raises:
        GpuRunError: no torch, one without CUDA, or no GPU.
    """
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise GpuRunError(
            f"cannot import torch in {python} ({reason}): install a CUDA build of torch, or name the Python that has "
            "one with PYTHON=..."
        )
    return check_torch(json.loads(done.stdout.splitlines()[-1]))


def check_torch(found: dict[str, Any]) -> dict[str, Any]:
    """What probe_torch found, if the extension can be built and run with it.

    Raises:
        GpuRunError: it cannot.
    """
    version = tuple(int(part) for part in found["torch"].split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise GpuRunError(f"expected torch 2.10 or newer, got {found['torch']}")
    if found["cuda"] is None:
        raise GpuRunError(f"torch {found['torch']} was built without CUDA: install a CUDA build")
    if found["capability"] is None:
        raise GpuRunError(
            f"torch {found['torch']} sees no GPU: check that nvidia-smi lists one, that its driver serves CUDA "
            f"{found['cuda']}, and CUDA_VISIBLE_DEVICES"
        )
    return found


def with_cuda_home(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with the usual place of a toolkit where neither PATH nor CUDA_HOME leads to nvcc."""
    usual = Path("/usr/local/cuda")
    if environment.get("CUDA_HOME") or shutil.which("nvcc", path=environment.get("PATH")):
        return {**environment}
    has_usual = os.access(usual / "bin" / "nvcc", os.X_OK)
    return {**environment, **({"CUDA_HOME": str(usual)} if has_usual else {})}


def find_toolchain(python: str, environment: Mapping[str, str], torch_cuda: str) -> dict[str, str]:
    """What scripts/cuda_toolchain.py finds, seen from a Python whose packages may hold it.

    Raises:
        GpuRunError: something is missing, or another major version than torch's, whose runtime
            the kernels share.
    """
    command = [python, str(ROOT / "scripts" / "cuda_toolchain.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment})
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["cuda_toolchain.py failed"])[-1]
        raise GpuRunError(reason.removeprefix("mambaquant_ext: "))
    found: dict[str, str] = json.loads(done.stdout)
    major = torch_cuda.partition(".")[0]
    if found["version"].partition(".")[0] != major:
        raise GpuRunError(
            f"{found['nvcc']} is of CUDA {found['version']}, torch of CUDA {torch_cuda}: set CUDA_HOME to a toolkit "
            f"of CUDA {major}"
        )
    return found


# --- Packages -------------------------------------------------------------------------------------

REQUIREMENT = re.compile(
    r"^([A-Za-z0-9._-]+)==([^\s;]+)\s*(?:;\s*python_version\s*(<|>=)\s*\"(\d+\.\d+)\")?\s*$"
)


def normal(name: str) -> str:
    """A distribution's name in the one spelling that pip compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(python_version: str, files: Iterable[Path] = REQUIREMENTS) -> dict[str, str]:
    """Distribution to version, for one Python, from the requirements files that exist."""

    def order(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split("."))

    versions = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            match = REQUIREMENT.match(line.split(" #")[0].strip())
            if match is None:
                continue
            name, version, comparison, limit = match.groups()
            is_newer = comparison is not None and order(python_version) >= order(limit)
            if comparison is None or is_newer == (comparison == ">="):
                versions[normal(name)] = version
    return versions


def needed(python_version: str) -> dict[str, str]:
    """Module to distribution for one Python."""
    is_old = tuple(map(int, python_version.split("."))) < (3, 11)
    return {**MODULES, **CUTLASS, **(MODULES_BEFORE_3_11 if is_old else {})}


def missing(python: str, modules: Iterable[str]) -> list[str]:
    """Those of the modules that `python` does not find."""
    code = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    done = subprocess.run(
        [python, "-c", code, *modules], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def is_new_enough(program: str, path: str) -> bool:
    """Whether PATH leads to the program, in OLDEST or a later version."""
    found = shutil.which(program, path=path)
    if found is None:
        return False
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"(\d+)\.(\d+)", done.stdout)
    return match is not None and (int(match[1]), int(match[2])) >= OLDEST[program]


def install_command(
    python: str, names: Iterable[str], versions: Mapping[str, str], wheels: Path | None
) -> list[str]:
    """pip's command for the distributions, from a folder or, at the pinned versions, from the network."""
    command = [python, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
    if wheels is not None:
        return [*command, "--no-index", "--find-links", str(wheels.resolve()), *names]
    return [*command, *(with_version(name, versions) for name in names)]


def with_version(name: str, versions: Mapping[str, str]) -> str:
    """name==version.

    Raises:
        GpuRunError: no requirements file pins it.
    """
    if normal(name) not in versions:
        files = " or ".join(str(f.relative_to(ROOT)) for f in REQUIREMENTS)
        raise GpuRunError(f"no version of {name} is pinned in {files}: add it")
    return f"{name}=={versions[normal(name)]}"


def forget_another_python(out: Path, torch_version: str) -> None:
    """Removes the venv and the build that another Python or torch left: both remember its paths."""
    mark, maker = out / "made-with.txt", f"{sys.executable}, torch {torch_version}\n"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != maker:
        for name in ("venv", "cmake"):
            shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(maker, encoding="utf-8")


def make_venv(folder: Path) -> str:
    """A venv that also sees the packages of the running Python, itself a venv or not; returns its Python.

    `--system-site-packages` leads to the base Python alone: a .pth file adds the folders of this one.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        command = [sys.executable, "-m", "venv", "--system-site-packages", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
            raise GpuRunError(
                f"cannot make a venv with {sys.executable}: install the module (Debian: apt install python3-venv)"
            )
    (site,) = folder.glob("lib/python3.*/site-packages")
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    seen = [path for path in dict.fromkeys(own) if path.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in seen]
    (site / "gpu_run_parent.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(python)


# --- Build ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """A built extension and what it was built for."""

    python: str
    environment: dict[str, str]
    machine: dict[str, Any]
    architecture: str
    seconds: float


def build_extension(wheels: Path | None, environment: Mapping[str, str], out: Path = OUT) -> Build:
    """Installs what is missing and builds the extension for the GPU that is here.

    Raises:
        GpuRunError: something is missing that cannot be installed, or a step fails.
    """
    found = probe_torch()
    architecture = architecture_of(found["capability"])
    if wheels is not None and not wheels.is_dir():
        raise GpuRunError(
            f"WHEELS={wheels}: no such folder; `make gpu-wheels WHEELS={wheels}` fills one"
        )
    forget_another_python(out, found["torch"])
    environment = with_cuda_home(environment)
    python, environment = install_packages(wheels, environment, found["cuda"], out)
    toolchain = find_toolchain(python, environment, found["cuda"])
    print(
        f"{found['name']}, torch {found['torch']}, nvcc of CUDA {toolchain['version']}: "
        f"building for {architecture}"
    )
    environment["CUDACXX"] = toolchain["nvcc"]
    start = time.monotonic()
    folder = out / "cmake"
    run_step(
        "configure",
        [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMBQ_CUDA=ON",
            f"-DMBQ_CUDA_ARCHITECTURES={architecture}", f"-DPython_EXECUTABLE={python}",
            f"-DMBQ_CUTLASS_DIR={toolchain['cutlass']}",
        ],
        LIMITS["configure"], environment, out,
    ).check()  # fmt: skip
    run_step("build", ["cmake", "--build", str(folder)], LIMITS["build"], environment, out).check()
    package = out / "python"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "mambaquant_ext", package / "mambaquant_ext")
    install = ["cmake", "--install", str(folder), "--prefix", str(package)]
    run_step("install", install, LIMITS["install"], environment, out).check()
    seconds = round(time.monotonic() - start, 1)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(package), *filter(None, [environment.get("PYTHONPATH")])]
    )
    described = run_step("machine", [python, "-m", "bench.gpu_machine"], 60, environment, out)
    described.check()
    machine = json.loads(described.text.splitlines()[-1])
    machine["toolkit"] = toolchain["version"]
    return Build(python, environment, machine, architecture, seconds)


def install_packages(
    wheels: Path | None, environment: Mapping[str, str], torch_cuda: str, out: Path
) -> tuple[str, dict[str, str]]:
    """The venv's Python, with what it lacked, and an environment whose PATH holds its programs."""
    python = make_venv(out / "venv")
    path = f"{Path(python).parent}{os.pathsep}{environment.get('PATH', '')}"
    tools = {**environment, "PATH": path}
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    modules = needed(python_version)
    if environment.get("MBQ_CUTLASS_DIR"):
        modules = {m: d for m, d in modules.items() if m not in CUTLASS}
    names = {modules[name] for name in missing(python, modules)}
    names |= {program for program in PROGRAMS if not is_new_enough(program, path)}
    has_nvcc = environment.get("CUDA_HOME") or shutil.which("nvcc", path=path)
    if not has_nvcc and torch_cuda.partition(".")[0] == NVCC_PACKAGES_CUDA:
        names.update(NVCC_PACKAGES)
    if names:
        command = install_command(python, sorted(names), pinned(python_version), wheels)
        hint = "`make gpu-wheels WHEELS=dir` where there is a network, then WHEELS=dir here"
        run_step("packages", command, LIMITS["install"], tools, out).check(hint)
    return python, tools
