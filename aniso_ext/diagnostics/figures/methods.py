"""What transforms made of the gap, side by side (METHOD section 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.diagnostics.alignment import AlignmentReport
from aniso_ext.diagnostics.figures.gap import draw_spectrum
from aniso_ext.diagnostics.figures.labels import (
    POINTS,
    Named,
    category_labels,
    legend_below,
    name_points,
    name_series,
    row_height,
    wrap,
)
from aniso_ext.diagnostics.figures.style import (
    DOUBLE,
    IDENTITY,
    SINGLE,
    TWO_COLUMNS,
    Look,
    Theme,
    dress,
    looks,
    new_figure,
    text_style,
    theme_of,
    undefined,
)
from aniso_ext.diagnostics.oracle import OraclePathReport
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRESERVATION = {
    "omega": "neighbours kept, $\\Omega$",
    "psi": "similarities kept, $\\Psi$",
    "phi": "rows kept, $\\Phi$",
}
_METRICS = ("delta_mu", "phi", "psi", "omega", "m_z", "m_x", "a_r")


def mixing_plane(
    methods: Mapping[str, AlignmentReport],
    oracle: OraclePathReport | None = None,
    *,
    preservation: str = "omega",
    theme: str = "light",
    width: float = SINGLE,
) -> Figure:
    """Faithfulness to the source against mixing with the target: min(M_Z, M_X), one point a method.

    Up and to the right is better. The oracle's path, which reads the pairs, is a curve for each number K of corrected
    directions, from alpha = 0 to alpha = 1; its marks name alpha.

    Args:
        methods: alignment reports by name, in order.
        oracle: a report of :func:`aniso_ext.diagnostics.oracle_path`.
        preservation: the vertical axis: ``omega``, ``psi`` or ``phi``.
        theme: ``light`` or ``dark``.
        width: inches; 3.4 is a column of a paper, 7 are two.

    Raises:
        AnisoError: matplotlib is not installed.
        InputError: no methods, no such theme or preservation, or a width below 2.5 inches.

    Example:
        >>> import numpy as np
        >>> from aniso_ext import diagnostics
        >>> rows = np.random.default_rng(0).normal(size=(400, 8))
        >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        >>> y, x = rows[:200], rows[200:]
        >>> figure = mixing_plane({"identity": diagnostics.alignment(y, x, y, k=5)})
        >>> figure.axes[0].get_ylabel()
        'neighbours kept, $\\\\Omega$'
    """
    if preservation not in _PRESERVATION:
        raise InputError(f"preservation must be one of {', '.join(_PRESERVATION)}, got {preservation!r}")
    colours, found = _start(methods, theme)
    figure = new_figure(width, min(3.6, 0.85 * width), colours)
    axes = figure.subplots()
    dress(axes, colours, x="mixing with the target, min($M_Z$, $M_X$)", y=_PRESERVATION[preservation])
    points = [
        Named(name, found[name], _mixing(report), getattr(report, preservation)) for name, report in methods.items()
    ]
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    for point in shown:
        report = methods[point.text]
        lower = "m_z" if report.m_z <= report.m_x else "m_x"
        _interval(axes, report, lower, point.y, point.look, colours)
        if preservation in report.intervals:
            axes.plot([point.x] * 2, list(report.intervals[preservation]), color=point.look.colour, lw=1.5, alpha=0.5)
        axes.plot(
            point.x, point.y, point.look.marker, color=point.look.colour, ms=5.5, mec=colours.background, mew=0.5,
            label=point.text, zorder=4,
        )  # fmt: skip
    bars = [line for line in (np.asarray(line.get_xydata()) for line in axes.lines) if len(line) > 1]
    curves = [] if oracle is None else _oracle_curves(axes, oracle, preservation, colours)
    if len(shown) < len(points):
        names = ", ".join(point.text for point in points if point not in shown)
        ks = min(report.k for report in methods.values())
        reason = "M is undefined at k = 1" if ks == 1 else f"undefined: {names}"
        axes.set_title(reason, loc="left", **text_style(colours, colours.muted))
    if not shown and not curves:
        axes.set(xlim=(0, 1), ylim=(0, 1))
        return figure
    axes.margins(0.14)
    notes = [] if oracle is None else _oracle_notes(oracle, preservation, colours)
    name_points(figure, axes, shown, colours, curves=[*bars, *curves], notes=notes)
    return figure


def _mixing(report: AlignmentReport) -> float:
    """The lesser of penetration and coverage; NaN if one of them is."""
    return float(np.minimum(report.m_z, report.m_x))


def _oracle_curves(axes: Axes, oracle: OraclePathReport, preservation: str, theme: Theme) -> list[np.ndarray]:
    curves = []
    for rank in dict.fromkeys(point.top_k for point in oracle.points):
        steps = sorted((point for point in oracle.points if point.top_k == rank), key=lambda point: point.alpha)
        curve = np.array([[_mixing(step.alignment), getattr(step.alignment, preservation)] for step in steps])
        if np.isfinite(curve).all(axis=1).any():
            axes.plot(
                *curve.T, color=theme.muted, lw=0.9, ls=(0, (3, 1.5)), marker=".", ms=3.5, label=f"oracle K = {rank}"
            )
            curves.append(curve)
    return curves


def _oracle_notes(oracle: OraclePathReport, preservation: str, theme: Theme) -> list[Named]:
    """Alpha along the widest path, K at the end of each."""
    look = Look(theme.muted, ".", "-")
    widest, last = (max(getattr(point, name) for point in oracle.points) for name in ("top_k", "alpha"))
    notes: list[Named] = []
    for point in oracle.points:
        place = _mixing(point.alignment), getattr(point.alignment, preservation)
        rank = "D" if point.top_k == oracle.width else str(point.top_k)
        if not all(map(math.isfinite, place)):
            continue
        if point.top_k == widest and point.alpha == last:
            notes.insert(0, Named(f"oracle, K = {rank}, $\\alpha$ = {point.alpha:g}", look, *place))
        elif point.alpha == last:
            notes.append(Named(f"K = {rank}", look, *place))
        elif point.top_k == widest and point.alpha > 0:
            notes.append(Named(f"{point.alpha:g}", look, *place))
    return notes


def relative_discrepancies(
    methods: Mapping[str, AlignmentReport], *, theme: str = "light", width: float = SINGLE
) -> Figure:
    """All distances from the ideal, 0 the best: Delta_mu and A_r over those of the identity, one minus the others.

    Without a method called ``identity`` the first one is what Delta_mu and A_r are divided by. Arguments and errors
    as in :func:`mixing_plane`.
    """
    colours, found = _start(methods, theme)
    base = IDENTITY if IDENTITY in methods else next(iter(methods))
    step = max(5.5, 22 / len(methods))
    figure = new_figure(width, (len(_METRICS) * (step * len(methods) + 7) + 40) / POINTS, colours)
    axes = figure.subplots()
    dress(axes, colours, x="discrepancy, 0 is best", grid="x")
    titles = [
        "$\\Delta_\\mu$ (ratio)",
        "1 − $\\Phi$",
        "1 − $\\Psi$",
        "1 − $\\Omega$",
        "1 − $M_Z$",
        "1 − $M_X$",
        "$A_r$ (ratio)",
    ]
    axes.set_yticks(range(len(_METRICS)), titles)
    axes.tick_params(axis="y", length=0, labelcolor=colours.ink)
    for row in range(1, len(_METRICS)):
        axes.axhline(row - 0.5, color=colours.faint, lw=0.6)
    inner = step / (step * len(methods) + 7)
    for place, (name, report) in enumerate(methods.items()):
        shift = (place - (len(methods) - 1) / 2) * inner
        values = [discrepancy(report, methods[base], metric) for metric in _METRICS]
        rows = np.arange(len(_METRICS)) + shift
        look = found[name]
        axes.hlines(rows, 0, values, color=look.colour, lw=0.6, alpha=0.5)
        axes.plot(values, rows, look.marker, color=look.colour, ms=4, label=name, clip_on=False, zorder=4)
        for metric, row in zip(_METRICS, rows, strict=True):
            if metric in report.intervals:
                ends = [_discrepancy(end, getattr(methods[base], metric), metric) for end in report.intervals[metric]]
                axes.plot(ends, [row, row], color=look.colour, lw=2, alpha=0.5)
    axes.set_ylim(len(_METRICS) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.axvline(0, color=colours.muted, lw=0.8)
    axes.set_title(f"ratio: over that of {_short(base)}", loc="left", **text_style(colours, colours.muted))
    legend_below(figure, [Named(name, found[name]) for name in methods], colours, markers=True)
    return figure


def discrepancy(report: AlignmentReport, base: AlignmentReport, metric: str) -> float:
    """Delta_mu and A_r over those of ``base`` (NaN where that is zero); one minus any other metric."""
    return _discrepancy(getattr(report, metric), getattr(base, metric), metric)


def _discrepancy(value: float, base: float, metric: str) -> float:
    if metric in ("delta_mu", "a_r"):
        return value / base if base > 0 else math.nan
    return 1 - value


def _short(name: str) -> str:
    first, *rest = wrap(name, 110).split("\n")
    return first + ("…" if rest else "")


def penetration_and_coverage(
    methods: Mapping[str, AlignmentReport], *, theme: str = "light", width: float = SINGLE
) -> Figure:
    """M_Z (filled: do stand-ins lie among targets) and M_X (outlined: are targets covered), 1 for mixed clouds.

    Arguments and errors as in :func:`mixing_plane`.
    """
    colours, found = _start(methods, theme)
    names = list(methods)
    room = 0.32 * width * POINTS
    figure = new_figure(width, len(names) * row_height(names, room, 24) + 0.75, colours)
    from matplotlib.patheffects import withStroke

    axes = figure.subplots()
    dress(axes, colours, x="label entropy, 1 is mixed", grid="x")
    for place, (name, report) in enumerate(methods.items()):
        colour = found[name].colour
        for metric, row, fill in (("m_z", place - 0.2, colour), ("m_x", place + 0.2, colours.background)):
            value = getattr(report, metric)
            axes.barh(row, value, height=0.32, facecolor=fill, edgecolor=colour, lw=1, label=f"{metric} {name}")
            if metric in report.intervals:
                outlined = [withStroke(linewidth=2.4, foreground=colours.background)]
                axes.plot(list(report.intervals[metric]), [row, row], color=colours.ink, lw=1, path_effects=outlined)
            axes.annotate(
                f"{value:.2f}" if math.isfinite(value) else "–", (1.02, row), xycoords=("axes fraction", "data"),
                va="center", annotation_clip=False, **text_style(colours),
            )  # fmt: skip
    category_labels(axes, names, colours, room)
    axes.axvline(1, color=colours.muted, lw=0.8, ls=(0, (3, 2)), zorder=0.9)
    axes.set_xlim(0, max(1.05, axes.get_xlim()[1]))
    axes.set_title("filled: penetration $M_Z$; outlined: coverage $M_X$", loc="left", **text_style(colours))
    return figure


def residual_spectra(methods: Mapping[str, AlignmentReport], *, theme: str = "light", width: float = SINGLE) -> Figure:
    """Eigenvalues of E[(x - z)(x - z)^T], uncentred as A_r takes it, of each method, logarithmic.

    Arguments and errors as in :func:`mixing_plane`.
    """
    colours, found = _start(methods, theme)
    figure = new_figure(width, 2.5, colours)
    axes = figure.subplots()
    dress(axes, colours, x="index of eigenvalue", y="energy of x − z")
    series = [draw_spectrum(axes, name, report.spectrum, found[name]) for name, report in methods.items()]
    if not any(math.isfinite(item.y) for item in series):
        undefined(axes, colours, "no residual: stand-ins equal their targets")
    name_series(figure, axes, series, colours)
    return figure


def consistency(methods: Mapping[str, AlignmentReport], *, theme: str = "light", width: float = DOUBLE) -> Figure:
    """What is kept of the source: Phi beside its bounds, Psi, Omega.

    A tick is the largest Phi that the mean of a method's own output allows, the dashed line the largest once that mean
    is the target's (METHOD known fact (a)). Arguments and errors as in :func:`mixing_plane`.
    """
    colours, found = _start(methods, theme)
    names = list(methods)
    beside = width >= TWO_COLUMNS
    room = (0.22 if beside else 0.32) * width * POINTS
    height = len(names) * row_height(names, room, 14)
    figure = new_figure(width, height + 0.7 if beside else 3 * (height + 0.6), colours)
    panels = figure.subplots(1, 3, sharey=True) if beside else figure.subplots(3, 1)
    titles = {"phi": "instance, $\\Phi$", "psi": "similarities, $\\Psi$", "omega": "neighbours, $\\Omega$"}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        dress(axes, colours, x=title, grid="x")
        _rows_of(axes, methods, found, metric, colours)
        if axes is panels[0] or not beside:
            category_labels(axes, names, colours, room)
        else:
            axes.tick_params(axis="y", labelleft=False, length=0)
    return figure


def _rows_of(
    axes: Axes, methods: Mapping[str, AlignmentReport], found: Mapping[str, Look], metric: str, theme: Theme
) -> None:
    for row, (name, report) in enumerate(methods.items()):
        value, look = getattr(report, metric), found[name]
        axes.axhline(row, color=theme.faint, lw=0.5, zorder=0.5)
        _interval(axes, report, metric, row, look, theme)
        axes.plot(value, row, look.marker, color=look.colour, ms=5, label=name, zorder=4)
        if metric == "phi":
            axes.plot(report.phi_bound_output, row, "|", color=theme.ink, ms=9, mew=1.2, label="bound")
        if not math.isfinite(value):
            axes.annotate(
                "undefined", (0.5, row), xycoords=("axes fraction", "data"), ha="center", va="center",
                **text_style(theme, theme.muted),
            )  # fmt: skip
    bounds = {report.phi_bound for report in methods.values() if math.isfinite(report.phi_bound)}
    if metric == "phi" and bounds:
        cap = max(bounds)
        axes.axvline(cap, color=theme.muted, lw=0.8, ls=(0, (3, 2)), zorder=0.9, label="cap")
        axes.set_title(
            f"tick: bound; dashed: at $\\Delta_\\mu$ = 0, {cap:.3f}", loc="left", **text_style(theme, theme.muted)
        )
    axes.margins(x=0.12)


def _interval(axes: Axes, report: AlignmentReport, metric: str, row: float, look: Look, theme: Theme) -> None:
    if metric in report.intervals:
        axes.plot(list(report.intervals[metric]), [row, row], color=look.colour, lw=1.5, alpha=0.6, zorder=3)


def _start(methods: Mapping[str, Any], theme: str) -> tuple[Theme, dict[str, Look]]:
    if not methods:
        raise InputError("there are no methods to draw: pass alignment reports by name")
    colours = theme_of(theme)
    return colours, looks(methods, colours)
