"""Room for texts beside points: greedy, in pixels, around everything that is drawn."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""
NEAR = 9.0
"""Points from a mark up to which its text needs no leader."""
_DISTANCES = (5, 9, 14, 20, 28, 38, 50, 64, 80)
_ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 20, 160, 200, 340, 65, 115, 245, 295)


class Room:
    """What is free within a frame; ``scale`` is pixels a point. Every text that is placed takes its own room.

    Example:
        >>> room = Room((0, 0, 200, 100), 1.0)
        >>> room.take(100, 50, (40, 10))
        (105.0, 45.0, 145.0, 55.0)
        >>> room.take(100, 50, (40, 10))
        (55.0, 45.0, 95.0, 55.0)
        >>> room.take(100, 50, (300, 10)) is None
        True
    """

    def __init__(self, frame: Box, scale: float) -> None:
        self.frame, self.scale = frame, scale
        self._blocked: list[Box] = []
        self._texts: list[Box] = []

    def block_point(self, x: float, y: float) -> None:
        """A mark, which no text may cover."""
        self._blocked.append(_around(x, y, 3.5 * self.scale))

    def block_curve(self, corners: Any) -> None:
        """A line through corners ``[n, 2]``; parts that are not finite are not there."""
        self._blocked += [_around(x, y, 1.5 * self.scale) for x, y in _dense(corners, 3 * self.scale)]

    def take(self, x: float, y: float, size: tuple[float, float]) -> Box | None:
        """The nearest place for a text of this size beside (x, y), with a leader that meets no text; None if full."""
        for distance in _DISTANCES:
            for angle in _ANGLES:
                box = self._beside(x, y, size, distance * self.scale, math.radians(angle))
                if not self._inside(box) or any(_overlap(box, other) for other in self._blocked):
                    continue
                leader = self._leader(x, y, box)
                if not any(_overlap(piece, text) for piece in leader for text in self._texts):
                    self._texts.append(box)
                    self._blocked += [box, *leader]
                    return box
        return None

    @staticmethod
    def _beside(x: float, y: float, size: tuple[float, float], distance: float, angle: float) -> Box:
        across = x + math.cos(angle) * (distance + size[0] / 2)
        up = y + math.sin(angle) * (distance + size[1] / 2)
        return across - size[0] / 2, up - size[1] / 2, across + size[0] / 2, up + size[1] / 2

    def _inside(self, box: Box) -> bool:
        left, bottom, right, top = self.frame
        return box[0] >= left and box[1] >= bottom and box[2] <= right and box[3] <= top

    def _leader(self, x: float, y: float, box: Box) -> list[Box]:
        """The line from a mark towards the middle of its text, outside of both."""
        line = _dense([(x, y), ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)], 2 * self.scale)
        outside = [(a, b) for a, b in line if math.hypot(a - x, b - y) > 4 * self.scale]
        return [piece for a, b in outside if not _overlap(piece := _around(a, b, 0.5 * self.scale), box)]


def _around(x: float, y: float, reach: float) -> Box:
    return x - reach, y - reach, x + reach, y + reach


def _dense(corners: Any, step: float) -> list[tuple[float, float]]:
    """Points along a polygon, at most ``step`` apart."""
    found: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / step)) if math.isfinite(x0 + x1 + y0 + y1) else 0
        shares = [part / count for part in range(count + 1)] if count else []
        found += [(x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for share in shares]
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
