"""Where texts go: names beside what they name where that is possible, below the figure where not; never on each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        fits = max(1, next((n for n in range(len(rest), 0, -1) if text_width(plain(rest[:n]), size) <= points), 1))
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
            arrowprops={"arrowstyle": "-", "color": item.look.colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Places at least ``step`` apart, between ``low`` and ``high``, as near the wanted ones as that allows.

    Least squares under the spacing: isotonic regression of what is left when the spacing is taken off, by pooling.

    Example:
        >>> spread([0.5, 0.5], 0.2, 0.0, 1.0)
        [0.4, 0.6]
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


Box = tuple[float, float, float, float]


def name_points(figure: Figure, axes: Axes, points: Sequence[Named], theme: Theme, curves: Sequence[Any] = ()) -> None:
    """Names beside points, clear of points, curves (``[n, 2]`` data coordinates) and texts; or a legend below."""
    figure.draw_without_rendering()
    scale = figure.dpi / POINTS
    frame = axes.get_window_extent()
    places = [tuple(axes.transData.transform((item.x, item.y))) for item in points]
    blocked: list[Box] = [_around(x, y, 3.5 * scale) for x, y in places]
    for curve in curves:
        blocked += [_around(x, y, 1.5 * scale) for x, y in _dense(axes.transData.transform(curve), 3 * scale)]
    blocked += [tuple(text.get_window_extent().extents) for text in axes.texts]
    found = []
    for item, (x, y) in zip(points, places, strict=True):
        box = _free_box(x, y, text_width(plain(item.text)) * scale, LINE * SMALL * scale, frame.extents, blocked, scale)
        if box is None:
            legend_below(figure, points, theme, markers=True)
            return
        blocked.append(box)
        found.append(box)
    for item, (x, y), box in zip(points, places, found, strict=True):
        centre = ((box[0] + box[2]) / 2 - x) / scale, ((box[1] + box[3]) / 2 - y) / scale
        near = math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3])) < 9 * scale
        axes.annotate(
            plain(item.text), xy=(item.x, item.y), xytext=centre, textcoords="offset points", ha="center", va="center",
            **text_style(theme, item.look.colour),
            arrowprops=None if near else {"arrowstyle": "-", "color": item.look.colour, "lw": 0.5, "shrinkB": 3},
        )  # fmt: skip


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _dense(corners: Any, step: float) -> list[tuple[float, float]]:
    """Points along a polygon, at most ``step`` apart."""
    found: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in zip(corners[:-1], corners[1:], strict=True):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / step)) if math.isfinite(x0 + x1 + y0 + y1) else 0
        found += [(x0 + (x1 - x0) * part / count, y0 + (y1 - y0) * part / count) for part in range(count + 1 if count else 0)]
    return found


def _free_box(
    x: float, y: float, width: float, height: float, frame: Sequence[float], blocked: Sequence[Box], scale: float
) -> Box | None:
    """The nearest place for a text of this size beside (x, y) that nothing blocks, pixels."""
    for distance in (5, 9, 14, 20, 28, 38, 50):
        for angle in (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 200, 340):
            right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            middle = x + right * (distance * scale + width / 2), y + up * (distance * scale + height / 2)
            box = (middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2)
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(_overlap(box, other) for other in blocked):
                return box
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
