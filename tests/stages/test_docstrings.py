"""What the docstrings of the stages promise: arguments with shapes, errors with their kind."""

import ast
import re
from pathlib import Path

import pytest

import mambaquant_ext

PACKAGE = Path(mambaquant_ext.__file__).parent
FOLDERS = ("model", "calibrate", "transform", "pack", "evaluate")
STAGES = [
    *(PACKAGE / name for name in ("config.py", "images.py", "inspection.py")),
    *(path for name in FOLDERS for path in (PACKAGE / name).rglob("*.py")),
]  # fmt: skip
# Arguments that speak for themselves: their kind is in the annotation.
PLAIN = {"self", "cls", "changes", "dtype"}


def public_functions():
    for path in STAGES:
        for node in ast.parse(path.read_text("utf-8")).body:
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for member in members:
                if isinstance(member, ast.FunctionDef):
                    private = (owner + member.name).startswith("_") or member.name.startswith("_")
                    if not private:
                        where = f"{path.relative_to(PACKAGE)}:{owner}{member.name}"
                        yield pytest.param(member, id=where)


functions = pytest.mark.parametrize("function", tuple(public_functions()))


def raised(function):
    """Names of the errors that a function itself raises; not those that it is given."""
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc)
    names = {node.exc.func.id for node in nodes if isinstance(node.exc, ast.Call)}
    return {name for name in names if name.endswith("Error")}


@functions
def test_every_error_is_documented(function):
    docstring = ast.get_docstring(function)
    assert docstring
    section = re.search(r"Raises:\n(.*)", docstring, re.DOTALL)
    for error in raised(function):
        assert section, f"raises {error}"
        assert re.search(rf"\b{error}\b", section[1]), f"raises {error}"


@functions
def test_every_argument_that_is_documented_exists_and_the_other_way_round(function):
    docstring = ast.get_docstring(function)
    arguments = {argument.arg for argument in function.args.args + function.args.kwonlyargs}
    arguments = {name for name in arguments - PLAIN if not name.startswith("_")}
    section = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", docstring, re.DOTALL)
    if section is None:
        assert len(arguments) <= 1, f"no Args: for {sorted(arguments)}"
        return
    documented = set(re.findall(r"^    (\w+):", section[1], re.MULTILINE))
    assert documented - PLAIN == arguments


@functions
def test_a_tensor_argument_has_a_shape(function):
    docstring = ast.get_docstring(function)
    for argument in function.args.args:
        if argument.annotation is not None and ast.unparse(argument.annotation) == "Tensor":
            entry = re.search(
                rf"^    {argument.arg}: (.*(?:\n        .*)*)", docstring, re.MULTILINE
            )
            assert entry, f"{argument.arg} is not documented"
            assert "(" in entry[1], f"{argument.arg}: no shape in {entry[1]!r}"
