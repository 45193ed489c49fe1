"""What an installation holds."""

import re
from importlib import metadata
from pathlib import Path

import pytest

import mambaquant_ext

ROOT = Path(__file__).parents[2]


def installed_files():
    try:
        files = metadata.files("mambaquant_ext")
    except metadata.PackageNotFoundError:
        files = None
    if not files:
        pytest.skip("runs from the source folder, not from an installation")
    return [Path(str(f)) for f in files if "__pycache__" not in str(f)]


def test_version_is_told_once():
    version = mambaquant_ext.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^version = "{re.escape(version)}"$', project, re.MULTILINE)
    assert f"VERSION {version} " in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


def test_installation_is_complete():
    names = {f.as_posix() for f in installed_files()}
    package = ROOT / "python" / "mambaquant_ext"
    sources = {f"mambaquant_ext/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    assert sources - names == set()
    assert "mambaquant_ext/py.typed" in names
    assert any(n.startswith("mambaquant_ext/_C.") and n.endswith(".so") for n in names)


def test_installation_holds_nothing_else():
    """No tests, benches, sources or stray top-level folders."""
    tops = {f.parts[0] for f in installed_files() if f.parts[0] != ".."}
    assert {t for t in tops if not t.startswith("mambaquant_ext")} == set()


def test_every_folder_of_tests_is_collected():
    """pytest passes over folders of some names, "build" among them, unless it is told not to."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    passed_over = re.search(r"^norecursedirs = \[([^\]]*)\]", project, re.MULTILINE)
    assert passed_over is not None
    assert "build" not in passed_over.group(1)


def test_public_names_exist():
    for name in mambaquant_ext.__all__:
        assert getattr(mambaquant_ext, name) is not None
