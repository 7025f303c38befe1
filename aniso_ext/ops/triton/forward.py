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
    block_pair,
    columns_back,
    ended,
    halves,
    identity,
    joined_coefficients,
    joined_sums,
    load_ahead,
    load_joined,
    load_rows,
    multiply_project,
    multiply_rebuild,
    multiply_rebuild_two,
    no_sums,
    part_of_blocks,
    parts_of,
    product_sums,
    row_scales,
    row_sums,
    store_rows,
    to_product,
    together,
)
from aniso_ext.ops.triton.maps import RADIUS_EPS, block_row, map_radius


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
    JOINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """p, the leak p', and y.y, y.o, y.g of a block of rows in one walk over them; JOINED: y.o and y.g in units of
    scalars[4]."""
    pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    leak_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    squares = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_offset = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        pair = multiply_project(tile, project, columns, pair, P, PADDED, PRODUCT, PRECISION)
        if LEAK:
            leak_pair = multiply_project(tile, leak_project, columns, leak_pair, P, PADDED, PRODUCT, PRECISION)
        if SUMS:
            wide = tile.to(tl.float32)
            squares += row_sums(wide * wide, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if JOINED:
                weights = tl.trans(load_joined(project, columns, P, PADDED, PRODUCT))
                joined = tl.dot(tile, weights, joined)
            else:
                offset = tl.load(per_column + PADDED + columns)[None, :]
                dot_offset += row_sums(wide * offset, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
                if SHIFTED:
                    shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                    dot_shift += row_sums(wide * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if JOINED:
                joined = ended(joined, PRODUCT)
            else:
                pair = ended(pair, PRODUCT)
    a, b = halves(pair)
    leak_a, leak_b = block_pair(per_block, 9, P)
    if LEAK:
        more_a, more_b = halves(leak_pair)
        leak_a = more_a + leak_a
        leak_b = more_b + leak_b
    squares, dot_offset, dot_shift = tl.sum(squares, axis=1), tl.sum(dot_offset, axis=1), tl.sum(dot_shift, axis=1)
    if JOINED:
        dot_offset, dot_shift = joined_sums(joined)
    return a, b, leak_a, leak_b, squares, dot_offset, dot_shift


@triton.jit
def corrected(
    a, b, first, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """c_t and c^ from p, of blocks from ``first`` on."""
    blocks = part_of_blocks(first, a.shape[1], P)[None, :]
    a += block_row(per_block, 0, blocks, P)
    b += block_row(per_block, 1, blocks, P)
    # T(rho) (cos, sin) = T(rho)/length (a, b), without directions, which would need registers of their own
    turned_a, turned_b = a + block_row(per_block, 2, blocks, P), b + block_row(per_block, 3, blocks, P)
    squared = turned_a * turned_a + turned_b * turned_b
    rho = tl.sqrt(squared + RADIUS_EPS)
    mapped, _ = map_radius(rho, blocks, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, False)
    at_origin = squared < LEAST_NORMAL
    ratio = mapped / tl.sqrt(tl.where(at_origin, 1.0, squared))
    return a, b, tl.where(at_origin, mapped, turned_a * ratio), turned_b * ratio


@triton.jit
def split_coefficients(
    a, b, leak_a, leak_b, first, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr, LEAK: tl.constexpr, ROUNDED: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k and its factor, then c_t and its factor, as products take them if ROUNDED, of blocks from ``first`` on."""
    if PARTS == 1:
        c_a, c_b, k_a, k_b = corrected(a, b, first, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P)
        if LEAK:
            k_a -= leak_a
            k_b -= leak_b
        k_factor = tl.full((a.shape[0],), 1.0, tl.float32)
        c_factor = k_factor
        if ROUNDED:
            k_a, k_b, k_factor = to_product(k_a, k_b, PRODUCT, PRECISION)
            c_a, c_b, c_factor = to_product(c_a, c_b, PRODUCT, PRECISION)
        return k_a, k_b, k_factor, c_a, c_b, c_factor
    else:
        low_a, high_a = halves(a)
        low_b, high_b = halves(b)
        low_leak_a, low_leak_b, high_leak_a, high_leak_b = leak_a, leak_b, leak_a, leak_b
        if LEAK:
            low_leak_a, high_leak_a = halves(leak_a)
            low_leak_b, high_leak_b = halves(leak_b)
        low_k_a, low_k_b, k_factor, low_c_a, low_c_b, c_factor = split_coefficients(
            low_a, low_b, low_leak_a, low_leak_b, first, per_block, table, buckets, starts, pieces, CELLS, STEPS,
            PIECES, P, LEAK, ROUNDED, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        k_a, k_b, _, c_a, c_b, _ = split_coefficients(
            high_a, high_b, high_leak_a, high_leak_b, first + a.shape[1] // 4, per_block, table, buckets, starts,
            pieces, CELLS, STEPS, PIECES, P, LEAK, ROUNDED, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return (
            together(low_k_a, k_a), together(low_k_b, k_b), k_factor, together(low_c_a, c_a), together(low_c_b, c_b),
            c_factor,
        )  # fmt: skip


@triton.jit
def coefficients(
    a, b, first, scale, unit, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr, ROUNDED: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """k, as a product takes it, its factor, k.k + 2 k.(s p + Q^T o) and k.Q^T g, of blocks from ``first`` on."""
    c_a, c_b, k_a, k_b = corrected(a, b, first, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P)
    k_a -= scale * c_a
    k_b -= scale * c_b
    if ROUNDED:
        k_a /= unit
        k_b /= unit
        k_a, k_b, factor = to_product(k_a, k_b, PRODUCT, PRECISION)
    else:
        factor = tl.full((a.shape[0],), 1.0, tl.float32)
    # the norms are those of the row that is built, from rounded coefficients
    wide_a = k_a.to(tl.float32) * factor[:, None]
    wide_b = k_b.to(tl.float32) * factor[:, None]
    if ROUNDED:
        wide_a *= unit
        wide_b *= unit
    blocks = part_of_blocks(first, a.shape[1], P)[None, :]
    rest_a = scale * a + block_row(per_block, 5, blocks, P)
    rest_b = scale * b + block_row(per_block, 6, blocks, P)
    squares = tl.sum(wide_a * (wide_a + 2.0 * rest_a) + wide_b * (wide_b + 2.0 * rest_b), axis=1)
    dot_shift = tl.zeros_like(squares)
    if SHIFTED:
        shift_a, shift_b = block_row(per_block, 7, blocks, P), block_row(per_block, 8, blocks, P)
        dot_shift = tl.sum(wide_a * shift_a + wide_b * shift_b, axis=1)
    return k_a, k_b, factor, squares, dot_shift


@triton.jit
def coefficients_in_parts(
    a, b, first, scale, unit, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr, ROUNDED: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The same, one part of the blocks after the other, so that few registers hold what is computed on the way."""
    if PARTS == 1:
        return coefficients(
            a, b, first, scale, unit, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, SHIFTED,
            ROUNDED, PRODUCT, PRECISION,
        )  # fmt: skip
    else:
        low_a, high_a = halves(a)
        low_b, high_b = halves(b)
        low_a, low_b, factor, squares, dot_shift = coefficients_in_parts(
            low_a, low_b, first, scale, unit, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P,
            SHIFTED, ROUNDED, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        high_a, high_b, _, more_squares, more_dot_shift = coefficients_in_parts(
            high_a, high_b, first + a.shape[1] // 4, scale, unit, per_block, table, buckets, starts, pieces, CELLS,
            STEPS, PIECES, P, SHIFTED, ROUNDED, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return (
            together(low_a, high_a), together(low_b, high_b), factor, squares + more_squares,
            dot_shift + more_dot_shift,
        )  # fmt: skip


@triton.jit
def rebuilt_sums(
    base, k_a, k_b, k_factor, c_a, c_b, c_factor, joined, project, rebuild, per_column, WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    P: tl.constexpr, SHIFTED: tl.constexpr, JOINED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """|w|^2 and w.g of rebuilt rows."""
    squares = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    dot_shift = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
        if SHIFTED:
            shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
        w = split_rows(
            base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, joined, project, rebuild, per_column,
            WIDTH, PADDED, P, JOINED, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
        squares += product_sums(w * w, BLOCK_ROWS, BLOCK_COLUMNS)
        if SHIFTED:
            dot_shift += product_sums(w * shift, BLOCK_ROWS, BLOCK_COLUMNS)
    return tl.sum(squares, axis=1), tl.sum(dot_shift, axis=1)


@triton.jit
def split_rows(
    base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, joined, project, rebuild, per_column, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, P: tl.constexpr, JOINED: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of w = Q k + D_V (y - Q c_t) + o; JOINED: from -c_t, and with |w| g on top if ``joined`` asks for it."""
    if JOINED:
        scale = tl.load(per_column + columns)[None, :]
        kept, outside = multiply_rebuild_two(k_a, k_b, c_a, c_b, rebuild, columns, P, PRODUCT, PRECISION)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        outside = tl.dot(tile, identity(1.0, BLOCK_COLUMNS, PRODUCT), outside)
        weights = load_joined(project, columns, P, PADDED, PRODUCT)
        kept = tl.dot(joined, weights, kept)
        return kept + outside * scale
    tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
    moved, inside = multiply_rebuild_two(k_a, k_b, c_a, c_b, rebuild, columns, P, PRODUCT, PRECISION)
    outside = (tile - inside * c_factor[:, None]) * tl.load(per_column + columns)[None, :]
    return moved * k_factor[:, None] + outside + tl.load(per_column + PADDED + columns)[None, :]


@triton.jit(do_not_specialize=["count"])
def correct_kernel(
    y, out, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, table, buckets, starts,
    pieces, count, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, SHIFTED: tl.constexpr, JOINED: tl.constexpr,
    ONLY_SUMS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
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
        base, project, leak_project, per_block, per_column, WIDTH, PADDED, P, not SPLIT, LEAK, SHIFTED, JOINED,
        BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
    )  # fmt: skip
    shift_squares = tl.load(scalars + 3)
    scale = tl.load(scalars)
    unit = 1.0
    if JOINED:
        unit = tl.load(scalars + 4)
        dot_offset *= unit
        dot_shift *= unit
    if SPLIT:
        product_a, product_b, factor, inner_a, inner_b, inner_factor = split_coefficients(
            a, b, leak_a, leak_b, 0, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, LEAK,
            not ONLY_SUMS, PRODUCT, PRECISION, parts_of(PRODUCT, P),
        )  # fmt: skip
        if ONLY_SUMS:
            k_a, k_b, c_a, c_b = product_a, product_b, inner_a, inner_b
            product_a, product_b, factor = to_product(k_a, k_b, PRODUCT, PRECISION)
            inner_a, inner_b, inner_factor = to_product(c_a, c_b, PRODUCT, PRECISION)
        if JOINED:  # c_t is taken away
            inner_a, inner_b = -inner_a, -inner_b
        joined = joined_coefficients(tl.zeros((BLOCK_ROWS,), tl.float32), PRODUCT)
        squares, dot_shift = rebuilt_sums(
            base, product_a, product_b, factor, inner_a, inner_b, inner_factor, joined, project, rebuild, per_column,
            WIDTH, PADDED, P, SHIFTED, JOINED, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
    else:
        product_a, product_b, factor, cross, along_shift = coefficients_in_parts(
            a, b, 0, scale, unit, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, SHIFTED,
            not ONLY_SUMS, PRODUCT, PRECISION, parts_of(PRODUCT, P),
        )  # fmt: skip
        k_a, k_b = product_a, product_b
        squares = cross + scale * (scale * squares + 2.0 * dot_offset) + tl.load(scalars + 1)
        if SHIFTED:
            dot_shift = along_shift + scale * dot_shift + tl.load(scalars + 2)
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
        joined = joined_coefficients(1.0 / inverse, PRODUCT)
        if JOINED and not SPLIT:
            row_factor *= unit
            kept = identity(tl.load(scalars + 5), BLOCK_COLUMNS, PRODUCT)
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
                w = multiply_rebuild(product_a, product_b, rebuild, columns, P, PRODUCT, PRECISION)
                w = tl.dot(joined, load_joined(project, columns, P, PADDED, PRODUCT), w)
                tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
                w = tl.dot(tile, kept, w)
                store_rows(target, columns, inside, w * row_factor[:, None], WIDTH, BLOCK_COLUMNS)
        else:
            if not SPLIT:
                tile = load_rows(base, columns_back(0, WIDTH, BLOCK_COLUMNS), WIDTH, BLOCK_COLUMNS, PRODUCT)
            for start in range(0, WIDTH, BLOCK_COLUMNS):
                if SPLIT:
                    columns = start + tl.arange(0, BLOCK_COLUMNS)
                    e = row_factor[:, None] * split_rows(
                        base, columns, product_a, product_b, factor, inner_a, inner_b, inner_factor, joined, project,
                        rebuild, per_column, WIDTH, PADDED, P, JOINED, BLOCK_COLUMNS, PRODUCT, PRECISION,
                    )  # fmt: skip
                else:
                    columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
                    ahead = load_ahead(base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
                    moved = multiply_rebuild(product_a, product_b, rebuild, columns, P, PRODUCT, PRECISION)
                    # factors of a row come last: what is exchanged between threads is then the tile as it was loaded
                    w = moved * factor[:, None] + tile.to(tl.float32) * scale
                    e = row_factor[:, None] * (w + tl.load(per_column + PADDED + columns)[None, :])
                    tile = ahead
                if SHIFTED and not (SPLIT and JOINED):
                    e += tl.load(per_column + 2 * PADDED + columns)[None, :] * outer[:, None]
                store_rows(target, columns, inside, e, WIDTH, BLOCK_COLUMNS)
