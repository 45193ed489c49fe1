"""What the docstrings of the stages promise: arguments with shapes, errors with their kind."""

import ast
import re
from pathlib import Path

import pytest

import mambaquant_ext

PACKAGE = Path(mambaquant_ext.__file__).parent
FOLDERS = ("model", "calibrate", "transform", "pack", "evaluate", "generation")
STAGES = [
    *(PACKAGE / name for name in ("config.py", "images.py", "inspection.py")),
    *(path for name in FOLDERS for path in (PACKAGE / name).rglob("*.py")),
]  # fmt: skip
# Arguments that speak for themselves: their kind is in the annotation.
PLAIN = {"self", "cls", "changes", "dtype"}


def classes():
    """Name to definition of every class of the stages."""
    trees = (ast.parse(path.read_text("utf-8")) for path in STAGES)
    return {
        node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    }


CLASSES = classes()


def promise_of(owner, function):
    """The docstring of the method that this one takes the place of, if it does: its promises hold here too.

    A class names those above it as bases, or in a docstring that says "See Contract." for a protocol.
    """
    named = re.match(r"See (\w+)\.", ast.get_docstring(function) or "")
    above = [base.id for base in owner.bases if isinstance(base, ast.Name)]
    for name in [*above, *([named[1]] if named else [])]:
        if name in CLASSES:
            for member in CLASSES[name].body:
                if (
                    isinstance(member, ast.FunctionDef)
                    and member.name == function.name != "__init__"
                ):
                    return promise_of(CLASSES[name], member) or ast.get_docstring(member)
            inherited = promise_of(CLASSES[name], function) if CLASSES[name].bases else None
            if inherited:
                return inherited
    assert named is None, f"{owner.name}.{function.name}: {named[0]!r} names no method"
    return None


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
                        promise = promise_of(node, member) if owner else None
                        yield pytest.param(member, promise, id=where)


ALL = tuple(public_functions())
functions = pytest.mark.parametrize(("function", "promise"), ALL)
# What stands in the place of another function is given its arguments, and need not describe them again.
describing_functions = pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, id=param.id)
        for param in ALL
        for function, promise in [param.values]
        if promise is None or "Args:" in ast.get_docstring(function)
    ],
)


def raised(function):
    """Names of the errors that a function itself raises; not those that it is given."""
    nodes = (node for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc)
    names = {node.exc.func.id for node in nodes if isinstance(node.exc, ast.Call)}
    return {name for name in names if name.endswith("Error")}


@functions
def test_every_error_is_documented(function, promise):
    docstring = ast.get_docstring(function)
    assert docstring
    sections = re.findall(r"Raises:\n(.*)", f"{docstring}\n{promise or ''}", re.DOTALL)
    for error in raised(function):
        assert any(re.search(rf"\b{error}\b", section) for section in sections), f"raises {error}"


@describing_functions
def test_every_argument_that_is_documented_exists_and_the_other_way_round(function):
    docstring = ast.get_docstring(function)
    stars = [star for star in (function.args.vararg, function.args.kwarg) if star is not None]
    every = function.args.args + function.args.kwonlyargs + stars
    arguments = {argument.arg for argument in every}
    arguments = {name for name in arguments - PLAIN if not name.startswith("_")}
    section = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", docstring, re.DOTALL)
    if section is None:
        assert len(arguments) <= 1, f"no Args: for {sorted(arguments)}"
        return
    documented = set(re.findall(r"^    (\w+):", section[1], re.MULTILINE))
    assert documented - PLAIN == arguments


@describing_functions
def test_a_tensor_argument_has_a_shape(function):
    docstring = ast.get_docstring(function)
    for argument in function.args.args:
        if argument.annotation is not None and ast.unparse(argument.annotation) == "Tensor":
            entry = re.search(
                rf"^    {argument.arg}: (.*(?:\n        .*)*)", docstring, re.MULTILINE
            )
            assert entry, f"{argument.arg} is not documented"
            assert "(" in entry[1], f"{argument.arg}: no shape in {entry[1]!r}"
