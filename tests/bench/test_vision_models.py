"""The table of vision families: whole rows, failures that are seen, and a page that says what was measured."""

import copy
import importlib
import re

import pytest
import torch
import typer
from bench.vision_models import Family, cells_of, families, measure
from scripts import gen_vision
from torch import nn

from bench import report, small_models, vision_models
from mambaquant_ext import routes
from mambaquant_ext.model.adapters import adapter_names, registry
from mambaquant_ext.model.vision.mamba_mixer import MambaMixer
from tolerances import MODEL_SQNR_DB, RELATIVE_ERROR, sqnr_db

BROKEN = Family("broken", lambda: nn.Linear(3, 3), "Linear", (3,))


def family(name):
    return next(family for family in families() if family.name == name)


def assert_whole(row):
    """Every cell has a value, and one that a right family has."""
    assert row["failed"] == {}
    assert set(row) == {"family", "failed", *vision_models.CELLS}
    assert row["function_error"] < RELATIVE_ERROR[torch.float64]
    assert row["blocks"]["swapped"] == row["blocks"]["found"] > 0
    noise = row["integer_emulated_db"]
    assert noise is None or noise >= MODEL_SQNR_DB["emulated, twice"]
    same = row["equal_argmax"]
    assert 0.99 * same["of"] < same["equal"] <= same["of"]
    assert len(cells_of(row)) == len(vision_models.HEADER)


def test_a_row_has_all_cells():
    row = measure(family("Vim v2"))
    assert_whole(row)
    assert (row["routes"], row["head"], row["first_rotation"]) == ([2], "head", "stream")
    assert row["blocks"] == {"swapped": 3, "found": 3}
    assert row["equal_argmax"]["of"] == vision_models.UNSEEN
    # The paper's 7, 26 and 98 million.
    found = [round(row["configurations"][size] / 1e6) for size in "TSB"]
    assert found == [7, 26, 98]


def test_the_model_of_the_adapters_page_has_a_row(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    monkeypatch.setattr(routes, "_ORDERS", dict(routes._ORDERS))
    row = measure(families()[-1])
    assert_whole(row)
    assert (row["routes"], row["first_rotation"]) == ([2], "block")


def test_a_block_that_stays_float_is_counted():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = family("Vim v2").make()
            self.never = nn.ModuleList([type("VimBlock", (nn.Identity,), {})()])

        def forward(self, x):
            return self.first(x)

    subject = vision_models.Subject(Family("half", Half, "VimBlock", (2, 16, 16)))
    subject.integer = (nn.Module(), None)
    assert vision_models.blocks(subject) == {"swapped": 0, "found": 4}


def test_a_cell_that_fails_says_why():
    row = measure(BROKEN)
    assert row["configurations"] == {}
    assert set(row["failed"]) == set(vision_models.CELLS) - {"configurations"}
    assert row["failed"]["routes"].startswith("TypeError: expected a model of a known family")
    text = vision_models.table({"rows": [row]})
    assert text.count("failed: TypeError") == len(row["failed"])


def test_one_failing_cell_leaves_the_others(monkeypatch):
    def fails(_subject):
        raise RuntimeError("no head today")

    monkeypatch.setitem(vision_models.CELLS, "head", fails)
    row = measure(family("Vim v1"))
    assert row["failed"] == {"head": "RuntimeError: no head today"}
    assert row["routes"] == [2]


def test_the_command_writes_the_table_and_fails_with_a_cell(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vision_models, "families", lambda: [BROKEN])
    figures, page = tmp_path / "x.json", tmp_path / "x.md"
    page.write_text(f"a\n{vision_models.BEGIN}\nold\n{vision_models.END}\nb\n")
    with pytest.raises(typer.Exit) as status:
        vision_models.main(figures, page)
    assert status.value.exit_code == 1
    assert (
        "broken: routes: TypeError: expected a model of a known family" in capsys.readouterr().err
    )
    values = report.read_json(figures)
    assert [row["family"] for row in values["rows"]] == ["broken"]
    expected = (
        f"a\n{vision_models.BEGIN}\n\n{vision_models.table(values)}\n\n{vision_models.END}\nb\n"
    )
    assert page.read_text() == expected


@pytest.mark.parametrize(
    "page",
    [
        "nothing",
        f"{vision_models.END}\n{vision_models.BEGIN}\n",
        f"{vision_models.BEGIN}\n" * 2 + vision_models.END,
    ],
)
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(ValueError, match="expected a page with one"):
        vision_models.insert(page, {"rows": []})


# The committed result and its page


def test_a_low_figure_of_the_encoder_is_the_float_nets(generator):
    """What docs/vision.md says of U-Mamba's encoder."""
    subject = vision_models.Subject(family("U-Mamba, encoder"))
    model, integer = subject.model, subject.integer[0]
    names = [name for name, module in model.named_modules() if type(module) is MambaMixer]
    calls, noisy = {}, copy.deepcopy(model)

    def add_noise(_module, _args, out):
        return out + 0.01 * out.square().mean().sqrt() * torch.randn(out.shape, generator=generator)

    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _module, args, out, name=name: calls.__setitem__(name, (args[0], out))
        )
        noisy.get_submodule(name).register_forward_hook(add_noise)
    (unseen,) = small_models.random_batches((32, 2, 8, 8, 8), 1, seed=5)
    (expected,), (actual,) = (small_models.outputs(m, unseen) for m in (model, noisy))
    assert sqnr_db(actual, expected) < 25
    assert len(calls) == 3
    for name, (tokens, out) in calls.items():
        assert sqnr_db(integer.get_submodule(name)(tokens), out) > 30


def page():
    return gen_vision.PAGE.read_text(encoding="utf-8")


def test_the_committed_result_has_every_family():
    rows = report.read_json(gen_vision.RESULT)["rows"]
    assert [row["family"] for row in rows] == [family.name for family in families()]
    for row in rows:
        assert_whole(row)


def test_the_page_is_current():
    assert page() == gen_vision.page(page()), "run make docs"
    picture = gen_vision.PICTURE.read_text(encoding="utf-8")
    assert picture == gen_vision.picture(), "run make docs"


@pytest.mark.parametrize(
    ("name", "jumps"),
    [
        ("row-major", 3),
        ("reversed", 3),
        ("column-major", 3),
        ("snake", 0),
        ("diagonal", 0),
        ("spiral", 0),
    ],
)
def test_the_picture_shows_the_walks(name, jumps):
    tokens = gen_vision.ROUTES[name].walk((4, 4)).tolist()
    lines = gen_vision.panel(name, tokens, 0)
    paths = [line for line in lines if line.startswith("<path")]
    assert (len(paths), sum("jump" in line for line in paths)) == (15, jumps)
    (first,) = [line for line in lines if 'class="first"' in line]
    assert first.startswith(f'<circle class="first" cx="{94 if name == "reversed" else 22}"')


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", page(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "vision.md", "exec"), {})
    assert (tmp_path / "vmamba-int8" / "config.json").is_file()


def test_the_page_names_every_family_and_what_it_names_is_there():
    rows = re.findall(r"^\| (`[a-z_-]+`.*?) \| (`.*?) \| (.*?) \| (.*?) ?\|$", page(), re.MULTILINE)
    assert {name for row in rows for name in re.findall("`(.*?)`", row[0])} == set(
        adapter_names()
    ) - {"mixers"}
    for row in rows:
        for path in re.findall("`(.*?)`", " ".join(row[1:])):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(f"mambaquant_ext.model.vision.{module}"), name)
