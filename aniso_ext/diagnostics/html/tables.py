"""Tables of a page: columns, and cells that carry a number beside what is shown of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aniso_ext.diagnostics.alignment import AlignmentReport
from aniso_ext.diagnostics.choice import IDENTITY, mixing_share, preservation, score
from aniso_ext.diagnostics.corrections import CorrectionReport
from aniso_ext.diagnostics.findings import Range, range_of
from aniso_ext.diagnostics.gap import GapReport
from aniso_ext.diagnostics.metrics import GAP_METRICS, METHOD_METRICS, Metric
from aniso_ext.diagnostics.oracle import OraclePathReport
from aniso_ext.diagnostics.phases import PhaseReport

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """Heading of a column; ``hint`` is shown when a pointer rests on it."""

    label: str
    numeric: bool = True
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number by which the column is sorted."""

    text: str
    value: float | None = None
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    sortable: bool = True


def cell(value: float, digits: int = 3, note: str = "", strong: bool = False) -> Cell:
    """A number."""
    if not math.isfinite(value):
        return Cell(NOTHING)
    return Cell(f"{value:.{digits}f}", value, note, strong)


def ranged(one: Range, digits: int = 3, strong: bool = False) -> Cell:
    """A number with its interval."""
    note = f"{one.low:.{digits}f} to {one.high:.{digits}f}" if one.measured else ""
    return cell(one.value, digits, note, strong)


def gap_table(gap: GapReport) -> Table:
    """Every number of a gap beside what it is to be compared with."""
    beside = {
        "o_q": (gap.o_q_baseline, "q/D, unrelated directions"),
        "a_r": (gap.a_r_isotropic, "isotropic at this n"),
        "d_eff_ratio": (gap.d_eff_ratio_isotropic, "isotropic at this n"),
        "eta_u": (gap.eta_u_baseline, "R/D, random directions"),
    }
    rows = []
    for metric in GAP_METRICS:
        one = range_of(gap, metric.field)
        reference, why = beside.get(metric.field, (math.nan, ""))
        interval = (
            Cell(f"{one.low:.{metric.digits}f} to {one.high:.{metric.digits}f}") if one.measured else Cell(NOTHING)
        )
        rows.append(
            (
                Cell(_symbol(metric, gap)),
                cell(one.value, metric.digits),
                interval,
                cell(reference, metric.digits, why),
            )
        )
    columns = (Column("number", False), Column("value"), Column("95 % interval"), Column("compare with"))
    return Table(f"The gap of {gap.n:,} pairs of width {gap.width:,}", columns, tuple(rows), sortable=False)


def _symbol(metric: Metric, gap: GapReport) -> str:
    return f"O_{gap.q}" if metric.field == "o_q" else metric.symbol


def energy_table(gap: GapReport) -> Table:
    """E(K), and O_q where the report has its curve."""
    rows = tuple((Cell(f"{one.rank:,}", one.rank), cell(one.energy), cell(one.isotropic)) for one in gap.energy)
    columns = (Column("K"), Column("E(K)"), Column("K/D, isotropic"))
    return Table("Share of the residual in its K strongest directions", columns, rows)


def overlap_table(gap: GapReport) -> Table:
    """O_q over q."""
    rows = tuple((Cell(f"{one.q:,}", one.q), cell(one.overlap), cell(one.baseline)) for one in gap.overlap)
    return Table("Overlap of the q strongest directions", (Column("q"), Column("O_q"), Column("q/D, unrelated")), rows)


def methods_table(methods: Mapping[str, AlignmentReport]) -> Table:
    """One row a method, with the score of the verdict; what cannot be told from the best stand-in is strong."""
    strong = {metric.field: _best(methods, metric) for metric in METHOD_METRICS}
    rows = []
    for name, report in methods.items():
        cells = [
            ranged(range_of(report, metric.field), metric.digits, name in strong[metric.field])
            for metric in METHOD_METRICS
        ]
        rows.append((Cell(name), ranged(score(report)), *cells))
    columns = (
        Column("method", False),
        Column("score", hint="Harmonic mean of preservation and mixing; see the verdict"),
        *(Column(metric.symbol, hint=metric.meaning) for metric in METHOD_METRICS),
    )
    first = next(iter(methods.values()))
    drawn = "" if first.n == first.n_available else f", drawn from {first.n_available:,}"
    note = (
        "Bold: the best of the stand-ins, and all that cannot be told apart from it by their intervals. identity is "
        "the source as it is."
    )
    if sampled := sampled_queries(methods):
        note += f" {sampled}"
    return Table(f"Stand-ins on {first.n:,} pairs{drawn}, k = {first.k}", columns, tuple(rows), note)


def sampled_queries(methods: Mapping[str, AlignmentReport]) -> str:
    """A sentence on the pairs whose neighbours were searched, where these are not all; else nothing."""
    first = next(iter(methods.values()))
    if first.queries == first.n:
        return ""
    worst = max((error for report in methods.values() for error in report.query_errors.values()), default=0.0)
    return (
        f"Omega, M_Z, M_X and R@k are means over {first.queries:,} pairs, drawn at random from the {first.n:,}, whose "
        f"neighbours are exact among all of them: standard error at most {worst:.1g}"
        f"{', which the intervals include' if first.intervals else ''}."
    )


def _best(methods: Mapping[str, AlignmentReport], metric: Metric) -> set[str]:
    """Names whose number is not clearly worse than that of the best method other than identity."""
    found = {
        name: _badness(range_of(report, metric.field), metric) for name, report in methods.items() if name != IDENTITY
    }
    found = {name: one for name, one in found.items() if math.isfinite(one.value)}
    if len(found) < 2:
        return set()
    least = min(found.values(), key=lambda one: one.value)
    return {name for name, one in found.items() if one.low <= least.high}


def _badness(one: Range, metric: Metric) -> Range:
    """The number turned so that less is better; rounded to what is shown."""
    value, low, high = (round(part, metric.digits) if math.isfinite(part) else part for part in one[:3])
    if metric.best == "low":
        return Range(value, low, high, one.measured)
    if metric.best == "one":
        distances = sorted((abs(1 - low), abs(1 - high)))
        inside = 0.0 if low <= 1 <= high else distances[0]
        return Range(abs(1 - value), inside, distances[1], one.measured)
    return Range(-value, -high, -low, one.measured)


def score_table(methods: Mapping[str, AlignmentReport]) -> Table:
    """What the verdict about methods rests on."""
    rows = tuple(
        (
            Cell(name),
            ranged(score(report)),
            ranged(preservation(report)),
            ranged(mixing_share(report)),
            ranged(range_of(report, "paired_cosine")),
            ranged(range_of(report, "recall_at_10")),
        )
        for name, report in methods.items()
    )
    columns = (
        Column("method", False),
        Column("score"),
        Column("preservation"),
        Column("mixing"),
        Column("cosine"),
        Column("R@10"),
    )
    return Table("What the verdict about methods rests on", columns, rows)


def oracle_table(oracle: OraclePathReport) -> Table:
    """One row a step of the oracle path."""
    shown = ("delta_mu", "psi", "omega", "m_z", "m_x", "a_r", "paired_cosine", "recall_at_1", "recall_at_10")
    metrics = [metric for metric in METHOD_METRICS if metric.field in shown]
    rows = tuple(
        (
            Cell(f"{point.top_k:,}", point.top_k),
            cell(point.energy),
            cell(point.alpha, 2),
            *(cell(getattr(point.alignment, metric.field), metric.digits) for metric in metrics),
        )
        for point in oracle.points
    )
    columns = (
        Column("K"),
        Column("E(K)"),
        Column("α"),
        *(Column(metric.symbol, hint=metric.meaning) for metric in metrics),
    )
    return Table(f"Oracle path on {oracle.n:,} pairs", columns, rows)


def phases_table(phases: PhaseReport) -> Table:
    """Concentration of the phases in the leading blocks."""
    shown = range(len(phases.blocks))
    rows = tuple(
        (Cell(name), *(cell(cloud.concentration[place]) for place in shown)) for name, cloud in phases.clouds.items()
    )
    columns = (Column("cloud", False), *(Column(f"block {block}") for block in phases.blocks))
    return Table("Concentration of the phases |E exp(iθ)|: 0 is spread evenly, 1 is one angle", columns, rows)


def corrections_table(corrections: CorrectionReport) -> Table:
    """How far rows were moved."""
    rows = []
    for name, lengths in corrections.lengths.items():
        angles, refined = corrections.angles[name], corrections.realised.get(name)
        part: Iterable[float | None] = (math.nan,) * 3
        if refined is not None:
            part = (refined.sizes.mean, refined.sizes.largest, refined.bound)
        rows.append(
            (
                Cell(name),
                *(cell(value) for value in (lengths.mean, lengths.median, lengths.p95)),
                *(cell(value, 1) for value in (angles.mean, angles.median, angles.p95)),
                *(cell(math.nan if value is None else value, 4) for value in part),
            )
        )
    columns = (
        Column("method", False),
        *(Column(f"length, {word}") for word in ("mean", "median", "95 %")),
        *(Column(f"degrees, {word}") for word in ("mean", "median", "95 %")),
        Column("refined by, mean"),
        Column("largest"),
        Column("bound"),
    )
    return Table(f"How far {corrections.n:,} rows were moved", columns, tuple(rows))


def plain_table(caption: str, headings: Sequence[str], rows: Iterable[tuple[str, str]]) -> Table:
    """Names and texts."""
    columns = tuple(Column(heading, False) for heading in headings)
    return Table(caption, columns, tuple(tuple(Cell(text) for text in row) for row in rows), sortable=False)
