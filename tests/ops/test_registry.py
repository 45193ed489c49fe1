"""Every operator of schema.cpp has its wrapper, fake, reference, tests, bench entry and documentation."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from scripts import gen_docs

from mambaquant_ext import ops

ROOT = Path(__file__).parents[2]
SCHEMAS = gen_docs.schemas()
STEMS = gen_docs.groups()

# Packing moves bytes: what it must do is said by the products of the packed weight, which have references.
WITHOUT_REFERENCE = {"pack_gemm_weight"}
# Packing happens once, at load; the plain int32 sum is what the two fused products are made of, for tests.
WITHOUT_BENCH = {"pack_gemm_weight", "gemm"}

every_op = pytest.mark.parametrize("name", SCHEMAS)


def source(*parts):
    path = ROOT.joinpath(*parts)
    assert path.is_file(), f"no {path.relative_to(ROOT)}"
    return path.read_text()


def test_the_schema_is_what_torch_has_registered():
    registered = {
        schema.name.removeprefix("mambaquant::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mambaquant::")
    }
    assert registered == set(SCHEMAS)


@every_op
def test_wrapper(name):
    function = getattr(ops, name)
    assert function.__module__ == f"mambaquant_ext.ops.{STEMS[name]}"
    assert name in ops.__all__
    arguments = [a.name for a in getattr(torch.ops.mambaquant, name).default._schema.arguments]
    assert set(inspect.signature(function).parameters) == set(arguments)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in inspect.getdoc(function), section


@every_op
def test_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mambaquant::{name}", "CPU")


@every_op
def test_cuda_launcher(name):
    """The binding hands both backends' launchers the same params."""
    text = source("csrc", "torch", f"{STEMS[name]}.cpp")
    cpu = set(re.findall(r"\bcpu::(\w+)\(p, threads\)", text))
    cuda = set(re.findall(r"\bcuda::(\w+)\(p, stream\)", text))
    assert cpu == cuda != set()
    kernels = source("csrc", "cuda", f"{STEMS[name]}.cu")
    for launcher in cuda:
        assert re.search(rf"^Status {launcher}\(const ", kernels, re.MULTILINE), launcher


@every_op
def test_fake(name):
    assert f'register_fake("mambaquant::{name}")' in source(
        "python", "mambaquant_ext", "ops", f"{STEMS[name]}.py"
    )


@every_op
def test_reference(name):
    if name in WITHOUT_REFERENCE:
        return
    text = source("tests", "reference", f"{STEMS[name]}.py")
    # An update is one step of its sequence, and a group may define its operators as one: norm_quantize
    # stands for rmsnorm_quantize and layernorm_quantize.
    definitions = re.findall(r"^def (\w+)\(", text, re.MULTILINE)
    assert any(name.replace("_update", "").endswith(definition) for definition in definitions)


@every_op
def test_tests(name):
    text = source("tests", "ops", f"test_{STEMS[name]}.py")
    assert re.search(rf"\bops\.{name}\b", text), f"no test calls ops.{name}"
    assert "opcheck(" in text
    calls = re.findall(r"opcheck\(\s*([\w.]+)", text)
    assert any(call.endswith(f".{name}") for call in calls), f"no opcheck of {name}"


@every_op
def test_cpp_test(name):
    assert f"mbq_add_cpp_test({STEMS[name]})" in source("tests", "cpp", "CMakeLists.txt")
    source("tests", "cpp", f"test_{STEMS[name]}.cc")


@every_op
def test_bench(name):
    if name in WITHOUT_BENCH:
        return
    assert f'"{name}"' in source("bench", "ops", f"{STEMS[name]}.py")
    assert re.search(rf"\b{STEMS[name]}\b", source("bench", "ops", "__init__.py"))


def test_docs_are_current():
    assert source("docs", "ops.md") == gen_docs.render(), "run make docs"
