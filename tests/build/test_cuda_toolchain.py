"""scripts/cuda_toolchain.py finds a compiler in the order that it promises, or says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "cuda_toolchain.py"


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_toolkit(root, release="13.0", libraries="lib"):
    """A folder that looks like a toolkit, with an nvcc that answers the two questions it is asked."""
    write(root / "include" / "cuda_runtime_api.h")
    write(root / "include" / "cccl" / "cub" / "cub.cuh")
    for name in ("libcudart.so", "libcudart.so.13", "libcudart_static.a"):
        write(root / libraries / name)
    nvcc = write(
        root / "bin" / "nvcc",
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "release {release}, V{release}.88"; exit; fi\n'
        f"echo '#$ TOP={root}/bin/..' >&2\n"
        f"echo '#$ INCLUDES=\"-I{root}/bin/..//include\"  ' >&2\n"
        f'echo \'#$ LIBRARIES=  "-L{root}/bin/..//lib64/stubs" "-L{root}/bin/..//lib64"\' >&2\n',
    )
    nvcc.chmod(0o755)
    return root


def make_cutlass(root):
    write(root / "include" / "cutlass" / "cutlass.h")
    return root


def make_site(root, **toolkit):
    """The wheels of requirements/cuda.txt, unpacked."""
    make_toolkit(root / "nvidia" / "cu13", **toolkit)
    write(root / "cutlass_library" / "__init__.py", "raise RuntimeError('not to be imported')\n")
    make_cutlass(root / "cutlass_library" / "source")
    return root


def run(*arguments, site=None, path="/nowhere", **variables):
    """Runs the script with no packages but those of `site` (-S: nor those of this environment)."""
    command = [sys.executable, "-S", str(SCRIPT), *map(str, arguments)]
    environment = {"PATH": str(path), **{k: str(v) for k, v in variables.items()}}
    if site:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def found(*arguments, **keywords):
    result = run("--json", *arguments, **keywords)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def problem(*arguments, **keywords):
    result = run(*arguments, **keywords)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("mambaquant_ext: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def cutlass(tmp_path):
    return make_cutlass(tmp_path / "cutlass")


def test_wheels(tmp_path):
    """Their libraries are in lib, where their nvcc does not look."""
    site = make_site(tmp_path / "site")
    root = site / "nvidia" / "cu13"
    assert found(site=site) == {
        "nvcc": str(root / "bin" / "nvcc"),
        "version": "13.0",
        "include": str(root / "include"),
        "library": str(root / "lib"),
        "cudart": str(root / "lib" / "libcudart.so"),
        "link_flags": f"-L{root / 'lib'}",
        "cutlass": str(site / "cutlass_library" / "source" / "include"),
        "source": "wheels",
    }


def test_toolkits_come_before_wheels(tmp_path):
    site = make_site(tmp_path / "site")
    first, second, third = (make_toolkit(tmp_path / n, libraries="lib64") for n in "abc")
    on_path = {"site": site, "path": second / "bin"}
    assert found(**on_path)["nvcc"] == str(second / "bin" / "nvcc")
    assert found(**on_path)["link_flags"] == ""
    assert found(**on_path, CUDA_HOME=first)["nvcc"] == str(first / "bin" / "nvcc")
    named = found("--nvcc", third / "bin" / "nvcc", **on_path, CUDA_HOME=first)
    assert named["nvcc"] == str(third / "bin" / "nvcc")
    assert named["include"] == str(third / "include")


def test_nvcc_on_path_may_be_a_script(tmp_path, cutlass):
    """The toolkit is where nvcc says, not where the file on PATH lies."""
    toolkit = make_toolkit(tmp_path / "toolkit")
    script = write(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    result = found(path=tmp_path / "bin", MBQ_CUTLASS_DIR=cutlass)
    assert result["nvcc"] == str(script)
    assert result["include"] == str(toolkit / "include")


def test_nvcc_on_path_may_be_a_link(tmp_path, cutlass):
    """A real nvcc that is called through a link does not find its toolkit; the target is used then."""
    toolkit = make_toolkit(tmp_path / "toolkit")
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(
        nvcc.read_text().replace(
            "\nif", f'\nif [ "$0" != {nvcc} ] && [ "$1" != --version ]; then exit; fi\nif', 1
        )
    )
    link = tmp_path / "bin" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(nvcc)
    assert found(path=link.parent, MBQ_CUTLASS_DIR=cutlass)["nvcc"] == str(nvcc)


@pytest.mark.parametrize("below", ["", "include"])
def test_cutlass_is_named_by_its_folder_or_its_headers(tmp_path, cutlass, below):
    site = make_site(tmp_path / "site")
    assert found(site=site, MBQ_CUTLASS_DIR=cutlass / below)["cutlass"] == str(cutlass / "include")


def test_shell_output_survives_spaces(tmp_path):
    site = make_site(tmp_path / "a folder")
    result = run(site=site)
    script = f'{result.stdout}\nprintf %s "$MBQ_CUDA_INCLUDE"'
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown == str(site / "nvidia" / "cu13" / "include")


def test_nothing_there():
    assert "found no nvcc: pip install --no-deps -r requirements/cuda.txt" in problem()


def test_no_cutlass(tmp_path):
    toolkit = make_toolkit(tmp_path / "toolkit")
    assert "found no CUTLASS: pip install" in problem(path=toolkit / "bin")


@pytest.mark.parametrize("name", ["CUDA_HOME", "MBQ_CUTLASS_DIR"])
def test_a_wrong_variable_is_named(tmp_path, name):
    """Falling back to something else would hide the mistake."""
    site = make_site(tmp_path / "site")
    message = problem(site=site, **{name: tmp_path / "nowhere"})
    assert f"{name} is {tmp_path / 'nowhere'}" in message
    assert "correct or unset it" in message


def test_a_wrong_compiler_is_named(tmp_path):
    assert "there is no nvcc at" in problem(
        "--nvcc", tmp_path / "nvcc", site=make_site(tmp_path / "s")
    )


def test_too_old(tmp_path):
    toolkit = make_toolkit(tmp_path / "toolkit", release="12.6")
    message = problem(path=toolkit / "bin")
    assert "is of CUDA 12.6, expected 12.8 or newer" in message


@pytest.mark.parametrize("missing", ["include/cuda_runtime_api.h", "include/cccl/cub/cub.cuh"])
def test_half_a_toolkit(tmp_path, missing):
    site = make_site(tmp_path / "site")
    (site / "nvidia" / "cu13" / missing).unlink()
    assert f"comes without {'/'.join(missing.split('/')[-2:]).removeprefix('include/')}" in problem(
        site=site
    )


def test_no_runtime(tmp_path):
    site = make_site(tmp_path / "site")
    for library in (site / "nvidia" / "cu13" / "lib").iterdir():
        library.unlink()
    assert "comes without libcudart*" in problem(site=site)


def test_a_broken_compiler(tmp_path):
    broken = write(tmp_path / "bin" / "nvcc", "#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert "does not run" in problem(path=broken.parent)
    broken.write_text("#!/bin/sh\necho hello\n")
    assert "tells no version" in problem(path=broken.parent)
