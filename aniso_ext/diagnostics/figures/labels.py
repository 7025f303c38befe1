"""Where texts go: names beside what they name if there is room, below the figure if not, and never on each other."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from aniso_ext.diagnostics.figures.placement import NEAR, Box, Room
from aniso_ext.diagnostics.figures.style import FONT, SMALL, Look, Theme, text_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 72.0
LINE = 1.3
"""Height of a line of text over its size."""
_WIDEST_SIDE = 0.3
_HANDLE = 34.0
_BREAKS = " _-/,."


@dataclass(frozen=True)
class Named:
    """What a label names: its text, its look, and the data coordinates of the end of its line."""

    text: str
    look: Look
    x: float = math.nan
    y: float = math.nan


def plain(text: str) -> str:
    """A name as it is: a dollar sign in it starts no formula."""
    return text.replace("$", r"\$")


@lru_cache(maxsize=1024)
def text_width(text: str, size: float = SMALL) -> float:
    """Width in points of the widest line of a text."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family=FONT)
    lines = [line for line in text.split("\n") if line.strip()]
    return max((float(TextPath((0, 0), line, size=size, prop=font).get_extents().x1) for line in lines), default=0.0)


def wrap(text: str, points: float, size: float = SMALL) -> str:
    """A name in lines of at most ``points``, broken after blanks and signs, inside a word only where it must be."""
    lines, rest = [], text
    while rest and text_width(plain(rest), size) > points:
        fits = max(1, bisect_right(range(len(rest) + 1), points, key=lambda n: text_width(plain(rest[:n]), size)) - 1)
        at = max((place + 1 for place in range(fits) if rest[place] in _BREAKS), default=fits)
        lines.append(rest[:at].rstrip(" "))
        rest = rest[at:].lstrip(" ")
    return plain("\n".join([*lines, rest] if rest else lines))


def height_of(texts: Sequence[str], size: float = SMALL) -> float:
    """Height in points of the tallest of some texts."""
    return LINE * size * max((text.count("\n") + 1 for text in texts), default=1)


def category_labels(axes: Axes, names: Sequence[str], theme: Theme, points: float) -> None:
    """Names along the y axis, first on top."""
    texts = [wrap(name, points) for name in names]
    axes.set_yticks(range(len(names)), texts)
    for label in axes.get_yticklabels():
        label.set_color(theme.ink)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.45, -0.55)


def row_height(names: Sequence[str], points: float, least: float) -> float:
    """Inches that one row of :func:`category_labels` takes."""
    return max(least, height_of([wrap(name, points) for name in names]) + 3) / POINTS


def name_series(figure: Figure, axes: Axes, series: Sequence[Named], theme: Theme) -> None:
    """Names of lines: at their right ends if they fit there, else in a legend below, for which the figure grows."""
    wide = max((text_width(plain(item.text)) for item in series), default=0.0)
    figure.draw_without_rendering()
    room = axes.get_window_extent().height / figure.dpi * POINTS
    ends = all(math.isfinite(item.x) and math.isfinite(item.y) for item in series)
    fits = wide <= _WIDEST_SIDE * figure.get_figwidth() * POINTS and len(series) * LINE * SMALL <= 0.95 * room
    if not (ends and fits):
        legend_below(figure, series, theme)
        return
    step = LINE * SMALL / room
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((item.x, item.y))[1]) for item in series]
    for item, place in zip(series, spread(wanted, step, step / 2, 1 - step / 2), strict=True):
        axes.annotate(
            plain(item.text), xy=(item.x, item.y), xytext=(1.05, place), textcoords="axes fraction", va="center",
            ha="left", annotation_clip=False, **text_style(theme, item.look.colour),
            arrowprops=_line(item.look, shrinkA=1, shrinkB=0, relpos=(0, 0.5)),
        )  # fmt: skip


def _line(look: Look, **options: Any) -> dict[str, Any]:
    """A leader from a text to what it names."""
    return {"arrowstyle": "-", "color": look.colour, "lw": 0.5, **options}


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Places at least ``step`` apart, between ``low`` and ``high``, as near the wanted ones as that allows.

    Least squares under the spacing: isotonic regression of what is left when the spacing is taken off, by pooling.

    Example:
        >>> spread([0.5, 0.5], 0.25, 0.0, 1.0)
        [0.375, 0.625]
    """
    order = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    high = max(high, low + step * (len(wanted) - 1))
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([min(max(wanted[index], low), high) - rank * step, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, n), (second, m) = pools[-2:]
            pools[-2:] = [[(first * n + second * m) / (n + m), n + m]]
    levels = [level for level, count in pools for _ in range(int(count))]
    last = high - step * (len(wanted) - 1)
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = min(max(levels[rank], low), last) + rank * step
    return places


def legend_below(figure: Figure, series: Sequence[Named], theme: Theme, *, markers: bool = False) -> None:
    """A legend of the whole figure below it, in as many columns as fit; the figure grows by its height."""
    from matplotlib.lines import Line2D

    room = figure.get_figwidth() * POINTS - 12
    texts = [wrap(item.text, room - _HANDLE) for item in series]
    columns = max(1, min(len(series), int(room // (max(map(text_width, texts)) + _HANDLE))))
    handles = [
        Line2D(
            [], [], color=item.look.colour, linewidth=0 if markers else 1.2, linestyle=item.look.dashes, label=text,
            marker=item.look.marker if markers else None, markersize=5,
        )
        for item, text in zip(series, texts, strict=True)
    ]  # fmt: skip
    lines = math.ceil(len(series) / columns) * (height_of(texts) + 2) + 8
    figure.set_figheight(figure.get_figheight() + lines / POINTS)
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, labelcolor=theme.ink, handlelength=2.2,
        borderpad=0.2, borderaxespad=0.2, labelspacing=0.35, columnspacing=1.2, handletextpad=0.6,
        prop={"family": FONT, "size": SMALL},
    )  # fmt: skip


def name_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[Named],
    theme: Theme,
    *,
    curves: Sequence[Any] = (),
    notes: Sequence[Named] = (),
) -> None:
    """Names beside points, clear of points, curves (``[n, 2]`` data coordinates) and each other; or a legend below.

    ``notes``, whose texts may be formulas, are written where there is room for them, and not otherwise.
    """
    named = [replace(item, text=plain(item.text)) for item in points]
    room = _room(figure, axes, named, curves)
    boxes = [_find(axes, room, item) for item in named]
    if None in boxes:
        legend_below(figure, points, theme, markers=True)
        room, named, boxes = _room(figure, axes, named, curves), [], []
    for item in (*named, *notes):
        box = boxes.pop(0) if boxes else _find(axes, room, item)
        if box is not None:
            _write(axes, item, box, room.scale, theme)


def _room(figure: Figure, axes: Axes, points: Sequence[Named], curves: Sequence[Any]) -> Room:
    """What is free in a panel with these points and curves, as it is laid out now."""
    figure.draw_without_rendering()
    left, bottom, right, top = axes.get_window_extent().extents
    room = Room((left, bottom, right, top), figure.dpi / POINTS)
    for item in points:
        room.block_point(*axes.transData.transform((item.x, item.y)))
    for curve in curves:
        room.block_curve(axes.transData.transform(curve))
    return room


def _find(axes: Axes, room: Room, item: Named) -> Box | None:
    x, y = axes.transData.transform((item.x, item.y))
    return room.take(x, y, (text_width(item.text) * room.scale, LINE * SMALL * room.scale))


def _write(axes: Axes, item: Named, box: Box, scale: float, theme: Theme) -> None:
    x, y = axes.transData.transform((item.x, item.y))
    centre = ((box[0] + box[2]) / 2 - x) / scale, ((box[1] + box[3]) / 2 - y) / scale
    near = math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3])) < NEAR * scale
    axes.annotate(
        item.text, xy=(item.x, item.y), xytext=centre, textcoords="offset points", ha="center", va="center",
        **text_style(theme, item.look.colour), arrowprops=None if near else _line(item.look, shrinkA=0, shrinkB=3),
    )  # fmt: skip
