"""README's tables are those of the committed results."""

import pytest
from scripts import gen_readme

from bench import report


def test_the_tables_are_current():
    text = gen_readme.PAGE.read_text(encoding="utf-8")
    assert text == gen_readme.page(text), "run make docs"


@pytest.mark.parametrize("page", ["", "b a", "a a b", "a b b", "a"])
def test_a_page_needs_one_marker_each(page):
    with pytest.raises(ValueError, match="expected a page with one a and one b"):
        report.insert(page, "a", "b", "text")


def test_what_an_engine_was_spared_is_left_out():
    shares = {
        kind: {"kind": kind, "figure": f"mamba-130m, 2 threads, batch 1{tokens}", "share": share}
        for kind, tokens, share in (("prefill", ", 512 tokens", 1.5), ("decode", "", 0.5))
    }
    row = {"size": "mamba-130m", "threads": 2, "peer_name": "p", "ours": 3.0}
    result = {
        "machine": {"cpu": "c", "isa": "i", "threads": 2},
        "shares": [*shares.values(), {**shares["decode"], "figure": "another"}],
        "rows": [
            {**row, "op": op, "batch": batch, "tokens": tokens, "peer": 1500.0, "ratio": 2.5}
            for op, batch, tokens in list(gen_readme.COLUMNS)[:1]
        ]
        + [
            {**row, "op": op, "batch": batch, "tokens": tokens, "peer": 1.0, "ratio": 3.0}
            | {"peer_name": "q"}
            for op, batch, tokens in gen_readme.COLUMNS
        ]
        + [{**row, "size": None}],
    }
    table = gen_readme.cpu_table(result)
    assert "| p | 1,500 (2.5x) | left out | left out |" in table
    assert "On c, i, 2 threads." in table
    assert "the prompt 1.50, decoding 0.50" in table
