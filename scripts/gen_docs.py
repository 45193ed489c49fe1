"""Writes docs/ops.md: each operator's schema with the docstring of its wrapper.

Usage: gen_docs.py [--check]; with --check it writes nothing and exits 1 where the file is not current.
"""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "csrc" / "torch" / "schema.cpp"
TARGET = ROOT / "docs" / "ops.md"
DEFINITION = re.compile(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)')
# The lower-case word that opens a comment before a group: "// gemm. a (M, K) int8 ...".
GROUP = re.compile(r"^  // ([a-z0-9_]+)\.", re.MULTILINE)
HEADER = """# Operators

Written by `make docs` from `csrc/torch/schema.cpp` and the docstrings of `mambaquant_ext.ops`; do not edit.

Every operator is `torch.ops.mambaquant.NAME`, and `mambaquant_ext.ops.NAME` with defaults and types.
"""


def schemas() -> dict[str, str]:
    """Name to schema, in the order of schema.cpp."""
    definitions = DEFINITION.findall(SCHEMA.read_text())
    joined = ["".join(re.findall(r'"([^"]*)"', text)) for text in definitions]
    return {schema.split("(")[0]: schema for schema in joined}


def groups() -> dict[str, str]:
    """Name to group (the stem of its files)."""
    text = SCHEMA.read_text()
    starts = [(match.start(), match.group(1)) for match in GROUP.finditer(text)]
    found = {}
    for match in DEFINITION.finditer(text):
        name = match.group(1).split('"')[1].split("(")[0]
        found[name] = [group for start, group in starts if start < match.start()][-1]
    return found


def wrapper(name: str) -> object:
    """The public Python function of an operator."""
    from mambaquant_ext import ops

    return getattr(ops, name)


def render() -> str:
    """The text of docs/ops.md."""
    parts = [HEADER]
    group = None
    stems = groups()
    for name, schema in schemas().items():
        if stems[name] != group:
            group = stems[name]
            parts.append(f"\n## {group}\n")
        parts.append(f"\n### {name}\n\n```\n{wrap(schema)}\n```\n\n")
        parts.append(f"```text\n{inspect.getdoc(wrapper(name))}\n```\n")
    return "".join(parts)


def wrap(schema: str, width: int = 100) -> str:
    """Breaks a schema after commas and before its arrow."""
    lines = [""]
    for piece in re.findall(r".+?(?:, |(?= ->)|$)", schema):
        if len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("    ")
        lines[-1] += piece.lstrip() if lines[-1].isspace() else piece
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Writes or checks the file."""
    text = render()
    if "--check" not in sys.argv[1:]:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text)
        return 0
    if TARGET.exists() and TARGET.read_text() == text:
        return 0
    print("docs/ops.md is not current: run make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
