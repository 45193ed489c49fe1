"""The README's example runs as it stands, on less calibration data."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for wanted, smaller in [
        ("64 * 512", "4 * 512"),
        ("ids.view(16, 4, 512)", "ids.view(2, 4, 256)"),
        ("max_new_tokens=40", "max_new_tokens=3"),
        ('"docs-int8"', repr(str(tmp_path / "docs-int8"))),
    ]:
        assert wanted in example
        example = example.replace(wanted, smaller)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "docs-int8" / "model.safetensors").is_file()
