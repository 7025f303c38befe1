"""Tables of measured numbers: on the terminal, as Markdown and as JSON files."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.cli.console import to_jsonable

if TYPE_CHECKING:
    from rich.table import Table

    from aniso_ext.diagnostics import GapReport


def judge(name: str, source: Any, target: Any, stand_ins: Any, **settings: Any) -> dict[str, Any]:
    """The alignment report of one method as a line of a table; warnings about its stand-ins name the method."""
    from aniso_ext import diagnostics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diagnostics.DiagnosticsWarning)
        report = diagnostics.alignment(source, target, stand_ins, **settings)
    for text in report.warnings:
        text = text.replace("transformed has", f"{name}: the result has", 1)
        warnings.warn(text, diagnostics.DiagnosticsWarning, stacklevel=2)
    return {"name": name, **report.to_dict()}


def alignment_table(rows: Sequence[Mapping[str, Any]], extra: Sequence[tuple[str, str, int]] = ()) -> Table:
    """One line a method; ``extra`` are further columns as (field, heading, digits)."""
    from rich.table import Table

    from aniso_ext.diagnostics.metrics import METHOD_METRICS

    columns = [(metric.field, metric.symbol, metric.digits) for metric in METHOD_METRICS]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    for _, heading, _ in (*columns, *extra):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *(number(row.get(field), digits) for field, _, digits in (*columns, *extra)))
    return table


def compare_constants(gap: GapReport, wanted: Mapping[str, float]) -> list[dict[str, Any]]:
    """Measured against wanted constants of a simulated world, with the relative deviation."""
    measured = gap.to_dict()
    return [
        {"name": name, "wanted": value, "measured": measured[name], "deviation": measured[name] / value - 1}
        for name, value in wanted.items()
    ]


def constants_table(constants: Sequence[Mapping[str, Any]]) -> Table:
    """What the simulator was asked for, and what the diagnostics find in its pairs."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("simulated constant", no_wrap=True)
    for heading in ("wanted", "measured", "deviation"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in constants:
        table.add_row(row["name"], f"{row['wanted']:.3f}", f"{row['measured']:.3f}", f"{row['deviation']:+.1%}")
    return table


def without_energy_curve(gap: GapReport) -> str:
    """The gap as text, without the lines E(K)."""
    return "\n".join(line for line in str(gap).splitlines() if not line.startswith("  E("))


def number(value: Any, digits: int) -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def markdown(title: str, gap: GapReport, rows: Sequence[Mapping[str, Any]]) -> str:
    """The gap and one line a method as Markdown."""
    from aniso_ext.diagnostics.metrics import METHOD_METRICS

    lines = [f"# {title}", "", "## The gap", "", "```text", str(gap), "```", "", "## The stand-ins", ""]
    lines.append("| method | " + " | ".join(metric.symbol for metric in METHOD_METRICS) + " |")
    lines.append("|---|" + "---:|" * len(METHOD_METRICS))
    for row in rows:
        cells = (number(row.get(metric.field), metric.digits) for metric in METHOD_METRICS)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    judged = f"{rows[0]['n']:,} pairs, k = {rows[0]['k']}"
    if rows[0]["n"] < gap.n:
        judged += f", drawn from {gap.n:,}"
    lines += ["", f"Judged on {judged}.", ""]
    lines += [f"- {metric.symbol}: {metric.meaning}" for metric in METHOD_METRICS]
    return "\n".join(lines) + "\n"


def check_device(name: str | None) -> None:
    """Refuse a device that torch cannot use.

    Raises:
        typer.BadParameter: torch says why.
    """
    if name is None:
        return
    import torch
    import typer

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"torch cannot use {name!r}: {reason}", param_hint="--device") from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_report(folder: Path, data: Mapping[str, Any], text: str) -> list[Path]:
    """Write ``report.json`` and ``report.md`` into a folder, which is made if need be; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.json", folder / "report.md"]
    write_text(paths[0], json.dumps(to_jsonable(data), indent=2, allow_nan=False) + "\n")
    write_text(paths[1], text)
    return paths
