"""Phases and radii in the blocks of a frame (METHOD sections 2 to 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.diagnostics.figures.labels import POINTS, Named, height_of, legend_below, wrap
from aniso_ext.diagnostics.figures.style import (
    DOUBLE,
    FONT,
    SMALL,
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
from aniso_ext.diagnostics.phases import PhaseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_ROWS_A_BIN = 150


def phase_marginals(phases: PhaseReport, *, theme: str = "light", width: float = DOUBLE) -> Figure:
    """Density of the phase of each leading block, 1 for uniform phases, and |E e^{i theta_k}| of these blocks.

    The target is filled; the recentred source and the stand-ins are lines.

    Args:
        phases: a report of :func:`aniso_ext.diagnostics.phase_report`.
        theme: ``light`` or ``dark``.
        width: inches; 3.4 is a column of a paper, 7 are two.

    Raises:
        AnisoError: matplotlib is not installed.
        InputError: no such theme, or a width below 2.5 inches.

    Example:
        >>> import numpy as np, torch
        >>> from aniso_ext import Frame, diagnostics
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> rows = np.random.default_rng(0).normal(size=(100, 4))
        >>> len(phase_marginals(diagnostics.phase_report(rows, rows, {}, frame)).axes)
        2
    """
    colours = theme_of(theme)
    found = looks(phases.clouds, colours)
    count = len(phases.blocks)
    columns = min(count, 4 if width >= TWO_COLUMNS else 2)
    lines = math.ceil(count / columns)
    figure = new_figure(width, 1.15 * lines + 1.45, colours)
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[1.0] * lines + [1.1])
    edges = np.array(phases.bin_edges)[:: _merged(phases)]
    centres, bins = (edges[:-1] + edges[1:]) / 2, len(edges) - 1
    first: Axes | None = None
    for place, block in enumerate(phases.blocks):
        axes = figure.add_subplot(grid[place // columns, place % columns], sharex=first, sharey=first)
        first = first or axes
        dress(axes, colours, title=f"block {block}", y="density" if place % columns == 0 else "", grid="y")
        for name, cloud in phases.clouds.items():
            density, look = np.array(cloud.histograms[place]).reshape(bins, -1).sum(axis=1) * bins, found[name]
            if name == TARGET:
                axes.stairs(density, edges, color=look.colour, fill=True, alpha=0.25, lw=0, label=name)
            else:
                axes.plot(centres, density, color=look.colour, lw=0.9, ls=look.dashes, label=name)
        _angle_ticks(axes, labelled=place >= count - columns)
        if place % columns:
            axes.tick_params(labelleft=False)
    assert first is not None  # a frame has at least one block
    first.set_ylim(bottom=0)
    _concentrations(figure.add_subplot(grid[lines, :]), phases, found, colours)
    series = [Named("target (filled)" if name == TARGET else name, found[name]) for name in phases.clouds]
    legend_below(figure, series, colours, markers=True)
    return figure


def _merged(phases: PhaseReport) -> int:
    """How many bins are drawn as one, so that a bin of uniform phases holds some hundred rows: 1, 2 or 4."""
    bins = len(phases.bin_edges) - 1
    return next((step for step in (1, 2) if phases.n * step >= _ROWS_A_BIN * bins), 4)


def _angle_ticks(axes: Axes, *, labelled: bool) -> None:
    axes.set_xlim(-math.pi, math.pi)
    axes.set_xticks([-math.pi, 0, math.pi], ["−π", "0", "π"])
    axes.tick_params(labelbottom=labelled)
    if labelled:
        # the outer two belong to this panel, and would meet those of its neighbours if they were centred
        left, _, right = axes.get_xticklabels()
        left.set_horizontalalignment("left")
        right.set_horizontalalignment("right")


def _concentrations(axes: Axes, phases: PhaseReport, found: dict[str, Look], theme: Theme) -> None:
    """One column a block; methods side by side in it."""
    dress(axes, theme, x="block", y="$|E\\,e^{i\\theta}|$", grid="y")
    count, clouds = len(phases.blocks), len(phases.clouds)
    places = np.arange(count)
    for index, (name, cloud) in enumerate(phases.clouds.items()):
        shift = 0.7 * ((index + 0.5) / clouds - 0.5)
        values = cloud.concentration[:count]
        axes.plot(places + shift, values, found[name].marker, color=found[name].colour, ms=4, label=name)
    for edge in range(1, count):
        axes.axvline(edge - 0.5, color=theme.faint, lw=0.6)
    axes.set_xticks(places, [str(block) for block in phases.blocks])
    axes.set(xlim=(-0.5, count - 0.5))
    axes.set_ylim(0, max(0.05, axes.get_ylim()[1]))


def phase_couplings(phases: PhaseReport, *, theme: str = "light", width: float = DOUBLE) -> Figure:
    """|M_kl| between the leading blocks, one matrix a cloud, one scale for all; the diagonal, which is 1, is left out.

    The mark in the scale is what one pair among unrelated phases exceeds with a chance of 1 % (METHOD D5). Arguments
    and errors as in :func:`phase_marginals`.
    """
    colours = theme_of(theme)
    names = list(phases.clouds)
    columns = min(len(names), 4 if width >= TWO_COLUMNS else 2)
    lines = math.ceil(len(names) / columns)
    size = (width - 0.75) / columns
    titles = [wrap(name, size * POINTS - 12) for name in names]
    titled = height_of(titles) / POINTS
    side = min(size, 2.2)
    figure = new_figure(width, lines * (side + titled) + 0.3, colours)
    panels = figure.subplots(lines, columns, squeeze=False)
    matrices = [np.array(phases.clouds[name].coupling) for name in names]
    count = len(matrices[0])
    hidden = np.eye(count, dtype=bool)
    apart = [matrix[~hidden] for matrix in matrices]
    top = max([phases.coupling_threshold, *(values.max() for values in apart if values.size)])
    for axes, title, matrix in zip(panels.flat, titles, matrices, strict=False):
        dress(axes, colours, title=title, grid="")
        axes.imshow(np.ma.masked_array(matrix, hidden), cmap=_ramp(colours), vmin=0, vmax=top)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(True)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    bar = figure.colorbar(panels[0, 0].images[0], ax=panels, shrink=0.9, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.axhline(phases.coupling_threshold, color=colours.ink, lw=1.2)
    bar.ax.tick_params(colors=colours.muted, labelsize=SMALL, labelfontfamily=FONT, width=0.6, length=2.5)
    roomy = lines > 1 or side > 1.6
    label = f"$|M_{{kl}}|$, {count} blocks; line: chance {phases.coupling_threshold:.3f}" if roomy else "$|M_{kl}|$"
    bar.set_label(label, **text_style(colours))
    return figure


def _ramp(theme: Theme) -> Any:
    """Background to ink by way of blue: even in lightness, so that it is read with any colour vision."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(f"aniso_{theme.name}", [theme.background, theme.hues["blue"], theme.ink])


def radius_maps(phases: PhaseReport, *, theme: str = "light", width: float = DOUBLE) -> Figure:
    """T_k of the leading blocks: the target radius that each source radius is sent to, from the frame's knots.

    Dashed is the radius left as it is. Arguments and errors as in :func:`phase_marginals`.
    """
    colours = theme_of(theme)
    maps = phases.radius_maps
    columns = min(len(maps), 4 if width >= TWO_COLUMNS else 2)
    lines = math.ceil(len(maps) / columns)
    side = min(width / columns, 2.2)
    figure = new_figure(width, lines * (side + 0.2) + 0.3, colours)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    top = 1.04 * max(max(*item.source, *item.target) for item in maps)
    for place, (axes, item) in enumerate(zip(panels.flat, maps, strict=False)):
        bottom = place + columns >= len(maps)
        dress(
            axes, colours, title=f"block {item.block}", x="source radius" if bottom else "",
            y="target radius" if place % columns == 0 else "",
        )  # fmt: skip
        axes.plot(item.source, item.target, color=colours.ink, lw=1.3, label=f"block {item.block}")
        axes.plot([0, top], [0, top], color=colours.muted, lw=0.9, ls=(0, (3, 2)), label="unchanged")
        axes.set(xlim=(0, top), ylim=(0, top), aspect="equal")
        axes.tick_params(labelbottom=bottom)
        axes.locator_params(nbins=4)
        if place == 0:
            axes.annotate(
                "dashed:\nunchanged", (0.98, 0.04), xycoords="axes fraction", ha="right", va="bottom",
                **text_style(colours, colours.muted),
            )  # fmt: skip
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    return figure
