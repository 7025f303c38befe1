"""Radius maps as a table that one lookup reads, for kernels on half-precision rows.

T(rho) = intercept + rho * slope in equal cells of [0, last knot], the secant of the map over the cell, and one more
cell that keeps the ratio from there on. In a cell of width h whose pieces have slopes from s0 to s1 the secant is off
by at most h (s1 - s0)/4, as the furthest point is a knot inside. Where that is not below the rounding of the
coefficients, as for a map with jumps, kernels search the knots, be it for all radii or for those of
:func:`coarse_cells`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A small table stays in the first-level cache, which saves up to a quarter of the time; a large one is off by less.
CELL_COUNTS = (512, 1024, 2048)
MOST_COARSE_KNOTS = 0.05  # in cells that are off by more; each costs a search


def secant_table(segments: torch.Tensor, cells: int) -> torch.Tensor:
    """Segments [M, K + 1, 3] as [M, cells + 1, 2], intercept and slope of each cell, in the dtype of the segments."""
    start, value, slope = segments.unbind(2)
    last = start[:, -1:]
    edges = torch.linspace(0, 1, cells + 1, dtype=start.dtype, device=start.device) * last
    piece = torch.searchsorted(start[:, 1:].contiguous(), edges.contiguous(), right=True)
    at_edges = value.gather(1, piece) + (edges - start.gather(1, piece)) * slope.gather(1, piece)
    steepness = at_edges.diff(dim=1) / edges.diff(dim=1)
    intercept = at_edges[:, :-1] - edges[:, :-1] * steepness
    beyond = torch.stack((torch.zeros_like(last), slope[:, -1:]), dim=2)
    return torch.cat((torch.stack((intercept, steepness), dim=2), beyond), dim=1)


@dataclass(frozen=True, eq=False)
class PackedTable:
    """The same table in half the memory: what each cell adds to the last slope, in half precision.

    T(rho) = rho last_slope + unit (start + rise (rho cell_scale - cell)). Radius maps are close to proportional, so
    what a cell adds is small, and so is its rounding.

    ============ ================================ ==================================================================
    cells        [M, cells + 1, 2] float16        start and rise, at most 1; zero in the last cell, NaN in coarse ones
    scales       [3, M] float32                   cell_scale, last_slope and unit
    ============ ================================ ==================================================================
    """

    cells: torch.Tensor
    scales: torch.Tensor

    def secants(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """What the table says as [M, cells + 1, 2], intercept and slope of each cell."""
        (start, rise), (cell_scale, last_slope, unit) = self.cells.to(dtype).unbind(2), self.scales.to(dtype)[..., None]
        cell = torch.arange(start.shape[1], dtype=dtype, device=start.device)
        return torch.stack((unit * (start - cell * rise), last_slope + unit * cell_scale * rise), dim=2)


def pack_table(segments: torch.Tensor, cells: int) -> PackedTable:
    """Pack the secants of segments [M, K + 1, 3]."""
    secants = secant_table(segments, cells)
    last, last_slope = segments[:, -1:, 0], segments[:, -1:, 2]
    edges = torch.linspace(0, 1, cells + 1, dtype=segments.dtype, device=segments.device) * last
    slope = secants[:, :, 1] - last_slope
    starts, rises = secants[:, :, 0] + edges * slope, slope * (last / cells)
    unit = torch.maximum(starts.abs(), rises.abs()).amax(dim=1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    packed = torch.stack((starts, rises), dim=2) / unit[:, :, None]
    packed[:, -1] = 0
    return PackedTable(packed.half(), torch.cat((cells / last, last_slope, unit), dim=1).T.float().contiguous())


def _cells_of_knots(segments: torch.Tensor, cells: int) -> torch.Tensor:
    start = segments[:, 1:, 0]
    return (start * (cells / start[:, -1:])).long().clamp_max(cells - 1)


def table_error(segments: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """|T - secant| at every knot [M, K]: between knots it is smaller, and what knots are quantiles of weighs it."""
    start, value = segments[:, 1:, 0], segments[:, 1:, 1]
    cell = _cells_of_knots(segments, table.shape[1] - 1)
    intercept, slope = (table[:, :, i].gather(1, cell) for i in (0, 1))
    return (value - intercept - start * slope).abs()


def coarse_cells(segments: torch.Tensor, table: torch.Tensor, most: float) -> torch.Tensor:
    """The cells [M, cells + 1] whose secant is off by more than `most` at a knot."""
    cell = _cells_of_knots(segments, table.shape[1] - 1)
    worst = torch.zeros_like(table[:, :, 0]).scatter_reduce(1, cell, table_error(segments, table), "amax")
    return worst > most


def smallest_table(
    segments: torch.Tensor, most: float, most_of_cell: float, counts: tuple[int, ...] = CELL_COUNTS
) -> PackedTable | None:
    """The smallest table that is good enough, NaN in its coarse cells; None if none is.

    Args:
        most: what it may be off by in the root of the mean square over the knots, coarse cells left out.
        most_of_cell: what a cell may be off by that is not coarse.
        counts: of cells, ascending.
    """
    for count in counts:
        table = pack_table(segments, count)
        secants = table.secants()
        error = table_error(segments, secants)
        kept = error[error <= most_of_cell]
        fine = float(kept.square().mean().sqrt()) <= most if len(kept) else False
        if fine and len(kept) >= (1 - MOST_COARSE_KNOTS) * error.numel():
            table.cells[coarse_cells(segments, secants, most_of_cell)] = torch.nan
            return table
    return None
