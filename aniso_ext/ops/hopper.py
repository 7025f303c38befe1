"""What the kernels for Hopper GPUs read, and which rows they serve (csrc/core/cuda/sm90_correct.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from aniso_ext.ops.frame import Frame
from aniso_ext.ops.operands import radius_segments
from aniso_ext.ops.radius_table import CELLS, secant_table, table_suffices
from aniso_ext.ops.tracing import constant_while_tracing

LEAST_WIDTH = 64  # the roundings of fewer products do not average out
LARGEST_WIDTH = 1280
LARGEST_RANK = 128
# as kSm90BasisColumns: the 128 columns that begin at any multiple of 32 are a rotation of the basis
WRAPPED_COLUMNS = LARGEST_RANK + 32


@dataclass(frozen=True, eq=False)
class HopperOperands:
    """Constants of a frame beside its :class:`~aniso_ext.ops.operands.Operands`; M is padded to 64 blocks.

    ============ ======================== =========================================================================
    basis        [D, 160] storage dtype   Q, zero columns up to 128, then its first 32 columns again
    input_bias   [R] float32              -Q^T m_s for the rounded basis, with which rows are projected
    cells        [64, CELLS + 1, 2]       the radius maps, see :mod:`aniso_ext.ops.radius_table`
    cell_scale   [64] float32             cells for each unit of radius
    ============ ======================== =========================================================================
    """

    basis: torch.Tensor
    input_bias: torch.Tensor
    cells: torch.Tensor
    cell_scale: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In schema order."""
        return self.basis, self.input_bias, self.cells, self.cell_scale


@cache
def _is_hopper(device: str) -> bool:
    return torch.cuda.get_device_capability(torch.device(device)) == (9, 0)


@constant_while_tracing
def serves(device: str, dtype: torch.dtype, width: int, rank: int) -> bool:
    """Whether a device is one of compute capability 9.0 and rows of this kind have kernels there."""
    shape = LEAST_WIDTH <= width <= LARGEST_WIDTH and width % 8 == 0 and rank <= LARGEST_RANK
    return dtype in (torch.bfloat16, torch.float16) and shape and _is_hopper(device)


def operands(rows: torch.Tensor, frame: Frame) -> HopperOperands | None:
    """Operands of a frame for these rows, folded on first use and kept with it; None where other kernels must serve."""
    if not serves(str(rows.device), rows.dtype, frame.width, frame.rank):
        return None
    key = (rows.dtype, str(rows.device))
    frame._prepare_hopper(*key)
    return frame._operands[("hopper", *key)]


def fold_hopper(frame: Frame, dtype: torch.dtype, device: torch.device) -> HopperOperands | None:
    """Fold a frame in float64 for rows of a dtype; None where a table of its radius maps would be too coarse."""
    exact = frame.to(device=device, dtype=torch.float64)
    segments = radius_segments(exact.radius_source_knots, exact.radius_target_knots)
    if not table_suffices(segments, torch.finfo(dtype).eps / 2):
        return None
    rounded = exact.basis.to(dtype)
    basis = rounded.new_zeros(frame.width, WRAPPED_COLUMNS)
    basis[:, : frame.rank] = rounded
    basis[:, LARGEST_RANK:] = basis[:, : WRAPPED_COLUMNS - LARGEST_RANK]
    blocks = LARGEST_RANK // 2
    cells = torch.zeros(blocks, CELLS + 1, 2, device=device)
    cells[: frame.blocks] = secant_table(segments)
    cell_scale = torch.zeros(blocks, device=device)
    cell_scale[: frame.blocks] = CELLS / segments[:, -1, 0]
    return HopperOperands(basis, (-exact.source_mean @ rounded.double()).float(), cells, cell_scale)
