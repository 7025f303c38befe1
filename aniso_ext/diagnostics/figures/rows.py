"""Single rows: where the clouds lie, and how far methods move what they are given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from aniso_ext.diagnostics.corrections import CorrectionReport, Realised, Sizes
from aniso_ext.diagnostics.figures.labels import POINTS, height_of, wrap
from aniso_ext.diagnostics.figures.style import (
    DOUBLE,
    FONT,
    LARGE,
    TARGET,
    TWO_COLUMNS,
    Look,
    Theme,
    dress,
    looks,
    new_figure,
    text_style,
    theme_of,
)
from aniso_ext.diagnostics.projection import ProjectionReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def joint_projection(projection: ProjectionReport, *, theme: str = "light", width: float = DOUBLE) -> Figure:
    """Each cloud on top of the targets, in the plane of the two leading principal axes of all of them.

    Panels share their axes and show the same pairs.

    Args:
        projection: a report of :func:`aniso_ext.diagnostics.projection`.
        theme: ``light`` or ``dark``.
        width: inches; 3.4 is a column of a paper, 7 are two.

    Raises:
        AnisoError: matplotlib is not installed.
        InputError: no such theme, or a width below 2.5 inches.

    Example:
        >>> import numpy as np
        >>> from aniso_ext import diagnostics
        >>> rows = np.random.default_rng(0).normal(size=(100, 4))
        >>> len(joint_projection(diagnostics.projection(rows, -rows, {"same": rows})).axes)
        2
    """
    colours = theme_of(theme)
    found = looks(projection.coordinates, colours)
    clouds = [name for name in projection.coordinates if name != TARGET]
    columns = min(len(clouds), 4 if width >= TWO_COLUMNS else 2)
    lines = math.ceil(len(clouds) / columns)
    side = min((width - 0.4) / columns, 2.6)
    titles = [wrap(name, side * POINTS - 12) for name in clouds]
    titled = height_of(titles) / POINTS
    figure = new_figure(width, lines * (0.9 * side + titled) + 0.55, colours)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    target = np.array(projection.coordinates[TARGET])
    size = min(9.0, max(1.5, 2500 / len(target)))
    for place, (axes, name, title) in enumerate(zip(panels.flat, clouds, titles, strict=False)):
        dress(axes, colours, grid="")
        axes.set_title(title, loc="left", pad=4, **text_style(colours, found[name].colour))
        for cloud, colour in ((target, colours.muted), (np.array(projection.coordinates[name]), found[name].colour)):
            axes.scatter(*cloud.T, s=size, color=colour, alpha=0.45, linewidths=0, rasterized=True)
        axes.tick_params(labelbottom=place + columns >= len(clouds), labelleft=place % columns == 0)
        axes.locator_params(nbins=4)
    for axes in panels.flat[len(clouds) :]:
        axes.set_visible(False)
    first, second = projection.explained
    label = {"fontsize": LARGE, "family": FONT, "color": colours.ink}
    figure.supxlabel(f"axis 1, {_share(first)} of the variance (grey: target)", **label)
    figure.supylabel(f"axis 2, {_share(second)}", **label)
    return figure


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "undefined share"


def correction_sizes(corrections: CorrectionReport, *, theme: str = "light", width: float = DOUBLE) -> Figure:
    """How far each method moves its rows: histograms of length and angle, and of the refinement beside its bound.

    Each histogram fills its panel; the line in it is the median. Arguments and errors as in :func:`joint_projection`,
    with a report of :func:`aniso_ext.diagnostics.corrections`.
    """
    colours = theme_of(theme)
    names = list(corrections.lengths)
    found = looks(names, colours)
    room = (0.2 if width >= TWO_COLUMNS else 0.26) * width * POINTS
    titles = [wrap(name, room) for name in names]
    refined = list(corrections.realised)
    height = max(26.0, height_of(titles) + 5) / POINTS
    heights = [height] * len(names) + ([0.55 * height] + [height] * len(refined) if refined else [])
    lines = len(heights)
    figure = new_figure(width, lines * height + (1.0 if refined else 0.5), colours)
    grid = figure.add_gridspec(lines, 2, height_ratios=heights)
    columns = (
        (corrections.length_edges, corrections.lengths, "$\\|z-y\\|$"),
        (corrections.angle_edges, corrections.angles, "angle, degrees"),
    )
    for column, (edges, sizes, label) in enumerate(columns):
        for row, name in enumerate(names):
            axes = figure.add_subplot(grid[row, column])
            title = titles[row] if column == 0 else ""
            _histogram(axes, edges, sizes[name], found[name], colours, title, label if row == len(names) - 1 else "")
    for row, name in enumerate(refined, start=len(names) + 1):
        axes = figure.add_subplot(grid[row, :])
        last = name == refined[-1]
        label = "refinement $\\|z-z_0\\|$" if last else ""
        _histogram(
            axes, corrections.realised_edges, corrections.realised[name].sizes, found[name], colours,
            titles[names.index(name)], label,
        )  # fmt: skip
        _bound(axes, corrections.realised[name], corrections.realised_edges, colours)
    return figure


def _histogram(
    axes: Axes, edges: Sequence[float], sizes: Sizes, look: Look, theme: Theme, title: str, label: str
) -> None:
    dress(axes, theme, x=label, grid="x")
    axes.stairs(sizes.shares, edges, fill=True, color=look.colour, lw=0)
    axes.spines["left"].set_visible(False)
    axes.set(yticks=[], xlim=(edges[0], edges[-1] * 1.02), ylim=(0, 1.08 * max(max(sizes.shares), 1e-9)))
    axes.tick_params(labelbottom=bool(label))
    if title:
        axes.set_ylabel(title, rotation=0, ha="right", va="center", **text_style(theme))
    if math.isfinite(sizes.median):
        axes.axvline(sizes.median, color=theme.ink, lw=0.8, label="median")
    else:
        axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", va="center", **text_style(theme))


def _bound(axes: Axes, realised: Realised, edges: Sequence[float], theme: Theme) -> None:
    if realised.bound is None:
        return
    axes.axvline(realised.bound, color=theme.ink, lw=1, ls=(0, (3, 2)), label="bound")
    left = realised.bound > 0.5 * edges[-1]
    axes.annotate(
        f"bound {realised.bound:.3f}", (realised.bound, 0.55), xycoords=("data", "axes fraction"),
        xytext=(-3 if left else 3, 0), textcoords="offset points", ha="right" if left else "left", va="center",
        **text_style(theme),
    )  # fmt: skip
