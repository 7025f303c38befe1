"""Several studies on one page: tables side by side and their curves in one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from aniso_ext.diagnostics.choice import score
from aniso_ext.diagnostics.findings import range_of
from aniso_ext.diagnostics.gap import GapReport
from aniso_ext.diagnostics.html import tables
from aniso_ext.diagnostics.html.page import Section, render
from aniso_ext.diagnostics.html.pictures import Picture, picture
from aniso_ext.diagnostics.html.tables import Cell, Column, Table
from aniso_ext.diagnostics.metrics import GAP_METRICS, METHOD_METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aniso_ext.diagnostics.compare import Comparison
    from aniso_ext.diagnostics.study import Study


def comparison_page(comparison: Comparison, *, figures: bool = True) -> str:
    """The page of a comparison.

    Raises:
        AnisoError: ``figures`` without matplotlib.
    """
    studies = comparison.studies
    gaps = {name: study.gap for name, study in studies.items()}
    sections = [
        Section("verdicts", "Verdicts side by side", tables=(_outcomes(studies), _sentences(studies))),
        Section(
            "gaps", "The gaps", lead=(_fair(gaps),), metrics=GAP_METRICS, tables=(_gaps(gaps),),
            pictures=tuple(gap_pictures(gaps)) if figures else (),
        ),
        Section("stand-ins", "The stand-ins", metrics=METHOD_METRICS, tables=(_methods(studies),)),
        Section(
            "measured", "How it was measured", tables=(_measured(studies),), code=_commands(comparison),
            code_label="Commands that repeat this page and its reports",
        ),
    ]  # fmt: skip
    return render(
        kind="Comparison of modality gaps",
        title=f"{len(studies)} studies: {', '.join(studies)}",
        opening="Each column or row is one finished report.",
        sections=sections,
        footer="This page loads nothing from anywhere.",
    )


def _fair(gaps: Mapping[str, GapReport]) -> str:
    shapes = {(gap.n, gap.width) for gap in gaps.values()}
    if len(shapes) == 1:
        return "All studies have the same number of pairs and the same width, so every number can be compared."
    return (
        "Pairs or widths differ: compare A_r, d_eff/D, O_q and eta_U by what each is to be compared with, not as they "
        "are."
    )


def _outcomes(studies: Mapping[str, Study]) -> Table:
    topics = list(dict.fromkeys(one.topic for study in studies.values() for one in study.verdict.findings))
    verdicts = {name: study.verdict for name, study in studies.items()}
    rows = tuple(
        (
            Cell(topic),
            *(Cell(verdict[topic].outcome if topic in verdict else tables.NOTHING) for verdict in verdicts.values()),
        )
        for topic in topics
    )
    return Table("Outcome of each rule", (Column("topic", False), *(Column(name, False) for name in studies)), rows)


def _sentences(studies: Mapping[str, Study]) -> Table:
    from aniso_ext.diagnostics.compare import TOPICS

    rows = tuple(
        (Cell(name), *(Cell(study.verdict[topic].sentence) for topic in TOPICS)) for name, study in studies.items()
    )
    return Table(
        "In words", (Column("study", False), *(Column(topic, False) for topic in TOPICS)), rows, sortable=False
    )


def _gaps(gaps: Mapping[str, GapReport]) -> Table:
    head = [("pairs", lambda gap: Cell(f"{gap.n:,}", gap.n)), ("width", lambda gap: Cell(f"{gap.width:,}", gap.width))]
    rows = [(Cell(label), *(make(gap) for gap in gaps.values())) for label, make in head]
    for metric in GAP_METRICS:
        symbol = metric.symbol
        rows.append((Cell(symbol), *(_with_reference(gap, metric.field, metric.digits) for gap in gaps.values())))
    columns = (Column("number", False), *(Column(name) for name in gaps))
    return Table(
        "Numbers of the gaps, with intervals and what they are to be compared with",
        columns,
        tuple(rows),
        sortable=False,
    )


def _with_reference(gap: GapReport, field: str, digits: int) -> Cell:
    one = range_of(gap, field)
    reference = {
        "o_q": f"q = {gap.q}, q/D {gap.o_q_baseline:.3f}",
        "a_r": f"isotropic {gap.a_r_isotropic:.1f}",
        "d_eff_ratio": f"isotropic {gap.d_eff_ratio_isotropic:.3f}",
        "eta_u": f"R = {gap.eta_u_rank}, R/D {gap.eta_u_baseline:.3f}",
    }.get(field, "")
    interval = f"{one.low:.{digits}f} to {one.high:.{digits}f}" if one.measured else ""
    return tables.cell(one.value, digits, "; ".join(part for part in (interval, reference) if part))


def _methods(studies: Mapping[str, Study]) -> Table:
    rows = tuple(
        (
            Cell(name),
            Cell(method),
            tables.ranged(score(report)),
            *(tables.ranged(range_of(report, metric.field), metric.digits) for metric in METHOD_METRICS),
        )
        for name, study in studies.items()
        for method, report in study.methods.items()
    )
    columns = (
        Column("study", False),
        Column("method", False),
        Column("score"),
        *(Column(one.symbol, hint=one.meaning) for one in METHOD_METRICS),
    )
    return Table("All stand-ins of all studies", columns, rows)


def _measured(studies: Mapping[str, Study]) -> Table:
    rows = tuple(
        (
            Cell(name),
            Cell(study.origin.source),
            Cell(study.origin.target),
            Cell(f"{study.measured.rows:,}", study.measured.rows),
            Cell(f"{study.measured.judged:,}", study.measured.judged),
            Cell(f"{study.measured.queries:,}", study.measured.queries),
            Cell(str(study.measured.options.k), study.measured.options.k),
            Cell(study.measured.date),
        )
        for name, study in studies.items()
    )
    columns = (
        Column("study", False), Column("source", False), Column("target", False), Column("pairs"), Column("judged"),
        Column("queries", hint="Pairs whose neighbours were searched, among all that were judged"),
        Column("k"), Column("date", False),
    )  # fmt: skip
    return Table("What was measured", columns, rows)


def _commands(comparison: Comparison) -> str:
    lines = [study.origin.command for study in comparison.studies.values()]
    return "\n".join([*lines, comparison.command] if comparison.command else lines)


def gap_pictures(gaps: Mapping[str, GapReport]) -> list[Picture]:
    """Spectra, overlaps and cumulative energies of all studies, over the share of the directions."""
    spectra = "; ".join(f"{name}: C_lambda {gap.c_lambda:.3f}" for name, gap in gaps.items())
    overlaps = "; ".join(
        f"{name}: {gap.o_q:.3f} at q = {gap.q}, unrelated {gap.o_q_baseline:.3f}" for name, gap in gaps.items()
    )
    spread = "; ".join(f"{name}: d_eff/D {gap.d_eff_ratio:.3f}" for name, gap in gaps.items())
    residual = "; ".join(f"{name}: A_r {gap.a_r:.1f}, isotropic {gap.a_r_isotropic:.1f}" for name, gap in gaps.items())
    return [
        picture(
            lambda theme, width: overlay(gaps, _target_spectrum, "energy over average", theme, width, log=True),
            alt=f"Target spectra over the share of directions. {spectra}.",
            caption="Target variances along the principal directions, over their average. Steeper is a smaller "
            "dominant "
            "geometry.",
        ),
        picture(
            lambda theme, width: overlay(gaps, _residual_spectrum, "residual over average", theme, width, log=True),
            alt=f"Residual spectra over the share of directions. {residual}.",
            caption="Energies of the residual's directions, over their average: the first point is A_r.",
        ),
        picture(
            lambda theme, width: overlay(gaps, _energy, "share of the residual", theme, width, chance="isotropic"),
            alt=f"Cumulative residual energy over the share of directions. {spread}.",
            caption="Share of the residual in its strongest directions. The further above the diagonal, the fewer "
            "directions matter.",
        ),
        picture(
            lambda theme, width: overlay(gaps, _overlap, "overlap $O_q$", theme, width, chance="unrelated"),
            alt=f"Overlap of the leading directions over their share q/D. {overlaps}.",
            caption="Overlap of the strongest directions of source and target. On the diagonal they are unrelated.",
        ),
    ]


def _target_spectrum(gap: GapReport) -> tuple[list[float], list[float]]:
    return _relative(gap.target_spectrum)


def _residual_spectrum(gap: GapReport) -> tuple[list[float], list[float]]:
    return _relative(gap.residual_spectrum)


def _relative(spectrum: tuple[float, ...]) -> tuple[list[float], list[float]]:
    mean = math.fsum(spectrum) / len(spectrum)
    kept = [value / mean for value in spectrum if mean > 0 and value > 1e-12 * spectrum[0]]
    return [(place + 1) / len(spectrum) for place in range(len(kept))], kept


def _energy(gap: GapReport) -> tuple[list[float], list[float]]:
    return [0.0, *(one.isotropic for one in gap.energy)], [0.0, *(one.energy for one in gap.energy)]


def _overlap(gap: GapReport) -> tuple[list[float], list[float]]:
    if not gap.overlap:
        return [gap.o_q_baseline], [gap.o_q]
    return [one.baseline for one in gap.overlap], [one.overlap for one in gap.overlap]


def overlay(
    gaps: Mapping[str, GapReport],
    curve: Callable[[GapReport], tuple[list[float], list[float]]],
    label: str,
    theme: str,
    width: float,
    *,
    log: bool = False,
    chance: str = "",
) -> Figure:
    """One curve a study over the share of directions, named below; ``chance`` names the diagonal."""
    from aniso_ext.diagnostics.figures.labels import Named, legend_below
    from aniso_ext.diagnostics.figures.style import Look, dress, looks, new_figure, plain_log, theme_of

    colours = theme_of(theme)
    found = looks(gaps, colours)
    figure = new_figure(width, 2.4, colours)
    axes = figure.subplots()
    dress(axes, colours, x="share of the directions", y=label)
    if log:
        plain_log(axes, "y")
    else:
        axes.set_ylim(0, 1.05)
    axes.set_xlim(0, 1)
    named = [Named(name, found[name]) for name in gaps]
    for name, gap in gaps.items():
        across, up = curve(gap)
        look = found[name]
        axes.plot(
            across, up, color=look.colour, ls=look.dashes, lw=1.2, marker=look.marker if len(up) < 20 else None, ms=3.5
        )
    if chance:
        axes.plot([0, 1], [0, 1], color=colours.muted, ls=":", lw=1)
        named.append(Named(chance, Look(colours.muted, "", ":")))
    legend_below(figure, named, colours)
    return figure
