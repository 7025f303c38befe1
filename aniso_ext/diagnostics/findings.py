"""One sentence about a study with the rule behind it, and numbers with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from aniso_ext.diagnostics.alignment import AlignmentReport
from aniso_ext.diagnostics.gap import GapReport


@dataclass(frozen=True)
class Finding:
    """What is said of one topic: ``outcome`` in a word for programs, a sentence, and the rule that led to it."""

    topic: str
    outcome: str
    sentence: str
    rule: str


class Range(NamedTuple):
    """A number and its bounds, which include it; ``measured`` says whether they come from an interval."""

    value: float
    low: float
    high: float
    measured: bool

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        if math.isnan(self.value):
            return "undefined"
        bounds = f" [{self.low:{spec}}, {self.high:{spec}}]" if self.measured else ""
        return f"{self.value:{spec}}{bounds}"


def range_of(report: GapReport | AlignmentReport, name: str) -> Range:
    """A number of a report with its interval, or else with the bounds that a sample of queries leaves it."""
    value = float(getattr(report, name))
    found = report.intervals.get(name)
    if found is None or math.isnan(value) or math.isnan(found.low) or math.isnan(found.high):
        error = 1.96 * getattr(report, "query_errors", {}).get(name, 0.0)
        return Range(value, value - error, value + error, False)
    return Range(value, min(value, found.low), max(value, found.high), True)


def share(part: Range) -> str:
    """A share in percent."""
    if math.isnan(part.value):
        return "an undefined share"
    bounds = f" [{100 * part.low:.1f}, {100 * part.high:.1f}]" if part.measured else ""
    return f"{100 * part.value:.1f} %{bounds}"
