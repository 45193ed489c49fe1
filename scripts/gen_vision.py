"""Writes what is generated of docs/vision.md: its table, from bench/results, and docs/scan-routes.svg.

Usage: python -m scripts.gen_vision
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from bench import report, vision_models
from mambaquant_ext.routes import ScanRoute, TokenOrder

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "vision.md"
PICTURE = ROOT / "docs" / "scan-routes.svg"
RESULT = ROOT / "bench" / "results" / "vision-models.json"
SIDE, STEP, MARGIN, PANEL, HEIGHT = 4, 24, 22, 116, 128
ROUTES = {
    "row-major": ScanRoute(),
    "reversed": ScanRoute(reverse=True),
    "column-major": ScanRoute(TokenOrder("axes", (1, 0))),
    "snake": ScanRoute(TokenOrder("snake_rows")),
    "diagonal": ScanRoute(TokenOrder("diagonal")),
    "spiral": ScanRoute(TokenOrder("spiral")),
}
STYLE = """<style>
text { font: 13px sans-serif; text-anchor: middle; fill: #333 }
circle { fill: #bbb }
path { fill: none; stroke: #3b75af; stroke-width: 2 }
.jump { stroke-width: 1; stroke-dasharray: 2 3 }
.first { fill: #2a9d5c }
.last { fill: #c44e52 }
</style>"""


def panel(name: str, tokens: Sequence[int], left: int) -> list[str]:
    """One walk: steps to a neighbour as lines, jumps dashed, its first token green and its last one red."""
    places = [
        (left + MARGIN + STEP * (token % SIDE), MARGIN + STEP * (token // SIDE)) for token in tokens
    ]
    lines = []
    for (x, y), (to_x, to_y) in pairwise(places):
        is_step = max(abs(to_x - x), abs(to_y - y)) == STEP
        kind = "" if is_step else ' class="jump"'
        lines.append(f'<path{kind} d="M{x} {y}L{to_x} {to_y}"/>')
    ends = {0: ("first", 6), len(places) - 1: ("last", 6)}
    for step, (x, y) in enumerate(places):
        kind, radius = ends.get(step, ("token", 3))
        lines.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}"/>')
    return [*lines, f'<text x="{left + PANEL // 2}" y="{HEIGHT - 8}">{name}</text>']


def picture() -> str:
    """The text of docs/scan-routes.svg."""
    width = PANEL * len(ROUTES)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">',
        STYLE,
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
    ]
    for index, (name, route) in enumerate(ROUTES.items()):
        lines += panel(name, route.walk((SIDE, SIDE)).tolist(), PANEL * index)
    return "\n".join([*lines, "</svg>"]) + "\n"


def page(text: str) -> str:
    """The text of docs/vision.md with the table of the committed result."""
    return vision_models.insert(text, report.read_json(RESULT))


def main() -> int:
    """Writes both files."""
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
