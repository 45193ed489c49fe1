"""The picture of `mambaquant inspect`."""

from __future__ import annotations

from pathlib import Path

from mambaquant_ext.inspection import SiteStatistics

TITLES = {
    "in": "in_proj input",
    "out": "out_proj input",
    "dt": "dt_proj input",
    "h": "state at the read-out",
    "C": "C",
}


def plot_transforms(rows: list[SiteStatistics], path: Path) -> None:
    """One column a tensor, one line a branch of a layer: variance spread above, max / rms below, step by step.

    Lines of a layer have one color; those of the branches behind its first are dashed.

    Args:
        rows: from inspect_transforms.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mambaquant_ext[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(TITLES), figsize=(3.2 * len(TITLES), 6), squeeze=False)
    for column, (site, title) in enumerate(TITLES.items()):
        axes[0][column].set_title(title)
        for line, field in enumerate(("variance_spread", "max_over_rms")):
            axis = axes[line][column]
            for layer, branch in _curves(rows, site):
                own = [row for row in rows if (row.layer, row.site) == (layer, site + branch)]
                is_first = branch in ("", ".0")
                axis.plot(
                    [row.step for row in own],
                    [getattr(row, field) for row in own],
                    marker="o",
                    color=f"C{layer}",
                    linestyle="solid" if is_first else "dashed",
                    label=f"layer {layer}" if is_first else None,
                )
            axis.set_yscale("log")
            axis.grid(True, which="both", alpha=0.25)
            if column == 0:
                axis.set_ylabel("channel variance, max / median" if line == 0 else "max / rms")
    has_branches = any("." in row.site for row in rows)
    axes[0][-1].legend(fontsize="small", title="dashed: further branches" if has_branches else None)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curves(rows: list[SiteStatistics], site: str) -> list[tuple[int, str]]:
    """Layers that have the tensor, each with ".0", ".1" ... for its branches, "" where it is one for all."""
    own = {
        (row.layer, row.site.removeprefix(site)) for row in rows if row.site.split(".")[0] == site
    }
    return sorted(own)
