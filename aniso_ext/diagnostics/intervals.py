"""How far a number would move with other pairs."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """Bounds of a number that 95 % of the resampled sets of pairs keep."""

    low: float
    high: float
