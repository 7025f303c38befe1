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
    apart,
    block_pair,
    load_ahead,
    load_rows,
    map_radius,
    multiply_project,
    multiply_rebuild,
    polar,
    store_rows,
    to_product,
)
from aniso_ext.ops.triton.forward import coordinates


@triton.jit(do_not_specialize=["count"])
def encode_kernel(
    y, out, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, cells, starts, pieces,
    count, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    base = y + tl.minimum(rows, count - 1) * row_stride
    a, b, leak_a, leak_b, _, _, _ = coordinates(
        base, project, leak_project, per_block, per_column, WIDTH, PADDED, P, False, LEAK, False,
        BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
    )  # fmt: skip
    bias_a, bias_b = block_pair(per_block, 0, P)
    target_a, target_b = block_pair(per_block, 2, P)
    a += bias_a
    b += bias_b
    rho, _, cos, sin = polar(a + target_a, b + target_b)
    mapped, _ = map_radius(rho, per_block, cells, starts, pieces, STEPS, PIECES, P)
    row_out = out + rows * (3 * BLOCKS + WIDTH)
    blocks = tl.arange(0, P)
    store_rows(row_out, blocks, inside, sin, BLOCKS, P)
    store_rows(row_out + BLOCKS, blocks, inside, cos, BLOCKS, P)
    store_rows(row_out + 2 * BLOCKS, blocks, inside, tl.log(mapped), BLOCKS, P)
    c_a, c_b, c_factor = to_product(a, b, PRODUCT, PRECISION)
    if LEAK:
        leak_a, leak_b, leak_factor = to_product(leak_a, leak_b, PRODUCT, PRECISION)
    tile = load_rows(base, tl.arange(0, BLOCK_COLUMNS), WIDTH, BLOCK_COLUMNS, PRODUCT)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
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
    grad, y, grad_y, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, cells, starts,
    pieces, count, grad_stride, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
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
    a, b = apart(pair, BLOCK_ROWS, P)
    q_a, q_b = apart(q_pair, BLOCK_ROWS, P)
    if not SPLIT:
        q_a *= scale
        q_b *= scale
    bias_a, bias_b = block_pair(per_block, 0, P)
    target_a, target_b = block_pair(per_block, 2, P)
    rho, inverse, cos, sin = polar(a + bias_a + target_a, b + bias_b + target_b)
    mapped, slope = map_radius(rho, per_block, cells, starts, pieces, STEPS, PIECES, P)
    blocks = tl.arange(0, P)
    at_sin = load_rows(grad_polar, blocks, BLOCKS, P, tl.float32)
    at_cos = load_rows(grad_polar + BLOCKS, blocks, BLOCKS, P, tl.float32)
    at_log = load_rows(grad_polar + 2 * BLOCKS, blocks, BLOCKS, P, tl.float32)
    at_origin = inverse == 0
    stretch = tl.where(at_origin, 0.0, at_log * slope / tl.where(at_origin, 1.0, mapped * rho * inverse))
    across = (at_sin * cos - at_cos * sin) * inverse
    d_a, d_b, factor = to_product(
        cos * stretch - sin * across - q_a, sin * stretch + cos * across - q_b, PRODUCT, PRECISION
    )
    if LEAK:
        leak_a, leak_b = apart(leak_pair, BLOCK_ROWS, P)
        leak_a, leak_b, leak_factor = to_product(-leak_a, -leak_b, PRODUCT, PRECISION)
    target = grad_y + rows * WIDTH
    tile = load_rows(grad_base, tl.arange(0, BLOCK_COLUMNS), WIDTH, BLOCK_COLUMNS, PRODUCT)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        ahead = load_ahead(grad_base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
        result = multiply_rebuild(d_a, d_b, rebuild, columns, P, PRODUCT, PRECISION) * factor[:, None]
        result += tile.to(tl.float32) * tl.load(per_column + columns)[None, :]
        tile = ahead
        if LEAK:
            leak = multiply_rebuild(leak_a, leak_b, leak_rebuild, columns, P, PRODUCT, PRECISION)
            result += leak * leak_factor[:, None]
        store_rows(target, columns, inside, result, WIDTH, BLOCK_COLUMNS)
