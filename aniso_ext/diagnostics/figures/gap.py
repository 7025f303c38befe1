"""The gap before any transform: spectra, subspaces, bias and residual (METHOD section 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from aniso_ext.diagnostics.figures.labels import Named, name_series
from aniso_ext.diagnostics.figures.style import (
    SINGLE,
    Look,
    dress,
    label_few_decades,
    looks,
    new_figure,
    plain_log,
    text_style,
    theme_of,
    undefined,
)
from aniso_ext.diagnostics.gap import GapReport, OverlapPoint
from aniso_ext.diagnostics.spectra import RELATIVE_ZERO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 2.3


def covariance_spectra(gap: GapReport, *, theme: str = "light", width: float = SINGLE) -> Figure:
    """Eigenvalues of S_x (target) and S_y (source), largest first, logarithmic; the title states C_lambda.

    Eigenvalues at rounding level are left out. METHOD section 1.

    Args:
        gap: a report of :func:`aniso_ext.diagnostics.gap`.
        theme: ``light`` or ``dark``.
        width: inches; 3.4 is a column of a paper, 7 are two.

    Raises:
        AnisoError: matplotlib is not installed.
        InputError: no such theme, or a width below 2.5 inches.

    Example:
        >>> import numpy as np
        >>> from aniso_ext import diagnostics
        >>> rows = np.random.default_rng(0).normal(size=(400, 8))
        >>> figure = covariance_spectra(diagnostics.gap(rows[:200], rows[200:]))
        >>> len(figure.axes[0].lines)
        2
    """
    colours = theme_of(theme)
    figure = new_figure(width, _HEIGHT, colours)
    axes = figure.subplots()
    found = looks(("target", "source"), colours)
    value = _with_interval(gap, "c_lambda", f"{gap.c_lambda:.3f}")
    stated = f"= {value} over" if math.isfinite(gap.c_lambda) else "undefined:"
    title = f"$C_\\lambda$ {stated} {gap.c_lambda_count} eigenvalues"
    dress(axes, colours, title=title, x="index of eigenvalue", y="variance")
    series = [
        draw_spectrum(axes, name, spectrum, found[name])
        for name, spectrum in (("target", gap.target_spectrum), ("source", gap.source_spectrum))
    ]
    name_series(figure, axes, series, colours)
    return figure


def subspace_overlap(gap: GapReport, *, theme: str = "light", width: float = SINGLE) -> Figure:
    """O_q, the overlap of the q leading directions of both sides, against q, beside q/D of unrelated directions.

    A report without a curve shows its one O_q. Arguments and errors as in :func:`covariance_spectra`.
    """
    colours = theme_of(theme)
    figure = new_figure(width, _HEIGHT, colours)
    axes = figure.subplots()
    points = gap.overlap or (OverlapPoint(gap.q, gap.o_q, gap.o_q_baseline),)
    points = tuple(sorted(points, key=lambda point: point.q))
    q = np.array([point.q for point in points])
    value = _with_interval(gap, "o_q", f"{gap.o_q:.3f}")
    dress(
        axes, colours, x=f"q leading directions of D = {gap.width}", y="overlap $O_q$",
        title=f"$O_{{{gap.q}}}$ = {value}\ndashed: unrelated directions, q/D = {gap.o_q_baseline:.3f}",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(*_powers(int(q.min()), int(q.max())))
    axes.set_ylim(0, 1.05)
    axes.plot(q, [point.overlap for point in points], "-o", color=colours.ink, lw=1.2, ms=3, label="measured")
    axes.plot(
        q, [point.baseline for point in points], ls=(0, (3, 2)), marker="_" if len(points) == 1 else None,
        color=colours.muted, lw=1, ms=9, label="unrelated, q/D",
    )  # fmt: skip
    if "o_q" in gap.intervals:
        axes.plot([gap.q, gap.q], list(gap.intervals["o_q"]), color=colours.ink, lw=2.5, alpha=0.5, label="interval")
    return figure


def bias_and_residual(gap: GapReport, *, theme: str = "light", width: float = SINGLE) -> Figure:
    """E||x - y||^2 = G_mu^2 + E||r||^2 in shares of itself, before and after the means are made equal.

    What is left after the mean shift is R_res. Arguments and errors as in :func:`covariance_spectra`.
    """
    colours = theme_of(theme)
    figure = new_figure(width, 1.55, colours)
    axes = figure.subplots()
    bias, residual = gap.g_mu**2, gap.d_center
    whole = bias + residual
    title = f"$E\\|x-y\\|^2$ = {whole:.3f}, of it bias $\\|m_x-m_y\\|^2$ = {bias:.3f}"
    dress(axes, colours, title=title, x="share of $E\\|x-y\\|^2$, %", grid="x")
    if not whole > 0:
        undefined(axes, colours, "source and target are equal: nothing to divide")
        axes.set(xticks=[], yticks=[])
        return figure
    shares = np.array([[bias, 0.0], [residual, residual]]) / whole * 100
    axes.barh([0, 1], shares[0], height=0.55, color=colours.hues["ochre"], label="bias")
    axes.barh([0, 1], shares[1], left=shares[0], height=0.55, color=colours.muted, label="residual")
    axes.set_yticks([0, 1], ["before", "after\nmean shift"])
    axes.set(ylim=(1.5, -0.75), xlim=(0, 100))
    for row in range(2):
        middle = shares[0][row] + shares[1][row] / 2
        if shares[1][row] > 20:
            text = f"residual {shares[1][row]:.1f} %"
            axes.text(middle, row, text, ha="center", va="center", **text_style(colours, colours.background))
    bias_text = text_style(colours, colours.hues["ochre"])
    axes.text(0, -0.36, f"bias {shares[0][0]:.1f} %", ha="left", va="bottom", **bias_text)
    return figure


def residual_spectrum(gap: GapReport, *, theme: str = "light", width: float = SINGLE) -> Figure:
    """Eigenvalues of S_r against those of an isotropic residual: flat, and the Marchenko-Pastur band at this n and D.

    Eigenvalues of n isotropic residuals of this energy lie in tr S_r / D (1 -+ sqrt(D/n))^2 for large n and D; a
    spectrum that leaves the band is anisotropic. Arguments and errors as in :func:`covariance_spectra`.
    """
    colours = theme_of(theme)
    figure = new_figure(width, _HEIGHT, colours)
    axes = figure.subplots()
    value = _with_interval(gap, "a_r", f"{gap.a_r:.1f}")
    dress(
        axes, colours, title=f"$A_r$ = {value}, isotropic at n = {gap.n}: {gap.a_r_isotropic:.2f}",
        x="index of eigenvalue", y="energy of the residual",
    )  # fmt: skip
    flat = gap.d_center / gap.width
    if not flat > 0:
        undefined(axes, colours, "no residual: nothing to draw")
        return figure
    low, high = marchenko_pastur(gap.n, gap.width)
    look = Look(colours.ink, "", "-")
    series = [draw_spectrum(axes, "measured", gap.residual_spectrum, look)]
    axes.axhspan(max(low, RELATIVE_ZERO) * flat, high * flat, color=colours.muted, alpha=0.25, lw=0, label="band")
    axes.axhline(flat, color=colours.muted, lw=1, ls=(0, (3, 2)), label="isotropic")
    floor = min(value for value in gap.residual_spectrum if value > RELATIVE_ZERO * gap.residual_spectrum[0])
    axes.set_ylim(bottom=min(floor, max(low * flat, floor / 3)) / 1.5)
    series.append(Named("isotropic", Look(colours.muted, "", "--"), gap.width, flat))
    name_series(figure, axes, series, colours)
    return figure


def marchenko_pastur(rows: int, width: int) -> tuple[float, float]:
    """Edges (1 -+ sqrt(D/n))^2 of the nonzero eigenvalues of the covariance of isotropic rows of unit variance.

    Example:
        >>> marchenko_pastur(400, 100)
        (0.25, 2.25)
    """
    root = math.sqrt(width / rows)
    return (1 - root) ** 2, (1 + root) ** 2


def cumulative_energy(gap: GapReport, *, theme: str = "light", width: float = SINGLE) -> Figure:
    """E(K), the share of tr S_r in its K leading directions, against K/D; d_eff is marked.

    Arguments and errors as in :func:`covariance_spectra`.
    """
    colours = theme_of(theme)
    figure = new_figure(width, _HEIGHT, colours)
    axes = figure.subplots()
    ratio = _with_interval(gap, "d_eff_ratio", f"{gap.d_eff_ratio:.3f}")
    dress(axes, colours, title=f"$d_{{eff}}$/D = {ratio}", x=f"K leading directions of D = {gap.width}", y="E(K)")
    spectrum = np.array(gap.residual_spectrum)
    total = spectrum.sum()
    if not total > 0:
        undefined(axes, colours, "no residual: nothing to draw")
        return figure
    ranks = np.arange(gap.width + 1)
    axes.plot(ranks, np.concatenate(([0.0], spectrum.cumsum() / total)), color=colours.ink, lw=1.4, label="E(K)")
    axes.plot([0, gap.width], [0, 1], color=colours.muted, lw=1, ls=(0, (3, 2)), label="K/D")
    axes.axvline(gap.d_eff, color=colours.muted, lw=0.8, label="d_eff")
    axes.set(xlim=(0, gap.width), ylim=(0, 1.02))
    left = gap.d_eff > 0.6 * gap.width
    axes.annotate(
        f"$d_{{eff}}$ = {gap.d_eff:.0f}" if gap.d_eff >= 10 else f"$d_{{eff}}$ = {gap.d_eff:.1f}", (gap.d_eff, 0.03),
        xytext=(-3 if left else 3, 0), textcoords="offset points", ha="right" if left else "left", va="bottom",
        bbox={"facecolor": colours.background, "edgecolor": "none", "pad": 0.8}, **text_style(colours),
    )  # fmt: skip
    axes.annotate(
        "isotropic, K/D", (0.5 * gap.width, 0.5), xytext=(7, -2), textcoords="offset points", ha="left", va="top",
        bbox={"facecolor": colours.background, "edgecolor": "none", "pad": 0.8}, **text_style(colours, colours.muted),
    )  # fmt: skip
    return figure


def draw_spectrum(axes: Axes, name: str, spectrum: tuple[float, ...], look: Look) -> Named:
    """One descending spectrum; what is zero but for rounding has no logarithm."""
    values = np.array(spectrum)
    values = np.where(values > RELATIVE_ZERO * max(values.max(), np.finfo(float).tiny), values, np.nan)
    plain_log(axes, "y")
    index = np.arange(1, len(values) + 1)
    axes.plot(index, values, color=look.colour, lw=1.2, ls=look.dashes, label=name)
    label_few_decades(axes)
    axes.set_xlim(1 - 0.02 * len(values), len(values) * 1.01 + 0.1)
    last = int(np.flatnonzero(np.isfinite(values))[-1]) if np.isfinite(values).any() else None
    if last is None:
        return Named(f"{name} (undefined)", look)
    return Named(name, look, float(index[last]), float(values[last]))


def _with_interval(gap: GapReport, name: str, value: str) -> str:
    """A number, with its interval where the report has one."""
    if name not in gap.intervals:
        return value
    digits = len(value.partition(".")[2])
    low, high = gap.intervals[name]
    return f"{value} [{low:.{digits}f}, {high:.{digits}f}]"


def _powers(low: int, high: int) -> tuple[list[int], list[str]]:
    ticks = [2**power for power in range(high.bit_length() + 1) if low <= 2**power <= high] or [low]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 7))]
    return ticks, [str(tick) for tick in ticks]
