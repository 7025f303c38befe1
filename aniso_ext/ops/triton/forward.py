"""Kernels of ``correct`` and ``correct_sums``.

    p = Q^T y     c_t = p + bias     c^ = T(rho) (cos, sin) of c_t + target     e = Norm(Norm(w) + g)

SPLIT false, a scalar complement s:   w = Q k + s y + o,  k = c^ - s c_t, and with Q^T Q = I

    |w|^2 = k.k + 2 k.(s p + Q^T o) + s^2 y.y + 2 s y.o + o.o        w.g = k.Q^T g + s y.g + o.g

so that both norms are known before the row is rebuilt: D R multiplications twice, the row read once from memory and
once more from the cache, one write. SPLIT true:   w = Q k + D_V (y - Q c_t) + o,  k = c^ minus the leak p' of
diagonal_projected; the row is rebuilt twice, once for its norms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import (
    LEAST_NORMAL,
    RADIUS_EPS,
    apart,
    block_pair,
    load_ahead,
    load_rows,
    map_radius,
    multiply_project,
    multiply_rebuild,
    multiply_rebuild_two,
    no_sums,
    product_sums,
    row_scales,
    row_sums,
    store_rows,
    to_product,
)


@triton.jit
def coordinates(
    base,
    project,
    leak_project,
    per_block,
    per_column,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    P: tl.constexpr,
    SUMS: tl.constexpr,
    LEAK: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p, the leak p', and y.y, y.o, y.g of a block of rows in one walk over them."""
    pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    leak_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    squares = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_offset = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        pair = multiply_project(tile, project, columns, pair, P, PADDED, PRODUCT, PRECISION)
        if LEAK:
            leak_pair = multiply_project(tile, leak_project, columns, leak_pair, P, PADDED, PRODUCT, PRECISION)
        if SUMS:
            wide = tile.to(tl.float32)
            squares += row_sums(wide * wide, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            offset = tl.load(per_column + PADDED + columns)[None, :]
            dot_offset += row_sums(wide * offset, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if SHIFTED:
                shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                dot_shift += row_sums(wide * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    a, b = apart(pair, BLOCK_ROWS, P)
    leak_a, leak_b = block_pair(per_block, 9, P)
    if LEAK:
        more_a, more_b = apart(leak_pair, BLOCK_ROWS, P)
        leak_a = more_a + leak_a
        leak_b = more_b + leak_b
    return a, b, leak_a, leak_b, tl.sum(squares, axis=1), tl.sum(dot_offset, axis=1), tl.sum(dot_shift, axis=1)


@triton.jit
def corrected(a, b, per_block, cells, starts, pieces, STEPS: tl.constexpr, PIECES: tl.constexpr, P: tl.constexpr):
    """c_t and c^ from p."""
    bias_a, bias_b = block_pair(per_block, 0, P)
    target_a, target_b = block_pair(per_block, 2, P)
    a += bias_a
    b += bias_b
    # T(rho) (cos, sin) = T(rho)/length (a, b), without directions, which would need registers of their own
    turned_a, turned_b = a + target_a, b + target_b
    squared = turned_a * turned_a + turned_b * turned_b
    rho = tl.sqrt(squared + RADIUS_EPS)
    mapped, _ = map_radius(rho, per_block, cells, starts, pieces, STEPS, PIECES, P)
    at_origin = squared < LEAST_NORMAL
    ratio = mapped / tl.sqrt(tl.where(at_origin, 1.0, squared))
    return a, b, tl.where(at_origin, mapped, turned_a * ratio), turned_b * ratio


@triton.jit
def rebuilt_sums(
    base, k_a, k_b, k_factor, c_a, c_b, c_factor, rebuild, per_column, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    P: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """|w|^2 and w.g of rebuilt rows."""
    squares = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    dot_shift = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        w = split_rows(
            base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, rebuild, per_column,
            WIDTH, PADDED, P, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
        squares += product_sums(w * w, BLOCK_ROWS, BLOCK_COLUMNS)
        if SHIFTED:
            shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
            dot_shift += product_sums(w * shift, BLOCK_ROWS, BLOCK_COLUMNS)
    return tl.sum(squares, axis=1), tl.sum(dot_shift, axis=1)


@triton.jit
def split_rows(
    base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, rebuild, per_column, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, P: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of w = Q k + D_V (y - Q c_t) + o."""
    tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
    moved, inside = multiply_rebuild_two(k_a, k_b, c_a, c_b, rebuild, columns, P, PRODUCT, PRECISION)
    outside = (tile - inside * c_factor[:, None]) * tl.load(per_column + columns)[None, :]
    return moved * k_factor[:, None] + outside + tl.load(per_column + PADDED + columns)[None, :]


@triton.jit(do_not_specialize=["count"])
def correct_kernel(
    y, out, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, cells, starts, pieces,
    count, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr,
    SPLIT: tl.constexpr, LEAK: tl.constexpr, SHIFTED: tl.constexpr, ONLY_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows e into ``out`` [N, D]; ONLY_SUMS: weighted sums of what e' is made of into ``out``, for each
    program PADDED columns of y, then P each of k_a, k_b, the weight, and if SPLIT c_a and c_b.

    sum_i e'_i = Q sum k_i/n_i + D_V (sum y_i/n_i - Q sum c_i/n_i) + o sum 1/n_i needs no row to be rebuilt; the
    sums of a block of rows are float32, their order is that of the rows.
    """
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    # rows past the end read the last one again, which needs no mask, and are not stored
    base = y + tl.minimum(rows, count - 1) * row_stride
    a, b, leak_a, leak_b, squares, dot_offset, dot_shift = coordinates(
        base, project, leak_project, per_block, per_column, WIDTH, PADDED, P, not SPLIT, LEAK, SHIFTED,
        BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
    )  # fmt: skip
    c_a, c_b, k_a, k_b = corrected(a, b, per_block, cells, starts, pieces, STEPS, PIECES, P)
    shift_squares = tl.load(scalars + 3)
    scale = tl.load(scalars)
    if SPLIT:
        if LEAK:
            k_a -= leak_a
            k_b -= leak_b
        product_a, product_b, factor = to_product(k_a, k_b, PRODUCT, PRECISION)
        inner_a, inner_b, inner_factor = to_product(c_a, c_b, PRODUCT, PRECISION)
        squares, dot_shift = rebuilt_sums(
            base, product_a, product_b, factor, inner_a, inner_b, inner_factor, rebuild, per_column,
            WIDTH, PADDED, P, SHIFTED, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
    else:
        k_a -= scale * c_a
        k_b -= scale * c_b
        product_a, product_b, factor = to_product(k_a, k_b, PRODUCT, PRECISION)
        if not ONLY_SUMS:
            # the norms are those of the row that is built, from rounded coefficients
            k_a = product_a.to(tl.float32) * factor[:, None]
            k_b = product_b.to(tl.float32) * factor[:, None]
        offset_a, offset_b = block_pair(per_block, 5, P)
        cross = k_a * (k_a + 2.0 * (scale * a + offset_a)) + k_b * (k_b + 2.0 * (scale * b + offset_b))
        squares = tl.sum(cross, axis=1) + scale * (scale * squares + 2.0 * dot_offset) + tl.load(scalars + 1)
        if SHIFTED:
            shift_a, shift_b = block_pair(per_block, 7, P)
            dot_shift = tl.sum(k_a * shift_a + k_b * shift_b, axis=1) + scale * dot_shift + tl.load(scalars + 2)
    inverse, outer, _, _ = row_scales(squares, dot_shift, shift_squares, SHIFTED)

    if ONLY_SUMS:
        weight = tl.where(inside, inverse, 0.0)
        blocks = tl.arange(0, P)
        sums = out + program * (PADDED + (5 if SPLIT else 3) * P)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
            tl.store(sums + columns, tl.sum(tile * weight[:, None], axis=0))
        tl.store(sums + PADDED + blocks, tl.sum(k_a * weight[:, None], axis=0))
        tl.store(sums + PADDED + P + blocks, tl.sum(k_b * weight[:, None], axis=0))
        # summed as P equal columns: Triton 3.6 cannot compile the sum of a vector for tensor memory (sm_100)
        weights = tl.zeros((BLOCK_ROWS, P), tl.float32) + weight[:, None]
        tl.store(sums + PADDED + 2 * P + blocks, tl.sum(weights, axis=0))
        if SPLIT:
            tl.store(sums + PADDED + 3 * P + blocks, tl.sum(c_a * weight[:, None], axis=0))
            tl.store(sums + PADDED + 4 * P + blocks, tl.sum(c_b * weight[:, None], axis=0))
    else:
        row_factor = inverse * outer
        target = out + rows * WIDTH
        tile = load_rows(base, tl.arange(0, BLOCK_COLUMNS), WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            if SPLIT:
                e = row_factor[:, None] * split_rows(
                    base, columns, product_a, product_b, factor, inner_a, inner_b, inner_factor, rebuild, per_column,
                    WIDTH, PADDED, P, BLOCK_COLUMNS, PRODUCT, PRECISION,
                )  # fmt: skip
            else:
                ahead = load_ahead(base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
                moved = multiply_rebuild(product_a, product_b, rebuild, columns, P, PRODUCT, PRECISION)
                # factors of a row come last: what is exchanged between threads is then the tile as it was loaded
                w = moved * factor[:, None] + tile.to(tl.float32) * scale
                e = row_factor[:, None] * (w + tl.load(per_column + PADDED + columns)[None, :])
                tile = ahead
            if SHIFTED:
                e += tl.load(per_column + 2 * PADDED + columns)[None, :] * outer[:, None]
            store_rows(target, columns, inside, e, WIDTH, BLOCK_COLUMNS)
