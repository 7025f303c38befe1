"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aniso_ext.bench.records import Latency, Measurement, Ratio

if TYPE_CHECKING:
    from rich.table import Table

    from aniso_ext.bench.convert import ConversionTime


def kernels_table(rows: Sequence[Measurement]) -> Table:
    """One line a variant, under the name of its case."""
    columns = ("case", "error", "ns/row", "p20–p80", "GB/s", "TFLOP/s", "floor", "× floor", "vs eager", "vs compiled")
    table = _table(*columns, "goal", "met", left=1)
    for case in dict.fromkeys(row.case for row in rows):
        table.add_row(case)
        for row in rows:
            if row.case == case:
                table.add_row(*_cells(row), style=("bold" if row.ours else None) if row.ns_per_row else "red")
    return table


def _cells(row: Measurement) -> tuple[str, ...]:
    if row.ns_per_row is None:
        return f"  {row.variant}", "", "failed"
    return (
        f"  {row.variant}",
        "" if row.error is None else f"{row.error:.0e}",
        significant(row.ns_per_row),
        f"{significant(row.p20)}–{significant(row.p80)}",
        significant(row.gb_per_s),
        significant(row.tflop_per_s),
        significant(row.floor_ns),
        significant(row.over_floor),
        times(row.speedup_eager),
        times(row.speedup_compiled),
        "" if row.goal_ns is None else f"≤ {significant(row.goal_ns)}",
        {None: "", True: "yes", False: "no"}[row.met],
    )


def latency_table(rows: Sequence[Latency]) -> Table:
    """One line a way to call, one column a number of rows; microseconds."""
    sizes = list(dict.fromkeys(row.rows for row in rows))
    table = _table("latency, µs", *(f"N = {size:,}" for size in sizes), left=1)
    for variant in dict.fromkeys(row.variant for row in rows):
        found = {row.rows: row for row in rows if row.variant == variant}
        table.add_row(variant, *(f"{found[size].us:.1f}" if size in found else "" for size in sizes))
    return table


def conversions_table(rows: Sequence[ConversionTime]) -> Table:
    """One line a variant, under its number of rows."""
    columns = ("rows", "rows/s", "seconds", "p20–p80", "GB/s", "of cp", "of the map", "of the bus", "vs NumPy")
    table = _table(*columns, "peak MB", left=1)
    for count in dict.fromkeys(row.rows for row in rows):
        table.add_row(f"{count:,}")
        for row in rows:
            if row.rows == count:
                table.add_row(
                    f"  {row.variant}",
                    f"{row.rows_per_s:,.0f}",
                    significant(row.seconds),
                    f"{significant(row.p20)}–{significant(row.p80)}",
                    significant(row.gb_per_s),
                    *(share(value) for value in (row.of_copy, row.of_op, row.of_bus)),
                    times(row.times_pickled),
                    "" if row.peak_mb is None else f"{row.peak_mb:,.0f}",
                )
    return table


def ceilings_table(ceilings: Mapping[str, float]) -> Table:
    table = _table("ceiling", "measured", left=1)
    for name, value in ceilings.items():
        what, unit = name.split(" ", 1)
        table.add_row(what if what == "copy" else f"{what} product", f"{significant(value)} {unit}")
    return table


def comparison_table(ratios: Sequence[Ratio]) -> Table:
    table = _table("case", "variant", "first, ns/row", "second, ns/row", "second/first", left=2)
    for ratio in ratios:
        table.add_row(
            ratio.case, ratio.variant, significant(ratio.first_ns), significant(ratio.second_ns), f"{ratio.ratio:.3f}"
        )
    return table


def significant(value: float | None) -> str:
    """Three digits, never with an exponent."""
    if value is None:
        return ""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}" if abs(value) >= 0.1 else f"{value:.2g}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    return "" if value is None else f"{significant(value)} ×"


def _table(*columns: str, left: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table
