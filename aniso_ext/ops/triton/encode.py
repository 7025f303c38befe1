"""Kernels of ``encode`` and its gradient.

    [sin theta0; cos theta0; log T(rho); v0]     v0 = s (y - Q c_t) + o, or D_V (y - Q c_t) + o - Q p'

p' is the leak of diagonal_projected. Gradient, with t at v0 and the polar part d at c_t: q = Q^T (D_V t) and

    grad_y = Q (d - q) + D_V t,   with Q' (-Q^T t) added for the leak's projection Q'

Forward: one walk to project, one to rebuild. Backward: the same over y and t together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import (
    columns_back,
    ended,
    halves,
    identity,
    joined_coefficients,
    load_ahead,
    load_joined,
    load_rows,
    multiply_project,
    multiply_rebuild,
    part_of_blocks,
    parts_of,
    store_rows,
    to_product,
    together,
)
from aniso_ext.ops.triton.forward import coordinates
from aniso_ext.ops.triton.maps import block_row, map_radius, polar


@triton.jit
def encoded_parts(
    a, b, first, scale, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """sin, cos and log T(rho) as they are stored, and scaled c_t as a product takes it, with its factor; from p."""
    if PARTS == 1:
        blocks = part_of_blocks(first, a.shape[1], P)[None, :]
        a += block_row(per_block, 0, blocks, P)
        b += block_row(per_block, 1, blocks, P)
        rho, _, cos, sin = polar(a + block_row(per_block, 2, blocks, P), b + block_row(per_block, 3, blocks, P))
        mapped, _ = map_radius(rho, blocks, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, False)
        a, b, factor = to_product(scale * a, scale * b, PRODUCT, PRECISION)
        return sin.to(PRODUCT), cos.to(PRODUCT), tl.log(mapped).to(PRODUCT), a, b, factor
    else:
        low_a, high_a = halves(a)
        low_b, high_b = halves(b)
        sin, cos, log, low_a, low_b, factor = encoded_parts(
            low_a, low_b, first, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, PRODUCT,
            PRECISION, PARTS // 2,
        )  # fmt: skip
        more_sin, more_cos, more_log, high_a, high_b, _ = encoded_parts(
            high_a, high_b, first + a.shape[1] // 4, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS,
            PIECES, P, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return (
            together(sin, more_sin), together(cos, more_cos), together(log, more_log), together(low_a, high_a),
            together(low_b, high_b), factor,
        )  # fmt: skip


@triton.jit
def gradient_parts(
    a, b, q_a, q_b, first, unit, grad_polar, per_block, table, buckets, starts, pieces, BLOCKS: tl.constexpr,
    CELLS: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, P: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(d - q)/unit as a product takes it, and its factor; from p."""
    if PARTS == 1:
        blocks = part_of_blocks(first, a.shape[1], P)
        at = blocks[None, :]
        a += block_row(per_block, 0, at, P) + block_row(per_block, 2, at, P)
        b += block_row(per_block, 1, at, P) + block_row(per_block, 3, at, P)
        rho, inverse, cos, sin = polar(a, b)
        mapped, slope = map_radius(rho, at, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, True)
        at_sin = load_rows(grad_polar, blocks, BLOCKS, P, tl.float32)
        at_cos = load_rows(grad_polar + BLOCKS, blocks, BLOCKS, P, tl.float32)
        at_log = load_rows(grad_polar + 2 * BLOCKS, blocks, BLOCKS, P, tl.float32)
        at_origin = inverse == 0
        stretch = tl.where(at_origin, 0.0, at_log * slope / tl.where(at_origin, 1.0, mapped * rho * inverse))
        across = (at_sin * cos - at_cos * sin) * inverse
        d_a, d_b = cos * stretch - sin * across - q_a, sin * stretch + cos * across - q_b
        return to_product(d_a / unit, d_b / unit, PRODUCT, PRECISION)
    else:
        low_a, high_a = halves(a)
        low_b, high_b = halves(b)
        low_q_a, high_q_a = halves(q_a)
        low_q_b, high_q_b = halves(q_b)
        low_a, low_b, factor = gradient_parts(
            low_a, low_b, low_q_a, low_q_b, first, unit, grad_polar, per_block, table, buckets, starts, pieces, BLOCKS,
            CELLS, STEPS, PIECES, P, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        high_a, high_b, _ = gradient_parts(
            high_a, high_b, high_q_a, high_q_b, first + a.shape[1] // 4, unit, grad_polar, per_block, table, buckets,
            starts, pieces, BLOCKS, CELLS, STEPS, PIECES, P, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return together(low_a, high_a), together(low_b, high_b), factor


@triton.jit(do_not_specialize=["count"])
def encode_kernel(
    y, out, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, table, buckets, starts,
    pieces, count, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, CELLS: tl.constexpr,
    STEPS: tl.constexpr, PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    base = y + tl.minimum(rows, count - 1) * row_stride
    a, b, leak_a, leak_b, _, _, _ = coordinates(
        base, project, leak_project, per_block, per_column, WIDTH, PADDED, P, False, LEAK, False, False,
        BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
    )  # fmt: skip
    scale = 1.0
    if JOINED:
        scale = -tl.load(scalars + 5)
    sin, cos, log, c_a, c_b, c_factor = encoded_parts(
        a, b, 0, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, PRODUCT, PRECISION,
        parts_of(PRODUCT, P),
    )  # fmt: skip
    row_out = out + rows * (3 * BLOCKS + WIDTH)
    blocks = tl.arange(0, P)
    store_rows(row_out, blocks, inside, sin, BLOCKS, P)
    store_rows(row_out + BLOCKS, blocks, inside, cos, BLOCKS, P)
    store_rows(row_out + 2 * BLOCKS, blocks, inside, log, BLOCKS, P)
    if LEAK:
        leak_a, leak_b, leak_factor = to_product(leak_a, leak_b, PRODUCT, PRECISION)
    if JOINED:
        unit, kept = tl.load(scalars + 4), identity(-scale, BLOCK_COLUMNS, PRODUCT)
        joined = joined_coefficients(tl.zeros((BLOCK_ROWS,), tl.float32), PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            v = multiply_rebuild(c_a, c_b, rebuild, columns, P, PRODUCT, PRECISION)
            v = tl.dot(joined, load_joined(project, columns, P, PADDED, PRODUCT), v)
            tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            v = tl.dot(tile, kept, v)
            store_rows(row_out + 3 * BLOCKS, columns, inside, v * unit, WIDTH, BLOCK_COLUMNS)
    else:
        tile = load_rows(base, columns_back(0, WIDTH, BLOCK_COLUMNS), WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            ahead = load_ahead(base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            along = multiply_rebuild(c_a, c_b, rebuild, columns, P, PRODUCT, PRECISION)
            v = (tile.to(tl.float32) - along * c_factor[:, None]) * tl.load(per_column + columns)[None, :]
            tile = ahead
            v += tl.load(per_column + PADDED + columns)[None, :]
            if LEAK:
                v -= multiply_rebuild(leak_a, leak_b, rebuild, columns, P, PRODUCT, PRECISION) * leak_factor[:, None]
            store_rows(row_out + 3 * BLOCKS, columns, inside, v, WIDTH, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["count"])
def encode_backward_kernel(
    grad, y, grad_y, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, table,
    buckets, starts, pieces, count, grad_stride, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, CELLS: tl.constexpr,
    STEPS: tl.constexpr, PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    read = tl.minimum(rows, count - 1)
    base = y + read * row_stride
    grad_polar = grad + read * grad_stride
    grad_base = grad_polar + 3 * BLOCKS
    scale = tl.load(scalars)
    pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    q_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    leak_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        pair = multiply_project(tile, project, columns, pair, P, PADDED, PRODUCT, PRECISION)
        tile = load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        if LEAK:
            leak_pair = multiply_project(tile, project, columns, leak_pair, P, PADDED, PRODUCT, PRECISION)
        if SPLIT:
            tile = (tile.to(tl.float32) * tl.load(per_column + columns)[None, :]).to(PRODUCT)
        q_pair = multiply_project(tile, project, columns, q_pair, P, PADDED, PRODUCT, PRECISION)
        if LEAK:
            leak_pair = ended(leak_pair, PRODUCT)
    a, b = halves(pair)
    q_a, q_b = halves(q_pair)
    if not SPLIT:
        q_a *= scale
        q_b *= scale
    unit = 1.0
    if JOINED:
        unit = tl.load(scalars + 4)
    d_a, d_b, factor = gradient_parts(
        a, b, q_a, q_b, 0, unit, grad_polar, per_block, table, buckets, starts, pieces, BLOCKS, CELLS, STEPS, PIECES, P,
        PRODUCT, PRECISION, parts_of(PRODUCT, P),
    )  # fmt: skip
    if LEAK:
        leak_a, leak_b = halves(leak_pair)
        leak_a, leak_b, leak_factor = to_product(-leak_a, -leak_b, PRODUCT, PRECISION)
    target = grad_y + rows * WIDTH
    if JOINED:
        kept = identity(tl.load(scalars + 5), BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            result = multiply_rebuild(d_a, d_b, rebuild, columns, P, PRODUCT, PRECISION)
            tile = load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            result = tl.dot(tile, kept, result)
            store_rows(target, columns, inside, result * unit, WIDTH, BLOCK_COLUMNS)
    else:
        tile = load_rows(grad_base, columns_back(0, WIDTH, BLOCK_COLUMNS), WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            ahead = load_ahead(grad_base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            result = multiply_rebuild(d_a, d_b, rebuild, columns, P, PRODUCT, PRECISION) * factor[:, None]
            result += tile.to(tl.float32) * tl.load(per_column + columns)[None, :]
            tile = ahead
            if LEAK:
                leak = multiply_rebuild(leak_a, leak_b, leak_rebuild, columns, P, PRODUCT, PRECISION)
                result += leak * leak_factor[:, None]
            store_rows(target, columns, inside, result, WIDTH, BLOCK_COLUMNS)
