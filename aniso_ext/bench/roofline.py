"""The figure of a run: every variant under the measured ceilings, and its time as a multiple of the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.bench.records import read_table
from aniso_ext.bench.suite import CASES
from aniso_ext.errors import AnisoError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with any colour vision; the markers tell them apart without colour.
_STYLE = {
    "cuda": ("#0072B2", "o", "CUDA C++"),
    "triton": ("#D55E00", "s", "Triton"),
    "cpu": ("#0072B2", "o", "CPU kernels"),
    "reference": ("#999999", "P", "reference"),
    "compiled": ("#009E73", "^", "torch.compile, the kernels' algebra"),
    "compiled diagonal": ("#CC79A7", "v", "torch.compile, diagonal complement"),
    "eager": ("#000000", "x", "eager PyTorch"),
}
_DASHES = {"bf16": "-", "tf32": "--", "fp32": ":"}
_OTHER = ("#E69F00", "D", "other")

Row = Mapping[str, str]


def draw(table: Path, out: Path) -> None:
    """Read a CSV of `aniso bench kernels` and write a picture.

    Raises:
        DataError: the file has no measured kernels or no ceilings.
        AnisoError: matplotlib is not installed.
    """
    header, rows = read_table(table)
    measured = [row for row in rows if row.get("ns_per_row")]
    ceilings = {name.removeprefix("ceiling "): float(value) for name, value in header.items() if "ceiling" in name}
    if not measured or "copy GB/s" not in ceilings:
        raise DataError(f"{table} has no times or no ceilings: it must be a _kernels.csv of `aniso bench kernels`")
    try:
        import matplotlib
    except ImportError:
        raise AnisoError("figures need matplotlib: install the extra `plots`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in measured))
    figure, (roof, bars) = pyplot.subplots(
        1, 2, figsize=(12.5, 2.2 + 0.32 * max(8, len(cases))), width_ratios=(1.15, 1), layout="constrained"
    )
    _draw_roof(roof, measured, cases, ceilings)
    _draw_multiples(bars, measured, cases)
    used = [name for name in _STYLE if any(row["variant"] == name for row in measured)]
    handles = [_legend_handle(name) for name in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    facts = ", ".join(
        f"{name} {header[name]}" if name in ("torch", "commit") else header[name]
        for name in ("device", "torch", "commit", "date")
        if name in header
    )
    figure.suptitle(f"{facts}; {int(measured[0]['rows']):,} rows", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    pyplot.close(figure)


def _draw_roof(axes: Axes, rows: Sequence[Row], cases: Sequence[str], ceilings: Mapping[str, float]) -> None:
    """Operations a second over operations for each byte; cases are numbered as on the right."""
    copy = ceilings["copy GB/s"]
    intensities = [float(row["flop_per_row"]) / float(row["bytes_per_row"]) for row in rows]
    left, right = min(intensities) / 2, max(*intensities, *(v * 1e3 / copy for v in _products(ceilings).values())) * 1.6
    for format, tflops in _products(ceilings).items():
        ridge = tflops * 1e3 / copy
        axes.plot([left, ridge, right], [left * copy / 1e3, tflops, tflops], color="0.35", ls=_DASHES[format], lw=1.4)
        axes.annotate(
            f"{format} product {tflops:,.3g} TFLOP/s", (right, tflops), ha="right", va="bottom", fontsize=8,
            color="0.25", xytext=(-2, 2), textcoords="offset points",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="operations for each byte", ylabel="TFLOP/s")
    columns: dict[float, list[str]] = {}
    for row, intensity in zip(rows, intensities, strict=True):
        _point(axes, intensity, float(row["tflop_per_s"]), row["variant"])
        names = columns.setdefault(round(intensity, 3), [])
        name = str(cases.index(row["case"]) + 1)
        if name not in names:
            names.append(name)
    low, high = min(float(row["tflop_per_s"]) for row in rows) / 2.6, max(_products(ceilings).values()) * 1.8
    axes.set_ylim(low, high)
    _number_columns(axes, columns, low)
    ticks = [tick for tick in (10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000) if left <= tick <= right]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    middle = (left * max(left, low * 1e3 / copy * 2)) ** 0.5
    axes.annotate(
        f"copy {copy:,.4g} GB/s", (middle, middle * copy / 1e3), fontsize=8, color="0.25", ha="left", va="top",
        xytext=(6, -2), textcoords="offset points",
    )  # fmt: skip
    axes.grid(True, which="major", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_title("Roofline of this machine, measured", fontsize=10)


def _number_columns(axes: Axes, columns: Mapping[float, Sequence[str]], low: float) -> None:
    """The numbers of the cases under their points; those that stand close go to lines of their own."""
    line, previous = 0, 0.0
    for intensity in sorted(columns):
        line = (line + 1) % 3 if intensity < 1.13 * previous else 0
        previous = intensity
        axes.annotate(
            ", ".join(columns[intensity]), (intensity, low), ha="center", va="bottom", fontsize=8, fontweight="bold",
            xytext=(0, 4 + 11 * line), textcoords="offset points",
        )  # fmt: skip


def _point(axes: Axes, x: float, y: float, variant: str) -> None:
    colour, marker, _ = _STYLE.get(variant, _OTHER)
    axes.plot(x, y, marker=marker, color=colour, ms=6, ls="none", mfc="none" if marker in "^v" else colour)


def _draw_multiples(axes: Axes, rows: Sequence[Row], cases: Sequence[str]) -> None:
    """Time over the floor, one line a case; a tick marks the goal."""
    goals = {case.name: case.goal.floors for case in CASES}
    for index, case in enumerate(cases):
        axes.axhline(index, color="0.92", lw=0.8, zorder=0)
        if case in goals and any(row.get("goal_ns") for row in rows):
            axes.plot(goals[case], index, marker="|", color="0.4", ms=14, mew=1.6, ls="none", zorder=1)
    for row in rows:
        _point(axes, float(row["over_floor"]), cases.index(row["case"]), row["variant"])
    axes.axvline(1, color="0.35", lw=1.2)
    axes.set(xscale="log", ylim=(len(cases) - 0.4, -0.6), xlabel="time as a multiple of the floor")
    axes.set_xlim(left=0.8)
    ticks = [1, 2, 3, 5, 10, 20, 50, 100, 200]
    largest = max(float(row["over_floor"]) for row in rows)
    axes.set_xticks([tick for tick in ticks if tick <= 1.3 * largest])
    axes.set_xticklabels([str(tick) for tick in ticks if tick <= 1.3 * largest])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [f"{index + 1}  {case}" for index, case in enumerate(cases)], fontsize=8)
    goal = " (grey tick: goal)" if any(row.get("goal_ns") for row in rows) else ""
    axes.set_title(f"Distance from the floor{goal}", fontsize=10)


def _products(ceilings: Mapping[str, float]) -> dict[str, float]:
    suffix = " TFLOP/s"
    return {name.removesuffix(suffix): value for name, value in ceilings.items() if name.endswith(suffix)}


def _legend_handle(name: str) -> Any:
    from matplotlib.lines import Line2D

    colour, marker, label = _STYLE[name]
    return Line2D(
        [], [], color=colour, marker=marker, ls="none", mfc="none" if marker in "^v" else colour, ms=6, label=label
    )
