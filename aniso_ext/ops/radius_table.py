"""Radius maps as a table that one lookup reads, for kernels on half-precision rows.

T(rho) = intercept + rho * slope in CELLS equal cells of [0, last knot], the secant of the map over the cell, and one more cell
that keeps the ratio from there on. In a cell of width h whose pieces have slopes from s0 to s1 the secant is off by at most
h (s1 - s0)/4, as the furthest point is a knot inside. :func:`table_suffices` says whether that is below the rounding of the
coefficients; where it is not, as for a map with jumps, kernels search the knots.
"""

from __future__ import annotations

import torch

CELLS = 2048


def secant_table(segments: torch.Tensor) -> torch.Tensor:
    """Segments [M, K + 1, 3] as [M, CELLS + 1, 2], intercept and slope of each cell, in the dtype of the segments."""
    start, value, slope = segments.unbind(2)
    last = start[:, -1:]
    edges = torch.linspace(0, 1, CELLS + 1, dtype=start.dtype, device=start.device) * last
    piece = torch.searchsorted(start[:, 1:].contiguous(), edges.contiguous(), right=True)
    at_edges = value.gather(1, piece) + (edges - start.gather(1, piece)) * slope.gather(1, piece)
    steepness = at_edges.diff(dim=1) / edges.diff(dim=1)
    intercept = at_edges[:, :-1] - edges[:, :-1] * steepness
    beyond = torch.stack((torch.zeros_like(last), slope[:, -1:]), dim=2)
    return torch.cat((torch.stack((intercept, steepness), dim=2), beyond), dim=1)


def table_error(segments: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """|T - secant| at every knot [M, K]: between knots it is smaller, and what knots are quantiles of weighs it."""
    start, value = segments[:, 1:, 0], segments[:, 1:, 1]
    cell = (start * (CELLS / start[:, -1:])).long().clamp_max(CELLS - 1)
    intercept, slope = (table[:, :, i].gather(1, cell) for i in (0, 1))
    return (value - intercept - start * slope).abs()


def table_suffices(segments: torch.Tensor, rounding: float) -> bool:
    """Whether the table is off by less than coefficients are rounded by, in the root of the mean square over a row."""
    error = table_error(segments, secant_table(segments))
    size = segments[:, 1:, 1].square().mean().sqrt()
    return bool(error.square().mean().sqrt() <= rounding * size and error.max() <= 16 * rounding * size)
