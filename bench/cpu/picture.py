"""A result of bench.cpu as a picture: a roofline of the kernels, and bars of every engine. Needs matplotlib."""

from __future__ import annotations

from typing import Any

from bench import report
from bench.cpu.rows import TOKENS_PER_SECOND

OURS_COLOUR, PEER_COLOUR, ROOF_COLOUR = "#c44e52", "#3b75af", "#555555"
MARKERS = {"int8": "o", "float32": "^"}
DASHES = {"L2": ":", "L3": "--", "memory": "-", "int8": "-", "float32": "--"}
COMPARED = ("prefill", "decode")
ROOFLINE_INCHES, BAR_INCHES, FRAME_INCHES = 6.0, 0.34, 1.1


def models(values: dict[str, Any]) -> Any:
    """The kernels under their roofs, and tokens per second of every engine, a panel each figure."""
    from matplotlib import pyplot

    compared = [rates for op in COMPARED if (rates := compared_engines(values["rows"], op))]
    heights = [FRAME_INCHES + BAR_INCHES * len(rates) for _, rates in compared]
    heights = [ROOFLINE_INCHES] * bool(values["kernels"]) + heights
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 0.4), squeeze=False, height_ratios=heights
    )
    remaining = list(axes[:, 0])
    if values["kernels"]:
        _roofline(remaining.pop(0), values)
    for axis, (title, rates) in zip(remaining, compared, strict=True):
        _bars(axis, title, rates)
    return figure


def compared_engines(rows: list[report.Row], op: str) -> tuple[str, dict[str, float]] | None:
    """Tokens per second by engine, of the first model on the threads that it was first measured with.

    Args:
        rows: of bench.cpu.rows.
        op: "prefill" or "decode".

    Returns:
        The name of the figure that most engines have, of those the longest, of one sequence; and the rates.
    """
    of_models = [row for row in rows if row["unit"] == TOKENS_PER_SECOND]
    found: dict[str, dict[str, float]] = {}
    tokens = {}
    for row in of_models:
        if (row["op"], row["batch"]) == (op, 1) and all(
            row[key] == of_models[0][key] for key in ("size", "threads")
        ):
            rates = found.setdefault(row["figure"], {report.OURS: row["ours"]})
            tokens[row["figure"]] = row["tokens"]
            if row["peer_name"] is not None:
                rates[row["peer_name"]] = row["peer"]
    if not found:
        return None
    name = max(found, key=lambda n: (len(found[n]), tokens[n]))
    return name, found[name]


def _bars(axis: Any, title: str, rates: dict[str, float]) -> None:
    """One bar an engine, its rate beside it."""
    colours = [OURS_COLOUR if name.startswith(report.OURS) else PEER_COLOUR for name in rates]
    bars = axis.barh(list(rates), list(rates.values()), color=colours)
    axis.bar_label(bars, fmt=" {:,.0f}", fontsize=9)
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.set_xlabel("tokens/s")
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(True, axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _roofline(axis: Any, values: dict[str, Any]) -> None:
    """Operations per second over operations per byte, both axes logarithmic; a colour each operator."""
    from matplotlib.lines import Line2D

    rows, roofs = values["kernels"], values["roofs"]
    points = [row["operations"] / row["bytes_moved"] for row in rows]
    span = (min(points) / 2, max(points) * 2)
    for kind, rate in roofs["arithmetic"].items():
        axis.axhline(rate / 1e9, linewidth=1, color=ROOF_COLOUR, linestyle=DASHES[kind])
        axis.annotate(f"{kind} {rate / 1e9:,.0f} Gop/s", (span[0], rate / 1e9), (2, 3), fontsize=8,
                      textcoords="offset points")  # fmt: skip
    for place, rate in roofs["copy"].items():
        ends = (span[0], min(span[1], max(roofs["arithmetic"].values()) / rate))
        label = f"copy in {place}, {rate / 1e9:,.0f} GB/s"
        axis.plot(ends, [rate * x / 1e9 for x in ends], linewidth=1, color=ROOF_COLOUR,
                  linestyle=DASHES[place], label=label)  # fmt: skip
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [(x, row) for x, row in zip(points, rows, strict=True) if row["op"] == op]
        axis.scatter(
            [x for x, _ in chosen],
            [row["operations_per_second"] / 1e9 for _, row in chosen],
            marker=MARKERS[chosen[0][1]["arithmetic"]], s=26, alpha=0.75, label=op,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(span)
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("Gop/s")
    axis.set_title("Kernels under the roofs of the same run", fontsize=10, loc="left")
    axis.grid(True, which="major", alpha=0.25)
    handles, _ = axis.get_legend_handles_labels()
    kinds = [
        Line2D([], [], marker=marker, color="black", linestyle="", label=f"held against {kind}")
        for kind, marker in MARKERS.items()
    ]
    axis.legend(handles=[*handles, *kinds], fontsize=8, loc="lower right")
