"""What the kernels for Hopper GPUs read, and which rows they serve (csrc/core/cuda/sm90_correct.cuh).

Where the complement is a number, ``correct`` has two more kernels: for float32 rows whose products may round to TF32,
with products of float16, which keeps as many bits; and for half-precision rows whose basis is too large to stay in
shared memory, and streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from aniso_ext.ops.frame import Frame
from aniso_ext.ops.operands import fold as operands_of
from aniso_ext.ops.operands import is_orthonormal, radius_segments
from aniso_ext.ops.radius_table import CELL_COUNTS, PackedTable, smallest_table
from aniso_ext.ops.tracing import constant_while_tracing

LEAST_WIDTH = 64  # the roundings of fewer products do not average out
LARGEST_WIDTH = 1280
LARGEST_RANK = 128
LARGEST_STREAMED_WIDTH, LARGEST_STREAMED_RANK = 4096, 256
CHUNK = 64  # columns that a block of the kernels takes at a time
# Where Q streams, so does the table, past shared memory: with the last cell, that of larger radii, a power of two fills
# stages whole.
STREAMED_CELL_COUNTS = (255, 511, 1023, 2047)
# Of the rounding of coefficients: what a table is off by, in the root of the mean square, and the most in one cell.
LARGEST_ERROR, LARGEST_CELL_ERROR = 0.5, 4.0
# For float32 rows 1 - cos may be 1e-6: errors of this size add 7e-8, and a cell that is off by sqrt(M) adds 1.2e-7.
LARGEST_ERROR_TF32 = 0.75


@dataclass(frozen=True, eq=False)
class HopperOperands:
    """Constants of a frame beside its :class:`~aniso_ext.ops.operands.Operands`; R is padded to C, 128 or 256.

    ============ ======================== =========================================================================
    basis        [D, C] product dtype     Q, zero columns past R
    shuffled     [ceil64(D), C] same      the same as :func:`shuffle` orders it for the rows
    coordinates  [3, R] float32           -Q^T m_s, Q^T offset and Q^T shift for the rounded basis
    cells        [C/2, cells + 1] int32   two float16 numbers each: a :class:`~aniso_ext.ops.radius_table.PackedTable`
    map_scales   [3, C/2] float32         its scales
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


@constant_while_tracing
def serves_correct(device: str, dtype: torch.dtype, width: int, rank: int) -> bool:
    """The same for ``correct`` where the complement is a number, as products may round now."""
    if streams(width, rank):
        shape = width <= LARGEST_STREAMED_WIDTH and width % 8 == 0 and rank <= LARGEST_STREAMED_RANK
        return dtype in (torch.bfloat16, torch.float16) and shape and _is_hopper(device)
    if dtype == torch.float32:
        rounds = torch.get_float32_matmul_precision() != "highest"
        return rounds and width >= LEAST_WIDTH and width % 4 == 0 and _is_hopper(device)
    return serves(device, dtype, width, rank)


def streams(width: int, rank: int) -> bool:
    """Whether Q is too large to stay in the shared memory of a cluster."""
    return width > LARGEST_WIDTH or rank > LARGEST_RANK


def serves_gradient(operation: str, dtype: torch.dtype, width: int, rank: int, *, scalar: bool = True) -> bool:
    """Whether the kernels have the gradient of an operation that they serve, with a number as complement or without.

    A slope is that of a cell of the table. In bfloat16 radii are off by the distance of knots, so that the slope
    between two says nothing better. The gradient of ``encode`` goes with 1/rho: in float16 the rounding of the basis
    would be its largest error by far.
    """
    if dtype == torch.float32 or streams(width, rank):
        return False
    if operation == "encode":
        return scalar and dtype == torch.bfloat16
    return operation == "decode" or (operation == "correct" and scalar)


def operands(
    rows: torch.Tensor, frame: Frame, serves: Callable[[str, torch.dtype, int, int], bool] = serves
) -> HopperOperands | None:
    """Operands of a frame for these rows, folded on first use and kept with it; None where other kernels must serve.

    Args:
        serves: :func:`serves`, or :func:`serves_correct`.
    """
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


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the factors of products are rounded to for rows of a dtype."""
    return torch.float16 if dtype == torch.float32 else dtype


def padded_rank(rank: int) -> int:
    """The columns of Q that kernels read."""
    return LARGEST_RANK if rank <= LARGEST_RANK else LARGEST_STREAMED_RANK


def shuffle(basis: torch.Tensor, run: int = 8, *, columns: bool = True) -> torch.Tensor:
    """Q [D, R] as [ceil64(D), 128 or 256], reordered: columns in groups of 32, unless left as they are, rows in groups
    of ``4 run``, where ``run`` neighbours of a row have 16 bytes (csrc/core/include/aniso/cuda_sm90.h).

    Entry 2 (4 quarter + pair) + side of a group of 32 comes to 2 (4 pair + quarter) + side, and entry 2 (2 quarter +
    pair) + side of one of 16 likewise: a thread's share of a product is every fourth pair, and so becomes a run of
    neighbours in the row.
    """
    width, rank = basis.shape
    padded = basis.new_zeros(-(-width // CHUNK) * CHUNK, padded_rank(rank))
    padded[:width, :rank] = basis
    groups = padded.view(-1, 4, run // 2, 2, padded.shape[1] // 32, 4, 4, 2).transpose(1, 2)
    return (groups.transpose(5, 6) if columns else groups).reshape(padded.shape)


def largest_errors(dtype: torch.dtype, blocks: int) -> tuple[float, float]:
    """What a table for rows of a dtype may be off by in the root of the mean square, and in one cell, in roundings.

    A cell that is off by sqrt(M) moves a row as much as the roundings of all its coefficients do.
    """
    most = LARGEST_ERROR_TF32 if dtype == torch.float32 else LARGEST_ERROR
    streamed = blocks > LARGEST_RANK // 2
    return most, blocks**0.5 if dtype == torch.float32 or streamed else LARGEST_CELL_ERROR


def fitting_table(
    segments: torch.Tensor, dtype: torch.dtype, counts: tuple[int, ...] = CELL_COUNTS
) -> PackedTable | None:
    """The smallest table that is good enough for rows of a dtype; None if none is."""
    rounding = torch.finfo(product_dtype(dtype)).eps / 2
    size = float(segments[:, 1:, 1].square().mean().sqrt())
    most, most_of_cell = (error * rounding * size for error in largest_errors(dtype, len(segments)))
    return smallest_table(segments, most, most_of_cell, counts)


def fold_hopper(frame: Frame, dtype: torch.dtype, device: torch.device) -> HopperOperands | None:
    """Fold a frame in float64 for rows of a dtype; None where a table of its radius maps would be too coarse, or where
    the basis is not orthonormal enough for norms from quadratic forms, which float32 rows do without."""
    product = product_dtype(dtype)
    exact = frame.to(device=device, dtype=torch.float64)
    rounded = exact.basis.to(product)
    if dtype != torch.float32 and not is_orthonormal(rounded.double(), torch.finfo(product).eps / 2):
        return None
    segments = radius_segments(exact.radius_source_knots, exact.radius_target_knots)
    counts = STREAMED_CELL_COUNTS if streams(frame.width, frame.rank) else CELL_COUNTS
    table = fitting_table(segments, dtype, counts)
    if table is None:
        return None
    constants = operands_of(frame, torch.float64, torch.float64, device)
    shift = torch.zeros_like(constants.offset) if constants.shift is None else constants.shift
    vectors = torch.stack((-exact.source_mean, constants.offset, shift))
    columns = padded_rank(frame.rank)
    basis = rounded.new_zeros(frame.width, columns)
    basis[:, : frame.rank] = rounded
    coordinates = (vectors @ rounded.double()).float().contiguous()
    cells = table.cells.new_zeros(columns // 2, *table.cells.shape[1:])
    cells[: frame.blocks] = table.cells
    map_scales = table.scales.new_zeros(3, columns // 2)
    map_scales[:, : frame.blocks] = table.scales
    shuffled = shuffle(rounded, 16 // dtype.itemsize, columns=not streams(frame.width, frame.rank))
    return HopperOperands(basis, shuffled, coordinates, cells.view(torch.int32).squeeze(2), map_scales)
