"""Polar coordinates of the blocks and their radius maps: a table, and a search where that is too coarse."""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import INTERPRETED, LEAST_NORMAL

RADIUS_EPS = tl.constexpr(1e-12)
BUCKETS = tl.constexpr(2048)  # operands.BUCKETS


def _search_coarse(slope: bool) -> str:
    """PTX that searches the map where a cell is coarse: few lanes do, and only their warps wait.

    Operands: the results, the map by the table (and its slope), the cell, the radius, its block, the scale of buckets;
    buckets, starts, pieces; half of the window, the length of starts and of pieces.
    """
    names = ["map", *(["slope"] if slope else []), "cell", "rho", "block", "scale", "buckets", "starts", "pieces"]
    results = 2 if slope else 1
    at = {name: f"${results + number}" for number, name in enumerate([*names, "half", "length", "count"])}
    found = "$1" if slope else "slope"
    return f"""{{
        .reg .pred yes; .reg .b32 below, half, index; .reg .u64 at; .reg .f32 start, value, slope;
        mov.f32 $0, {at["map"]};
        {f"mov.f32 $1, {at['slope']};" if slope else ""}
        and.b32 below, {at["cell"]}, 0x7fff;
        setp.le.u32 yes, below, 0x7c00;
        @yes bra FOUND;
        mul.f32 start, {at["rho"]}, {at["scale"]};
        min.f32 start, start, 0f44FFE000;
        cvt.rzi.u32.f32 below, start;
        mad.lo.u32 index, {at["block"]}, 2048, below;
        mad.wide.u32 at, index, 2, {at["buckets"]};
        ld.global.nc.u16 below, [at];
        mov.b32 half, {at["half"]};
        HALVE:
        mad.lo.u32 index, {at["block"]}, {at["length"]}, below;
        add.u32 index, index, half;
        mad.wide.u32 at, index, 4, {at["starts"]};
        ld.global.nc.f32 start, [at];
        setp.le.f32 yes, start, {at["rho"]};
        @yes add.u32 below, below, half;
        shr.u32 half, half, 1;
        setp.ne.u32 yes, half, 0;
        @yes bra HALVE;
        mad.lo.u32 index, {at["block"]}, {at["length"]}, below;
        mad.wide.u32 at, index, 4, {at["starts"]};
        ld.global.nc.f32 start, [at];
        mad.lo.u32 index, {at["block"]}, {at["count"]}, below;
        mad.wide.u32 at, index, 8, {at["pieces"]};
        ld.global.nc.v2.f32 {{value, {found}}}, [at];
        sub.f32 start, {at["rho"]}, start;
        fma.rn.f32 $0, start, {found}, value;
        FOUND:
        }}"""


_SEARCH_COARSE = tl.constexpr(_search_coarse(False))
_SEARCH_COARSE_SLOPE = tl.constexpr(_search_coarse(True))


@triton.jit
def block_row(per_block, row: tl.constexpr, blocks, P: tl.constexpr):
    return tl.load(per_block + row * P + blocks)


@triton.jit
def polar(a, b):
    """rho, 1/length (0 at the origin), cos, sin."""
    squared = a * a + b * b
    at_origin = squared < LEAST_NORMAL
    inverse = tl.where(at_origin, 0.0, 1.0 / tl.sqrt(tl.where(at_origin, 1.0, squared)))
    return tl.sqrt(squared + RADIUS_EPS), inverse, tl.where(at_origin, 1.0, a * inverse), b * inverse


@triton.jit
def gather_pair(pairs, index):
    """Two neighbouring float32 for each index.

    Gathers are written out: the compiler would send a pointer for each element through shared memory to lay them out
    for coalescing, which a gather never is, and would need two registers for each of them.
    """
    if INTERPRETED:
        pair = tl.load(pairs + index)
        low = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        return low, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; mad.wide.u32 at, $3, 8, $2; ld.global.nc.v2.f32 {$0, $1}, [at]; }",
        "=f,=f,l,r", [pairs.to(tl.int64), index], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def gather_float(values, index):
    if INTERPRETED:
        return tl.load(values + index)
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; mad.wide.u32 at, $2, 4, $1; ld.global.nc.f32 $0, [at]; }",
        "=f,l,r", [values.to(tl.int64), index], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def gather_short(values, index):
    if INTERPRETED:
        return tl.load(values + index).to(tl.int32)
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; .reg .u16 short; mad.wide.u32 at, $2, 2, $1; ld.global.nc.u16 short, [at]; "
        "cvt.u32.u16 $0, short; }",
        "=r,l,r", [values.to(tl.int64), index], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def gather_word(words, index):
    if INTERPRETED:
        return tl.load(words + index)
    return tl.inline_asm_elementwise(
        "{ .reg .u64 at; mad.wide.u32 at, $2, 4, $1; ld.global.nc.b32 $0, [at]; }",
        "=r,l,r", [words.to(tl.int64), index], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def search_radius(rho, blocks, scale, buckets, starts, pieces, STEPS: tl.constexpr, PIECES: tl.constexpr):
    """(T(rho), slope) of the piece that a radius lies in."""
    position = rho * scale
    # compared this way around a NaN falls in the last bucket instead of being cast
    bucket = tl.where(position < BUCKETS - 1, position, (BUCKETS - 1) * 1.0).to(tl.int32)
    below = gather_short(buckets, blocks * BUCKETS + bucket)
    first = blocks * (PIECES + (1 << STEPS))
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        below += tl.where(gather_float(starts, first + below + half) <= rho, half, 0)
    value, slope = gather_pair(pieces, blocks * PIECES + below)
    return value + (rho - gather_float(starts, first + below)) * slope, slope


@triton.jit
def map_radius(
    rho, blocks, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """(T(rho), slope) of radii of ``blocks`` [1, n], see constants.Lookup; CELLS 0: no table, STEPS 0: no coarse cells.

    SLOPE false: the slope is not asked for.
    """
    scale = tl.load(per_block + 4 * P + blocks)
    if CELLS == 0:
        return search_radius(rho, blocks, scale, buckets, starts, pieces, STEPS, PIECES)
    else:  # a return from here on would be compiled as well
        scale *= CELLS / BUCKETS
        last_slope = tl.load(per_block + 11 * P + blocks)
        unit = tl.load(per_block + 12 * P + blocks)
        position = rho * scale
        cell = tl.where(position < CELLS, position, CELLS * 1.0).to(tl.int32)
        word = gather_word(table, blocks * (CELLS + 1) + cell)
        start = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        rise = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        mapped = rho * last_slope + unit * (start + rise * (position - cell.to(tl.float32)))
        slope = last_slope + unit * scale * rise
        if STEPS > 0:
            scale *= BUCKETS / CELLS
            if INTERPRETED:
                exact, exact_slope = search_radius(rho, blocks, scale, buckets, starts, pieces, STEPS, PIECES)
                coarse = (word & 0x7FFF) > 0x7C00
                mapped = tl.where(coarse, exact, mapped)
                slope = tl.where(coarse, exact_slope, slope)
            elif SLOPE:
                mapped, slope = tl.inline_asm_elementwise(
                    _SEARCH_COARSE_SLOPE, "=&f,=&f,f,f,r,f,r,f,l,l,l,r,r,r",
                    [mapped, slope, word, rho, blocks, scale, buckets.to(tl.int64), starts.to(tl.int64),
                     pieces.to(tl.int64), 1 << (STEPS - 1), PIECES + (1 << STEPS), PIECES],
                    dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
                )  # fmt: skip
            else:
                mapped = tl.inline_asm_elementwise(
                    _SEARCH_COARSE, "=&f,f,r,f,r,f,l,l,l,r,r,r",
                    [mapped, word, rho, blocks, scale, buckets.to(tl.int64), starts.to(tl.int64),
                     pieces.to(tl.int64), 1 << (STEPS - 1), PIECES + (1 << STEPS), PIECES],
                    dtype=tl.float32, is_pure=True, pack=1,
                )  # fmt: skip
        return mapped, slope


@triton.jit
def map_backward(rho, inverse, cos, sin, mapped, slope, grad_a, grad_b):
    """Gradient at (a, b) from that at T(rho) (cos, sin); aniso/block_math.h."""
    radial = grad_a * cos + grad_b * sin
    tangential = grad_b * cos - grad_a * sin
    at_origin = inverse == 0
    along = tl.where(at_origin, 0.0, radial * slope / tl.where(at_origin, 1.0, rho * inverse))
    across = tangential * mapped * inverse
    return cos * along - sin * across, sin * along + cos * across
