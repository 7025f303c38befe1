"""How far a number would move with other pairs: bootstrap intervals of what single pairs add to it.

Every number is a function of means over pairs, or is made one by its first-order expansion: beside its value, each pair
has a contribution, and the n contributions are redrawn with multinomial weights (Efron's bootstrap). Neighbours,
eigenvectors and products are computed once, and no copy of a row ever becomes its own neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

LEVEL = 0.95


class Interval(NamedTuple):
    """Bounds of a number that 95 % of the resampled sets of pairs keep."""

    low: float
    high: float


class Resampler:
    """Seeded weights of ``resamples`` draws of ``count`` rows with replacement, for one piece of rows after another.

    The rows of a piece share a binomial part of the draws that are left, so weights are exactly multinomial and no
    [resamples, N] matrix exists.
    """

    def __init__(self, resamples: int, count: int, seed: int, device: torch.device) -> None:
        self.resamples = resamples
        self._rows = count
        self._draws = torch.full((resamples,), float(count), dtype=torch.float64, device=device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def weights(self, rows: int) -> torch.Tensor:
        """[resamples, rows] float64, how often each of the next ``rows`` rows is drawn."""
        share = torch.full_like(self._draws, rows / self._rows)
        taken = self._draws if rows == self._rows else torch.binomial(self._draws, share, generator=self._generator)
        self._rows -= rows
        self._draws = self._draws - taken
        most = int(taken.max())
        device = taken.device
        drawn = torch.randint(rows, (self.resamples, most), generator=self._generator, device=device)
        counted = (torch.arange(most, device=device) < taken.unsqueeze(1)).double()
        return torch.zeros(self.resamples, rows, dtype=torch.float64, device=device).scatter_add_(1, drawn, counted)


def resampled_means(
    parts: Iterator[torch.Tensor], count: int, *, resamples: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of all rows [m] and of resampled ones [resamples, m] of float64 rows [count, m] that come in pieces."""
    resampler: Resampler | None = None
    for part in parts:
        if resampler is None:
            resampler = Resampler(resamples, count, seed, part.device)
            total = torch.zeros(part.shape[1], dtype=torch.float64, device=part.device)
            drawn = torch.zeros(resamples, part.shape[1], dtype=torch.float64, device=part.device)
        total += part.sum(dim=0)
        drawn.addmm_(resampler.weights(part.shape[0]), part)
    assert resampler is not None
    return total / count, drawn / count


def percentile_interval(values: torch.Tensor, low: float = -math.inf, high: float = math.inf) -> Interval:
    """Bounds of the middle 95 % of resampled values, within what the number can be; NaN when none is defined."""
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64, device=values.device)
    bounds = values.nanquantile(tails).clamp(low, high).tolist()
    return Interval(*bounds)


def length_interval(squares: torch.Tensor, square: float, bias: float = 0.0) -> Interval:
    """Interval of a length from its square and resampled squares, which may exceed ``square`` by ``bias`` on average.

    Noise lengthens a vector of means, and the noise of resampling lengthens it again: what resampling adds is taken off
    (the basic bootstrap, on squares). A length that is nothing but noise has an interval that reaches 0.
    """
    middle = percentile_interval(squares)
    return Interval(*(math.sqrt(max(0.0, 2 * square - bound - bias)) for bound in (middle.high, middle.low)))


def widened(interval: Interval, value: float, error: float) -> Interval:
    """The interval around ``value`` with an independent error of that standard deviation added."""
    extra = 1.96 * error
    return Interval(value - math.hypot(value - interval.low, extra), value + math.hypot(interval.high - value, extra))


def defined(report: object, intervals: dict[str, Interval]) -> dict[str, Interval]:
    """Those whose bounds, and whose numbers in the report, are defined."""
    return {
        name: bounds for name, bounds in intervals.items() if all(map(math.isfinite, (*bounds, getattr(report, name))))
    }
