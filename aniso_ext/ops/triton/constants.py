"""What the Triton kernels read: the constants of a frame in the order and the precision of tensor cores.

Block k of the basis is columns 2k and 2k + 1. They are kept apart, in each half of the blocks all even columns and then
all odd ones, so that a thread holds both coordinates of a block also where two groups of warps share the columns of a
product. Blocks are padded to a power of two and columns to a multiple of PADDING with zeros: a padded block has radius
0 and coefficient 0.

The basis is rounded to the format that is multiplied: the storage format of the rows, float32 for rows of less than
LEAST_WIDTH columns, whose few roundings do not average out; for float32 rows float16 where TF32 is allowed, which has
as many bits. What the algebra of the kernels takes from it, Q^T m_s, Q^T o and Q^T g, is computed from the rounded
basis: it describes the rows that are really built. float16 rows are projected with the rounding errors of the basis as
well, in a product of their own: their contract leaves no room for coordinates that are off by more than float32 makes
them, and near the origin a phase enlarges that.

Radius maps: see :class:`Lookup`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from aniso_ext.ops.frame import Frame
from aniso_ext.ops.hopper import fitting_table
from aniso_ext.ops.operands import BUCKETS, fold, is_orthonormal, radius_segments
from aniso_ext.ops.radius_table import PackedTable

PADDING = 128
JOINED = 16  # the fewest factors that tensor cores add up
LEAST_WIDTH = 64
LEAST_BLOCKS = 16  # a side of the smallest matrix that tensor cores multiply
LARGEST_RANK = 1024
PRECISIONS = ("ieee", "tf32")

# rows of `per_block`
BIAS, TARGET, BUCKET_SCALE, OFFSET, SHIFT, LEAK_BIAS, LAST_SLOPE, UNIT = 0, 2, 4, 5, 7, 9, 11, 12
BLOCK_CONSTANTS = 13


class Lookup(NamedTuple):
    """Radius maps for one gather a lookup (table), and for an exact search.

    Table: two float16 numbers a cell, see :class:`~aniso_ext.ops.radius_table.PackedTable`; NaN in a coarse cell, whose
    radii are searched. Where no table is good enough, all are.

    Search: ``buckets`` has the knots below each bucket of radii (see operands.knot_buckets); from there 2^steps - 1
    knots are halved. ``starts`` ends with NaN, which is below nothing, so that the search may reach past the last knot.

    =========== ======================================= =====================================
    table       [P, cells + 1] int32                    [0] without a table, and cells is 0
    buckets     [P, BUCKETS] int16
    starts      [P, K + 1 + 2^steps] float32
    pieces      [P, K + 1, 2] float32                   value and slope
    coarse                                              whether a cell is coarse
    =========== ======================================= =====================================
    """

    table: torch.Tensor
    buckets: torch.Tensor
    starts: torch.Tensor
    pieces: torch.Tensor
    cells: int
    steps: int
    coarse: bool


@dataclass(frozen=True, eq=False)
class Constants:
    """Arrays of a frame for rows of one dtype; P is M padded, W is D padded.

    ============= ============================ =====================================================================
    project       [2P, W], float16 [4P, W],    rows: columns of Q as :func:`_apart` has them; for float16 then their
                  bfloat16 [2P + JOINED, W]    rounding errors, for bfloat16 :func:`_columns_of_products`
    rebuild       [W, 2P]                      the same, transposed
    leak_project  like project, or [0]         ((I - QQ^T) D_V Q)^T, projected diagonal complements only
    leak_rebuild  [W, 2P] or [0]               the same, transposed
    per_block     [BLOCK_CONSTANTS, P] float32 bias, target, bucket scale, Q^T o, Q^T g, bias of the leak, last slope,
                                               unit
    per_column    [3, W] float32               scale, offset, shift
    scalars       [6] float32                  scale, o.o, o.g, g.g, the unit of joined products, scale / unit
    lookup        Lookup                       radius maps
    coarse_slopes                              whether gradients have the slope of a cell, or of the map itself
    forms                                      whether norms may come from quadratic forms, for which Q^T Q = I
    diagonal                                   whether the complement is not a scalar one
    ============= ============================ =====================================================================
    """

    project: torch.Tensor
    rebuild: torch.Tensor
    leak_project: torch.Tensor
    leak_rebuild: torch.Tensor
    per_block: torch.Tensor
    per_column: torch.Tensor
    scalars: torch.Tensor
    lookup: Lookup
    coarse_slopes: bool
    rank: int
    shifted: bool
    forms: bool
    diagonal: bool
    tf32: bool

    @property
    def split(self) -> bool:
        """Whether a row is Q c^ + D_V (y - Q c_t) + o with two products, norms by rebuilding it twice.

        A scalar complement needs one product where its norms may come from quadratic forms.
        """
        return self.diagonal or not self.forms


def rounding_of(dtype: torch.dtype, precision: str) -> float:
    """Largest relative error of rounding to the format that tensor cores multiply."""
    return 2.0**-11 if precision == "tf32" and dtype == torch.float32 else float(torch.finfo(dtype).eps) / 2


def padded_blocks(blocks: int) -> int:
    return max(LEAST_BLOCKS, 1 << (blocks - 1).bit_length())


def _apart(basis: torch.Tensor, blocks: int) -> torch.Tensor:
    """Columns [D, R] as [D, 2P]: even and odd ones of the first half of the padded blocks, then those of the second."""
    width, rank = basis.shape
    apart = basis.new_zeros(width, blocks, 2)
    apart[:, : rank // 2] = basis.unflatten(1, (-1, 2))
    return apart.unflatten(1, (2, -1)).transpose(2, 3).flatten(1)


def _both_ways(basis: torch.Tensor, blocks: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    apart = basis.new_zeros(width, 2 * blocks)
    apart[: len(basis)] = _apart(basis, blocks)
    return apart.T.contiguous(), apart


def _columns_of_products(offset: torch.Tensor, shift: torch.Tensor, width: int) -> torch.Tensor:
    """[JOINED, W]: offset and shift in two bfloat16 pieces each, and the first pieces of shift and offset once more."""
    joined = offset.new_zeros(JOINED, width, dtype=torch.bfloat16)
    for row, value in ((0, offset), (2, shift)):
        joined[row, : len(value)] = value
        joined[row + 1, : len(value)] = value - joined[row, : len(value)].double()
    joined[4], joined[5] = joined[2], joined[0]
    return joined


def _padded(value: torch.Tensor, blocks: int, fill: float = 0) -> torch.Tensor:
    padding = value.new_full((blocks - len(value), *value.shape[1:]), fill)
    return torch.cat((value, padding)).contiguous()


def _lookup(segments: torch.Tensor, table: PackedTable | None, blocks: int) -> Lookup:
    segments = segments.float()
    knots = segments[:, 1:, 0].contiguous()
    # rounded as the kernels round it: a radius and its bucket never disagree then
    of_knot = (knots * (BUCKETS / knots[:, -1:])).to(torch.int32).clamp_max(BUCKETS - 1)
    every = torch.arange(BUCKETS, dtype=torch.int32, device=knots.device).expand(len(knots), -1).contiguous()
    below = torch.searchsorted(of_knot, every)
    window = int((torch.searchsorted(of_knot, every, right=True) - below).max())
    steps = window.bit_length()
    beyond = torch.full((len(knots), 1 << steps), float("nan"), device=knots.device)
    starts = _padded(torch.cat((segments[:, :, 0], beyond), dim=1), blocks, float("nan"))
    starts[:, 0] = 0  # also of blocks that only pad
    words = torch.empty(0, dtype=torch.int32, device=knots.device)
    if table is not None:
        words = _padded(table.cells.contiguous().view(torch.int32).squeeze(2), blocks)
    return Lookup(
        words,
        _padded(below.to(torch.int16), blocks),
        starts,
        _padded(segments[:, :, 1:].contiguous(), blocks),
        0 if table is None else table.cells.shape[1] - 1,
        steps,
        table is not None and bool(table.cells.isnan().any()),
    )


def fold_constants(frame: Frame, dtype: torch.dtype, precision: str, device: torch.device) -> Constants:
    """Fold a frame in float64 for rows of a dtype, then round once."""
    exact = frame.to(device=device, dtype=torch.float64)
    operands = fold(exact, torch.float64, torch.float64, device)
    blocks, width = padded_blocks(frame.blocks), -(-frame.width // PADDING) * PADDING
    product = torch.float32 if frame.width < LEAST_WIDTH else dtype
    tf32 = dtype == torch.float32 and precision == "tf32"
    rounding = rounding_of(product, precision)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(torch.float16 if tf32 else product)

    def prepared(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """To project with, to rebuild with, and in float64 what both multiply with."""
        main = rounded(value)
        project, rebuild = _both_ways(main, blocks, width)
        projected = main.double()
        if product == torch.float16:
            rest = rounded(value - projected)
            project = torch.cat((project, _both_ways(rest, blocks, width)[0]))
            projected = projected + rest.double()
        return project, rebuild, projected, main.double()

    project, rebuild, projecting, used = prepared(operands.basis)
    leak_project = leak_rebuild = project.new_empty(0)
    leak_bias = used.new_zeros(frame.rank)
    if frame.complement == "diagonal_projected":
        leak_project, leak_rebuild, leak, _ = prepared(operands.input_weight[frame.rank :].T)
        leak_bias = -exact.source_mean @ leak

    # In IEEE float32 norms from quadratic forms would be the largest errors by far.
    forms = (dtype != torch.float32 or tf32) and is_orthonormal(used, rounding)
    offset = operands.offset
    shift = torch.zeros_like(offset) if operands.shift is None else operands.shift
    # the scale as a power of two, which a product of bfloat16 factors keeps, times a unit that rows are multiplied with
    scale = float(operands.scale[0]) if frame.complement == "scalar" else 1.0
    unit = 2 * math.frexp(scale)[0] if scale else 1.0
    if product == torch.bfloat16 and (forms or frame.complement != "scalar"):
        project = torch.cat((project, _columns_of_products(offset / unit, shift / unit, width)))
    pairs = {
        BIAS: -exact.source_mean @ projecting,
        TARGET: operands.target_coordinates,
        OFFSET: offset @ used,
        SHIFT: shift @ used,
        LEAK_BIAS: leak_bias,
    }
    per_block = used.new_zeros(BLOCK_CONSTANTS, blocks)
    for row, value in pairs.items():
        per_block[row, : frame.blocks], per_block[row + 1, : frame.blocks] = value[0::2], value[1::2]
    segments = radius_segments(exact.radius_source_knots, exact.radius_target_knots)
    per_block[BUCKET_SCALE, : frame.blocks] = BUCKETS / segments[:, -1, 0].float()
    per_column = used.new_zeros(3, width)
    per_column[:, : frame.width] = torch.stack((operands.scale.expand_as(offset), offset, shift))
    # In IEEE float32 a table would be the largest error by far.
    exactly = product == torch.float32 and not tf32
    table = None if exactly else fitting_table(segments, dtype)
    if table is not None:
        per_block[[LAST_SLOPE, UNIT], : frame.blocks] = table.scales[1:].double()
    return Constants(
        project=project,
        rebuild=rebuild,
        leak_project=leak_project,
        leak_rebuild=leak_rebuild,
        per_block=per_block.float(),
        per_column=per_column.float(),
        scalars=torch.stack(
            (
                *(operands.scale[0], offset @ offset, offset @ shift, shift @ shift),
                *operands.scale.new_tensor((unit, scale / unit)),
            )
        ).float(),
        lookup=_lookup(segments, table, blocks),
        # Where the basis is rounded to bfloat16, radii are off by the distance of knots, and the slope of a knot says
        # nothing better than that of a cell (both are .5 off on fitted maps).
        coarse_slopes=dtype == torch.bfloat16,
        rank=frame.rank,
        shifted=operands.shift is not None,
        forms=forms,
        diagonal=frame.complement != "scalar",
        tf32=tf32,
    )
