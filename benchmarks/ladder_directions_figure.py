"""The figure of ladder_directions.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aniso_ext.diagnostics.figures.style import theme_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA = "fashion44k"
SHAPES = {
    "isotropic": ("grey", "o"),
    "target covariance": ("brown", "v"),
    "unpaired residual": ("blue", "s"),
    "paired residual (oracle)": ("vermilion", "^"),
}
Rows = list[dict[str, Any]]


def select(found: Rows, **wanted: Any) -> Rows:
    """Lines of the data set of the figure whose columns have these values."""
    return [row for row in found if row["data"] == DATA and all(row.get(key) == value for key, value in wanted.items())]


def draw(found: Rows) -> Figure:
    """Parts that were exchanged, error by eigendirection, and the noise by its shape, for AnisoAlign on fashion44k."""
    import matplotlib.pyplot as plt

    figure, (parts, bands, noise) = plt.subplots(
        1, 3, figsize=(13.5, 4.6), gridspec_kw={"width_ratios": [1.25, 1, 1.2]}, layout="constrained"
    )
    draw_parts(parts, found)
    draw_bands(bands, found)
    draw_noise(noise, found)
    for axes in (parts, bands, noise):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    return figure


def draw_parts(axes: Axes, found: Rows) -> None:
    """Accuracy of the attributes with a part of the stand-ins true, and with a part of the images wrong."""
    hues = theme_of("light").hues
    replaced = {row["variant"]: row for row in select(found, part="replaced", chosen=True)}
    spoiled = {row["variant"]: row for row in select(found, part="spoiled", chosen=True)}
    names = list(replaced)[::-1]
    places = range(len(names))
    values = [100 * replaced[name]["test_attributes"] for name in names]
    axes.plot(values, places, "s", color=hues["blue"], label="stand-ins, this part true")
    values = [100 * spoiled[name]["test_attributes"] for name in names]
    axes.plot(values, places, "o", color=hues["vermilion"], mfc="none", label="images, this part wrong")
    for arm, style in (("anisoalign", "--"), ("images", ":")):
        for row in select(found, part="ladder", arm=arm, reader="linear", chosen=True):
            axes.axvline(100 * row["test_attributes"], color="black", ls=style, lw=1, label=arm)
    axes.set_yticks(places, names)
    axes.set_xlabel("attributes right, % (linear reader)")
    axes.set_title("Which part costs what")
    axes.grid(axis="x", color="#e3e3e3")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.35, -0.14), ncols=2, frameon=False)


def draw_bands(axes: Axes, found: Rows) -> None:
    """Energy of target and error, and the correlation of the two sides, by eigendirection of the target."""
    hues = theme_of("light").hues
    rows = select(found, part="spectrum", arm="anisoalign")
    places = range(len(rows))
    names = [row["variant"] for row in rows]
    axes.bar([place - 0.2 for place in places], [row["target_energy"] for row in rows], 0.4, color=hues["grey"])
    axes.bar([place + 0.2 for place in places], [row["error_energy"] for row in rows], 0.4, color=hues["ochre"])
    axes.plot(places, [row["correlation"] for row in rows], "s-", color=hues["blue"])
    axes.set_xticks(places, names, fontsize=8)
    axes.set_xlabel("eigendirections of the images")
    axes.set_ylim(0, 1)
    axes.set_title("Where the error is")
    axes.legend(
        ["correlation with the stand-in", "energy of images", "energy of the error"],
        fontsize=8, loc="upper right", frameon=False,
    )  # fmt: skip


def draw_noise(axes: Axes, found: Rows) -> None:
    """Accuracy against the level of the noise, for its shapes; lines are the linear reader, dashes networks."""
    hues = theme_of("light").hues
    for reader, style in (("linear", "-"), ("network", "--")):
        for name, (hue, mark) in SHAPES.items():
            rows = select(found, part="noise", arm="anisoalign", reader=reader, variant=name)
            if rows:
                levels = [row["level"] for row in rows]
                values = [100 * row["test_attributes"] for row in rows]
                label = name if reader == "linear" else f"{name}, network"
                axes.plot(levels, values, style, marker=mark, ms=4, color=hues[hue], label=label)
    for reader, part, name in (("linear", "ladder", "images"), ("network", "noise", "images, network")):
        for row in select(found, part=part, arm="images", reader=reader, chosen=True):
            style = ":" if reader == "linear" else "-."
            axes.axhline(100 * row["test_attributes"], color="black", ls=style, lw=1, label=name)
    axes.set_ylim(64, 79)
    axes.set_xlabel("noise in each coordinate")
    axes.set_ylabel("attributes right, %")
    axes.set_title("Noise on AnisoAlign's stand-ins, by shape")
    axes.grid(color="#e3e3e3")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
