"""A study for a terminal, a Markdown file and the cell of a notebook."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aniso_ext.diagnostics.findings import range_of
from aniso_ext.diagnostics.html.page import environment, opening
from aniso_ext.diagnostics.html.tables import NOTHING, methods_table
from aniso_ext.diagnostics.metrics import METHOD_METRICS
from aniso_ext.diagnostics.report import format_number

if TYPE_CHECKING:
    from aniso_ext.diagnostics.study import Study

LEADING = ("composition", "premise", "method")


def study_text(study: Study) -> str:
    """The gap, one line a method, the verdict."""
    wide = max(len(name) for name in study.methods)
    lines = [f"{study.title}: {opening(study)}", "", _without_energy(study), ""]
    lines.append(f"{'method':<{wide}} " + "".join(f"{metric.symbol:>9}" for metric in METHOD_METRICS))
    for name, report in study.methods.items():
        lines.append(
            f"{name:<{wide}} "
            + "".join(f"{format_number(getattr(report, metric.field)):>9}" for metric in METHOD_METRICS)
        )
    lines += ["", "Verdict", *(f"- {one.sentence}" for one in study.verdict.findings)]
    return "\n".join(lines)


def _without_energy(study: Study) -> str:
    return "\n".join(line for line in str(study.gap).splitlines() if not line.startswith("  E("))


def study_markdown(study: Study) -> str:
    """Verdict, gap, one line a method, and the command to repeat."""
    lines = [f"# {_cell(study.title)}", "", opening(study), "", "## Verdict", ""]
    lines += [f"- {_cell(one.sentence)}" for one in study.verdict.findings]
    lines += ["", "## The gap", "", "```text", str(study.gap), "```", "", "## The stand-ins", ""]
    lines.append("| method | " + " | ".join(metric.symbol for metric in METHOD_METRICS) + " |")
    lines.append("|---|" + "---:|" * len(METHOD_METRICS))
    for name, report in study.methods.items():
        values = (range_of(report, metric.field).value for metric in METHOD_METRICS)
        cells = (
            f"{value:.{metric.digits}f}" if value == value else NOTHING
            for value, metric in zip(values, METHOD_METRICS, strict=True)
        )
        lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    first = next(iter(study.methods.values()))
    drawn = "" if first.n == first.n_available else f", drawn from {first.n_available:,}"
    lines += ["", f"Judged on {first.n:,} pairs, k = {first.k}{drawn}.", ""]
    lines += [f"- {metric.symbol}: {metric.meaning}" for metric in METHOD_METRICS]
    fence = "`" * (max(map(len, _fences(study.origin.command))) + 1)
    lines += ["", "## To repeat", "", f"{fence}bash", study.origin.command, fence]
    return "\n".join(lines) + "\n"


def _fences(text: str) -> list[str]:
    """Runs of back quotes, which the fence around the text must exceed."""
    return [*re.findall("`+", text), "``"]


def _cell(text: str) -> str:
    """A text that breaks no table and starts no markup."""
    for character in "\\|<>`*[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def study_summary(study: Study) -> str:
    """A few sentences and the table of methods as HTML for a notebook."""
    verdict = study.verdict
    return (
        environment()
        .get_template("summary.html.j2")
        .render(
            title=study.title,
            opening=opening(study),
            findings=[verdict[topic] for topic in LEADING],
            table=methods_table(study.methods),
        )
    )
