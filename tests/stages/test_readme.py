"""The README's examples run as they stand, on less calibration data."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_examples_run(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example, generation = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for wanted, smaller in [
        ("64 * 512", "4 * 512"),
        ("ids.view(16, 4, 512)", "ids.view(2, 4, 256)"),
        ("max_new_tokens=40", "max_new_tokens=3"),
        ('"docs-int8"', repr(str(tmp_path / "docs-int8"))),
    ]:
        assert wanted in example
        example = example.replace(wanted, smaller)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "docs-int8" / "model.safetensors").is_file()
    capsys.readouterr()
    exec(compile(generation, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith(names["result"].sequences[0].text)
    assert "tokens a second" in out
