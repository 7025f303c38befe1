"""What the kernels for Hopper GPUs read, and which rows they serve (csrc/core/cuda/sm90_correct.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from aniso_ext.ops.frame import Frame
from aniso_ext.ops.operands import fold as operands_of
from aniso_ext.ops.operands import is_orthonormal, radius_segments
from aniso_ext.ops.radius_table import PackedTable, coarse_cells, pack_table, table_error
from aniso_ext.ops.tracing import constant_while_tracing

LEAST_WIDTH = 64  # the roundings of fewer products do not average out
LARGEST_WIDTH = 1280
LARGEST_RANK = 128
CHUNK = 64  # columns that a block of the kernels takes at a time
# A small table stays in the first-level cache, which saves up to a quarter of the time; a large one is off by less.
CELL_COUNTS = (512, 1024, 2048)
# Of the rounding of coefficients: what a table is off by, in the root of the mean square, and the most in one cell.
LARGEST_ERROR, LARGEST_CELL_ERROR = 0.5, 4.0
MOST_COARSE_KNOTS = 0.05  # in cells that are off by more; each costs a search


@dataclass(frozen=True, eq=False)
class HopperOperands:
    """Constants of a frame beside its :class:`~aniso_ext.ops.operands.Operands`; M is padded to 64 blocks.

    ============ ======================== =========================================================================
    basis        [D, 128] storage dtype   Q, zero columns past R
    shuffled     [ceil64(D), 128] same    the same as :func:`shuffle` orders it
    coordinates  [3, R] float32           -Q^T m_s, Q^T offset and Q^T shift for the rounded basis
    cells        [64, cells + 1] int32    two float16 numbers each: a :class:`~aniso_ext.ops.radius_table.PackedTable`
    map_scales   [3, 64] float32          its scales
    ============ ======================== =========================================================================
    """

    basis: torch.Tensor
    shuffled: torch.Tensor
    coordinates: torch.Tensor
    cells: torch.Tensor
    map_scales: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In schema order."""
        return self.basis, self.shuffled, self.coordinates, self.cells, self.map_scales


@cache
def _is_hopper(device: str) -> bool:
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(torch.device(device)) == (9, 0)


@constant_while_tracing
def serves(device: str, dtype: torch.dtype, width: int, rank: int) -> bool:
    """Whether a device is one of compute capability 9.0 and rows of this kind have kernels there."""
    shape = LEAST_WIDTH <= width <= LARGEST_WIDTH and width % 8 == 0 and rank <= LARGEST_RANK
    return dtype in (torch.bfloat16, torch.float16) and shape and _is_hopper(device)


def serves_gradient(operation: str, dtype: torch.dtype, *, scalar: bool = True) -> bool:
    """Whether the kernels have the gradient of an operation that they serve, with a number as complement or without.

    A slope is that of a cell of the table. In bfloat16 radii are off by the distance of knots, so that the slope
    between two says nothing better. The gradient of ``encode`` goes with 1/rho: in float16 the rounding of the basis
    would be its largest error by far.
    """
    if operation == "encode":
        return scalar and dtype == torch.bfloat16
    return operation == "decode" or (operation == "correct" and scalar)


def operands(rows: torch.Tensor, frame: Frame) -> HopperOperands | None:
    """Operands of a frame for these rows, folded on first use and kept with it; None where other kernels must serve."""
    if not serves(str(rows.device), rows.dtype, frame.width, frame.rank):
        return None
    dtype, device = rows.dtype, str(rows.device)
    frame._prepare_hopper(dtype, device)
    folded: HopperOperands | None = frame._operands[("hopper", dtype, device)]
    return folded


def aligns(rank: int) -> bool:
    """Whether the last D columns of a state of this rank begin at a multiple of 16 bytes, as copies want."""
    return rank % 16 == 0


def shuffled_basis(state: torch.Tensor, frame: Frame) -> torch.Tensor | None:
    """What ``hopper_decode`` reads for these rows, kept with the frame; None where other kernels must serve."""
    if not (aligns(frame.rank) and serves(str(state.device), state.dtype, frame.width, frame.rank)):
        return None
    dtype, device = state.dtype, str(state.device)
    frame._prepare_hopper_update(dtype, device)
    shuffled: torch.Tensor = frame._operands[("hopper update", dtype, device)]
    return shuffled


def shuffle(basis: torch.Tensor) -> torch.Tensor:
    """Q [D, R] as [ceil64(D), 128], rows and columns reordered in groups of 32 (csrc/core/include/aniso/cuda_sm90.h).

    Entry 2 (4 quarter + pair) + side of a group comes to 2 (4 pair + quarter) + side: a thread's share of a product is
    every fourth pair, and so becomes a run of neighbours in the row.
    """
    width, rank = basis.shape
    padded = basis.new_zeros(-(-width // CHUNK) * CHUNK, LARGEST_RANK)
    padded[:width, :rank] = basis
    groups = padded.view(-1, 4, 4, 2, LARGEST_RANK // 32, 4, 4, 2)
    return groups.permute(0, 2, 1, 3, 4, 6, 5, 7).reshape(padded.shape)


def _radius_table(segments: torch.Tensor, rounding: float) -> PackedTable | None:
    """The smallest table that is good enough, NaN in its coarse cells; None if none is."""
    size = float(segments[:, 1:, 1].square().mean().sqrt())
    for count in CELL_COUNTS:
        table = pack_table(segments, count)
        secants = table.secants()
        error = table_error(segments, secants)
        kept = error[error <= LARGEST_CELL_ERROR * rounding * size]
        fine = float(kept.square().mean().sqrt()) <= LARGEST_ERROR * rounding * size if len(kept) else False
        if fine and len(kept) >= (1 - MOST_COARSE_KNOTS) * error.numel():
            table.cells[coarse_cells(segments, secants, LARGEST_CELL_ERROR * rounding * size)] = torch.nan
            return table
    return None


def fold_hopper(frame: Frame, dtype: torch.dtype, device: torch.device) -> HopperOperands | None:
    """Fold a frame in float64 for rows of a dtype; None where a table of its radius maps would be too coarse, or where
    the basis is not orthonormal enough for norms from quadratic forms."""
    rounding = torch.finfo(dtype).eps / 2
    exact = frame.to(device=device, dtype=torch.float64)
    rounded = exact.basis.to(dtype)
    if not is_orthonormal(rounded.double(), rounding):
        return None
    segments = radius_segments(exact.radius_source_knots, exact.radius_target_knots)
    table = _radius_table(segments, rounding)
    if table is None:
        return None
    constants = operands_of(frame, torch.float64, torch.float64, device)
    shift = torch.zeros_like(constants.offset) if constants.shift is None else constants.shift
    vectors = torch.stack((-exact.source_mean, constants.offset, shift))
    basis = rounded.new_zeros(frame.width, LARGEST_RANK)
    basis[:, : frame.rank] = rounded
    coordinates = (vectors @ rounded.double()).float().contiguous()
    cells = table.cells.new_zeros(LARGEST_RANK // 2, *table.cells.shape[1:])
    cells[: frame.blocks] = table.cells
    map_scales = table.scales.new_zeros(3, LARGEST_RANK // 2)
    map_scales[:, : frame.blocks] = table.scales
    return HopperOperands(basis, shuffle(rounded), coordinates, cells.view(torch.int32).squeeze(2), map_scales)
