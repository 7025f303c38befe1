"""Figures as pictures inside a page: both themes, a narrow form of the wide ones, no file and no address."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Draw = Callable[[str, float], Figure]

SINGLE, DOUBLE, NARROW = 3.4, 7.0, 3.4
LARGEST_SVG = 60_000
"""Bytes; a figure of more shapes than that is smaller as pixels."""
PIXELS_PER_INCH = 280
CSS_PIXELS_PER_INCH = 140
COLOURS = 128
PHONE = "(max-width: 40rem)"
DARK = "(prefers-color-scheme: dark)"


@dataclass(frozen=True)
class Source:
    """One form of a picture, and when it is taken."""

    media: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """A figure: ``alt`` says in words what it shows, ``caption`` how to read it."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    wide: bool
    sources: tuple[Source, ...]


def picture(draw: Draw, *, alt: str, caption: str, wide: bool = False, dense: bool = False) -> Picture:
    """Draw a figure by ``draw(theme, inches)`` in both themes, and a wide one also for narrow screens.

    A ``dense`` one has so many shapes that it is kept as pixels without trying.
    """
    full = DOUBLE if wide else SINGLE
    sources = []
    if wide:
        sources.append(_source(f"{PHONE} and {DARK}", draw("dark", NARROW), dense))
        sources.append(_source(PHONE, draw("light", NARROW), dense))
    sources.append(_source(DARK, draw("dark", full), dense))
    plain = _source("", draw("light", full), dense)
    return Picture(plain.uri, plain.width, plain.height, alt, caption, wide, tuple(sources))


def _source(media: str, figure: Figure, dense: bool) -> Source:
    drawn, kind = b"" if dense else _svg(figure), "svg+xml"
    if dense or len(drawn) > LARGEST_SVG:
        pixels = _png(figure)
        if dense or len(pixels) < len(drawn):
            drawn, kind = pixels, "png"
    # a figure may have grown while it was drawn, to make room for its legend
    width, height = (round(side * CSS_PIXELS_PER_INCH) for side in figure.get_size_inches())
    return Source(media, f"data:image/{kind};base64,{base64.b64encode(drawn).decode('ascii')}", width, height)


def _svg(figure: Figure) -> bytes:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "aniso_ext"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    from PIL import Image

    buffer, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, facecolor=figure.get_facecolor())
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(smaller, format="PNG", optimize=True)
    return smaller.getvalue()
