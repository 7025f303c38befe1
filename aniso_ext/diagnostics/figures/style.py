"""How the figures look: two themes, one look a method, sizes that can be read in a column of a paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

from aniso_ext.errors import AnisoError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = "DejaVu Sans"
"""Comes with matplotlib, so figures are the same everywhere."""
SMALL, LARGE = 7.0, 8.0
SINGLE, DOUBLE = 3.4, 7.0
"""Widths of one and of two columns of a paper, inches."""
NARROWEST = 2.5
TWO_COLUMNS = 5.0
"""From this width on a figure has room for panels side by side."""
_PAD = 0.04


@dataclass(frozen=True)
class Theme:
    """Colours of a background: ``ink`` for targets and text, ``muted`` for what is compared with, ``faint`` for grids.

    ``hues`` are after Okabe and Ito, told apart with any colour vision; each has a contrast of at least 3 to 1.
    """

    name: str
    background: str
    ink: str
    muted: str
    faint: str
    hues: Mapping[str, str]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1a1a1a",
    muted="#595959",
    faint="#e3e3e3",
    hues={
        "blue": "#0072b2",
        "vermilion": "#d55e00",
        "green": "#009e73",
        "brown": "#6b4a00",
        "pink": "#cc6fa6",
        "plum": "#6d1a6b",
        "pine": "#00493a",
        "grey": "#6f7378",
        "wine": "#9c1f2e",
        "navy": "#23307f",
        "ochre": "#a98600",
    },
)
DARK = Theme(
    name="dark",
    background="#16181d",
    ink="#ececec",
    muted="#a9adb5",
    faint="#33373f",
    hues={
        "blue": "#56b4e9",
        "vermilion": "#e8641b",
        "green": "#12a67c",
        "brown": "#f7d774",
        "pink": "#c765a0",
        "plum": "#ffc4ee",
        "pine": "#8cf5b4",
        "grey": "#b0b5bd",
        "wine": "#ff9aa2",
        "navy": "#8f9bff",
        "ochre": "#c9a400",
    },
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


@dataclass(frozen=True)
class Look:
    """How one cloud or method is drawn: the marker and the dashes say without colour what the colour says."""

    colour: str
    marker: str
    dashes: Any


_DASHES: dict[str, Any] = {"solid": "-", "long": (0, (5, 1.5)), "short": (0, (2, 1)), "mixed": (0, (5, 1, 1, 1))}
_FORMS = {
    "vermilion": ("o", "solid"),
    "green": ("s", "long"),
    "brown": ("^", "short"),
    "pink": ("D", "mixed"),
    "plum": ("v", "long"),
    "pine": ("P", "short"),
    "grey": ("X", "mixed"),
    "wine": ("h", "solid"),
    "navy": ("<", "long"),
    "ochre": (">", "short"),
}
_OWN = {
    "anisoalign": "vermilion",
    "anisoalign_closed_form": "wine",
    "realign": "green",
    "mean_shift": "brown",
    "c3_code": "pink",
    "c3_paper": "plum",
    "gaussian_monge": "pine",
    "permuted": "grey",
    "unicorn": "navy",
    "per_dim_std": "ochre",
}
TARGET, SOURCE, IDENTITY = "target", "source", "identity"


def theme_of(name: str) -> Theme:
    """The theme of a name.

    Raises:
        InputError: there is none of this name.
    """
    if name not in THEMES:
        raise InputError(f"theme must be one of {', '.join(THEMES)}, got {name!r}")
    return THEMES[name]


def looks(names: Iterable[str], theme: Theme) -> dict[str, Look]:
    """One look for each name, the same in every figure.

    The target, the source (which ``identity`` leaves as it is) and the project's methods have looks of their own. Any
    other name takes one that is left, chosen by the name; it depends on the set of names and not on their order.

    Example:
        >>> looks(["realign", "mine"], LIGHT)["realign"].colour == LIGHT.hues["green"]
        True
    """
    found: dict[str, Look] = {}
    others: list[str] = []
    for name in dict.fromkeys(names):
        key = name.lower().replace("-", "_").replace(" ", "_")
        if key == TARGET:
            found[name] = Look(theme.ink, "*", "-")
        elif key in (SOURCE, IDENTITY):
            found[name] = Look(theme.hues["blue"], "d", "-")
        elif key in _OWN:
            found[name] = _look(_OWN[key], theme)
        else:
            others.append(name)
    taken = {_OWN[key] for name in found if (key := name.lower().replace("-", "_").replace(" ", "_")) in _OWN}
    for name in sorted(others):
        # grey last: it is near the colour of what is compared with
        free = [hue for hue in _FORMS if hue not in (*taken, "grey")] or [hue for hue in _FORMS if hue not in taken]
        free = free or list(_FORMS)
        hue = free[crc32(name.encode()) % len(free)]
        taken.add(hue)
        found[name] = _look(hue, theme)
    return found


def _look(hue: str, theme: Theme) -> Look:
    marker, dashes = _FORMS[hue]
    return Look(theme.hues[hue], marker, _DASHES[dashes])


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure, inches, on the theme's opaque background; it belongs to no display and to no global state.

    Raises:
        AnisoError: matplotlib is not installed.
        InputError: the width leaves no room for text.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise AnisoError("figures need matplotlib: install the extra `plots`") from None
    if not width >= NARROWEST:
        raise InputError(f"width = {width:g} inches must be at least {NARROWEST:g}: narrower figures cannot be read")
    figure = Figure(
        figsize=(width, height),
        dpi=200,
        facecolor=theme.background,
        layout=ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD, wspace=0.03, hspace=0.03),
    )
    FigureCanvasAgg(figure)
    return figure


def dress(
    axes: Axes, theme: Theme, *, title: str = "", x: str = "", y: str = "", grid: Literal["x", "y", "both", ""] = "both"
) -> None:
    """Titles, ticks, spines and grid in the theme's colours; ``grid`` is ``x``, ``y``, ``both`` or empty."""
    axes.set_facecolor(theme.background)
    axes.set_xlabel(x, fontsize=LARGE, family=FONT, color=theme.ink)
    axes.set_ylabel(y, fontsize=LARGE, family=FONT, color=theme.ink)
    if title:
        axes.set_title(title, fontsize=SMALL, family=FONT, color=theme.ink, loc="left", pad=4)
    axes.tick_params(
        which="both", colors=theme.muted, labelsize=SMALL, labelfontfamily=FONT, width=0.6, length=2.5, direction="out"
    )
    axes.tick_params(which="minor", length=1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(fontsize=SMALL, family=FONT, color=theme.muted)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
        spine.set_linewidth(0.6)
    axes.grid(False)
    if grid:
        axes.grid(True, which="major", axis=grid, color=theme.faint, linewidth=0.5, linestyle="-")
    axes.set_axisbelow(True)


def plain_log(axes: Axes, axis: str) -> None:
    """A logarithmic axis without labels between the powers of ten, and with few of those."""
    from matplotlib.ticker import LogLocator, NullFormatter

    chosen = axes.xaxis if axis == "x" else axes.yaxis
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    chosen.set_major_locator(LogLocator(base=10, numticks=6))
    chosen.set_minor_formatter(NullFormatter())


def label_few_decades(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade on a logarithmic y axis that spans less than two."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axes.get_ylim()
    if low > 0 and high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def text_style(theme: Theme, colour: str | None = None, size: float = SMALL) -> dict[str, Any]:
    """Keywords of a text inside a panel."""
    return {"fontsize": size, "family": FONT, "color": theme.ink if colour is None else colour}


def undefined(axes: Axes, theme: Theme, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", **text_style(theme, theme.muted))
