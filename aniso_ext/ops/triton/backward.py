"""Gradients of ``correct``: t is the gradient at a row e, grad_w = alpha t - beta w - gamma g (common.row_gradient).

SPLIT false (forward.py): with h = Q^T t, w.t = k.h + s y.t + o.t, so that everything happens in the coordinates of Q,

    grad_k = alpha h - beta (k + s p + Q^T o) - gamma Q^T g        d = map_backward(grad_k) - s grad_k
    grad_y = Q (d - s beta k) + s alpha t - s^2 beta y - s (beta o + gamma g)

two projections in one walk and one product to rebuild; y and t are read, grad_y is written. SPLIT true: rows are
rebuilt for their norms, again for n = Q^T grad_w and m = Q^T D_V grad_w, and once more for

    grad_y = Q (map_backward(n) - m) + D_V grad_w,   with Q' (-n) added for the leak's projection Q'
"""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import (
    LEAST_NORMAL,
    accumulate,
    afresh,
    block_pair,
    columns_back,
    ended,
    halves,
    identity,
    joined_gradient,
    joined_sums,
    load_ahead,
    load_basis,
    load_joined,
    load_rows,
    multiply_project,
    multiply_rebuild,
    no_sums,
    part_of_blocks,
    parts_of,
    product_sums,
    row_gradient,
    row_sums,
    store_rows,
    to_product,
    together,
)
from aniso_ext.ops.triton.forward import coordinates, split_rows
from aniso_ext.ops.triton.maps import block_row, map_backward, map_radius, polar


@triton.jit
def walk_pairs(
    base, grad_base, project, per_column, WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr,
    SHIFTED: tl.constexpr, JOINED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q^T y, Q^T t and the six dot products of y, t, o and g; JOINED: those with o and g in units of scalars[4]."""
    pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    h_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    squares = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_offset = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_grad = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    grad_offset = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    grad_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    grad_joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        grad = load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        pointers = project + columns[:, None] + tl.arange(0, 2 * P)[None, :] * PADDED
        weights = load_basis(pointers, PRODUCT, PRECISION)
        pair = accumulate(tile, weights, pair, PRODUCT, PRECISION)
        h_pair = accumulate(grad, weights, h_pair, PRODUCT, PRECISION)
        if PRODUCT == tl.float16:  # the rounding errors of the basis
            weights = tl.load(pointers + 2 * P * PADDED)
            pair = tl.dot(tile, weights, pair)
            h_pair = tl.dot(grad, weights, h_pair)
        y, t = tile.to(tl.float32), grad.to(tl.float32)
        squares += row_sums(y * y, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
        dot_grad += row_sums(y * t, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
        if JOINED:
            weights = tl.trans(load_joined(project, columns, P, PADDED, PRODUCT))
            joined = tl.dot(tile, weights, joined)
            grad_joined = tl.dot(grad, weights, grad_joined)
        else:
            offset = tl.load(per_column + PADDED + columns)[None, :]
            dot_offset += row_sums(y * offset, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            grad_offset += row_sums(t * offset, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if SHIFTED:
                shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                dot_shift += row_sums(y * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
                grad_shift += row_sums(t * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
        if JOINED:
            grad_joined = ended(grad_joined, PRODUCT)
        else:
            h_pair = ended(h_pair, PRODUCT)
    a, b = halves(pair)
    h_a, h_b = halves(h_pair)
    squares, dot_grad = tl.sum(squares, axis=1), tl.sum(dot_grad, axis=1)
    if JOINED:
        dot_offset, dot_shift = joined_sums(joined)
        grad_offset, grad_shift = joined_sums(grad_joined)
    else:
        dot_offset, dot_shift = tl.sum(dot_offset, axis=1), tl.sum(dot_shift, axis=1)
        grad_offset, grad_shift = tl.sum(grad_offset, axis=1), tl.sum(grad_shift, axis=1)
    return a, b, h_a, h_b, squares, dot_offset, dot_shift, dot_grad, grad_offset, grad_shift


@triton.jit
def mapped_blocks(
    p_a, p_b, first, scale, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Polar coordinates, T(rho), its slope, and k; from p, of blocks from ``first`` on."""
    blocks = part_of_blocks(first, p_a.shape[1], P)[None, :]
    c_a = p_a + block_row(per_block, 0, blocks, P)
    c_b = p_b + block_row(per_block, 1, blocks, P)
    turned_a, turned_b = c_a + block_row(per_block, 2, blocks, P), c_b + block_row(per_block, 3, blocks, P)
    rho, inverse, cos, sin = polar(turned_a, turned_b)
    mapped, slope = map_radius(rho, blocks, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, True)
    return rho, inverse, cos, sin, mapped, slope, mapped * cos - scale * c_a, mapped * sin - scale * c_b


@triton.jit
def product_parts(
    p_a, p_b, h_a, h_b, first, scale, per_block, table, buckets, starts, pieces, CELLS: tl.constexpr,
    STEPS: tl.constexpr, PIECES: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k.k + 2 k.(s p + Q^T o), k.Q^T g and k.h of blocks from ``first`` on."""
    if PARTS == 1:
        _, _, _, _, _, _, k_a, k_b = mapped_blocks(
            p_a, p_b, first, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P
        )
        blocks = part_of_blocks(first, p_a.shape[1], P)[None, :]
        rest_a = scale * p_a + block_row(per_block, 5, blocks, P)
        rest_b = scale * p_b + block_row(per_block, 6, blocks, P)
        squares = tl.sum(k_a * (k_a + 2.0 * rest_a) + k_b * (k_b + 2.0 * rest_b), axis=1)
        dot_shift = tl.zeros_like(squares)
        if SHIFTED:
            shift_a, shift_b = block_row(per_block, 7, blocks, P), block_row(per_block, 8, blocks, P)
            dot_shift = tl.sum(k_a * shift_a + k_b * shift_b, axis=1)
        return squares, dot_shift, tl.sum(k_a * h_a + k_b * h_b, axis=1)
    else:
        low_a, high_a = halves(p_a)
        low_b, high_b = halves(p_b)
        low_h_a, high_h_a = halves(h_a)
        low_h_b, high_h_b = halves(h_b)
        squares, dot_shift, dot_grad = product_parts(
            low_a, low_b, low_h_a, low_h_b, first, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS,
            PIECES, P, SHIFTED, PARTS // 2,
        )  # fmt: skip
        more_squares, more_dot_shift, more_dot_grad = product_parts(
            high_a, high_b, high_h_a, high_h_b, first + p_a.shape[1] // 4, scale, per_block, table, buckets, starts,
            pieces, CELLS, STEPS, PIECES, P, SHIFTED, PARTS // 2,
        )  # fmt: skip
        return squares + more_squares, dot_shift + more_dot_shift, dot_grad + more_dot_grad


@triton.jit
def gradient_parts(
    p_a, p_b, h_a, h_b, first, inverse_factor, alpha, beta, gamma, scale, per_block, table, buckets, starts, pieces,
    CELLS: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, P: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """d - s beta k, times a number for each row, as a product takes it, and its factor, of blocks from ``first`` on.

    The maps are looked up again: keeping what they gave until the norms are known takes more registers than there are.
    """
    if PARTS == 1:
        rho, inverse, cos, sin, mapped, slope, k_a, k_b = mapped_blocks(
            p_a, p_b, first, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P
        )
        blocks = part_of_blocks(first, p_a.shape[1], P)[None, :]
        rest_a = scale * p_a + block_row(per_block, 5, blocks, P)
        rest_b = scale * p_b + block_row(per_block, 6, blocks, P)
        shift_a, shift_b = block_row(per_block, 7, blocks, P), block_row(per_block, 8, blocks, P)
        h_a = alpha[:, None] * h_a - beta[:, None] * (k_a + rest_a) - gamma[:, None] * shift_a
        h_b = alpha[:, None] * h_b - beta[:, None] * (k_b + rest_b) - gamma[:, None] * shift_b
        d_a, d_b = map_backward(rho, inverse, cos, sin, mapped, slope, h_a, h_b)
        of_k = (scale * beta)[:, None]
        d_a = (d_a - (scale * h_a + of_k * k_a)) * inverse_factor[:, None]
        d_b = (d_b - (scale * h_b + of_k * k_b)) * inverse_factor[:, None]
        return to_product(d_a, d_b, PRODUCT, PRECISION)
    else:
        low_a, high_a = halves(p_a)
        low_b, high_b = halves(p_b)
        low_h_a, high_h_a = halves(h_a)
        low_h_b, high_h_b = halves(h_b)
        low_a, low_b, factor = gradient_parts(
            low_a, low_b, low_h_a, low_h_b, first, inverse_factor, alpha, beta, gamma, scale, per_block, table, buckets,
            starts, pieces, CELLS, STEPS, PIECES, P, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        high_a, high_b, _ = gradient_parts(
            high_a, high_b, high_h_a, high_h_b, first + p_a.shape[1] // 4, inverse_factor, alpha, beta, gamma, scale,
            per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return together(low_a, high_a), together(low_b, high_b), factor


@triton.jit(do_not_specialize=["count"])
def correct_backward_kernel(
    grad, y, grad_y, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, table,
    buckets, starts, pieces, count, grad_stride, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, SHIFTED: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    read = tl.minimum(rows, count - 1)
    base = y + read * row_stride
    grad_base = grad + read * grad_stride
    a, b, h_a, h_b, squares, dot_offset, dot_shift, dot_grad, grad_offset, grad_shift = walk_pairs(
        base, grad_base, project, per_column, WIDTH, PADDED, P, SHIFTED, JOINED, BLOCK_ROWS, BLOCK_COLUMNS,
        PRODUCT, PRECISION,
    )  # fmt: skip
    scale = tl.load(scalars)
    if JOINED:
        unit = tl.load(scalars + 4)
        dot_offset *= unit
        dot_shift *= unit
        grad_offset *= unit
        grad_shift *= unit
    cross, along_shift, along_grad = product_parts(
        a, b, h_a, h_b, 0, scale, per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, SHIFTED,
        parts_of(PRODUCT, P),
    )  # fmt: skip
    squares = cross + scale * (scale * squares + 2.0 * dot_offset) + tl.load(scalars + 1)
    dot_grad = along_grad + scale * dot_grad + grad_offset
    if SHIFTED:
        dot_shift = along_shift + scale * dot_shift + tl.load(scalars + 2)
    alpha, beta, gamma = row_gradient(squares, dot_shift, dot_grad, grad_shift, tl.load(scalars + 3), SHIFTED)
    # what the product is multiplied with: rows t are added to it as they are
    row_factor = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if JOINED:
        row_factor = unit * tl.where(alpha < LEAST_NORMAL, LEAST_NORMAL, alpha)
    product_a, product_b, factor = gradient_parts(
        afresh(a), afresh(b), h_a, h_b, 0, 1.0 / row_factor, alpha, beta, gamma, scale, per_block, table, buckets,
        starts, pieces, CELLS, STEPS, PIECES, P, PRODUCT, PRECISION, parts_of(PRODUCT, P),
    )  # fmt: skip
    beta *= scale
    gamma *= scale
    target = grad_y + rows * WIDTH
    if JOINED:
        kept = identity(tl.load(scalars + 5), BLOCK_COLUMNS, PRODUCT)
        joined = joined_gradient(-beta * unit / row_factor, -gamma * unit / row_factor, PRODUCT)
        beta *= unit / row_factor
        # with another tile of both on its way no two programs would fit
        for start in tl.range(0, WIDTH, BLOCK_COLUMNS, num_stages=2):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            result = multiply_rebuild(product_a, product_b, rebuild, columns, P, PRODUCT, PRECISION)
            result = tl.dot(joined, load_joined(project, columns, P, PADDED, PRODUCT), result)
            result = tl.dot(load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT), kept, result)
            result -= beta[:, None] * tl.dot(load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT), kept)
            store_rows(target, columns, inside, result * row_factor[:, None], WIDTH, BLOCK_COLUMNS)
    else:
        first = columns_back(0, WIDTH, BLOCK_COLUMNS)
        tile = load_rows(base, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        grad_tile = load_rows(grad_base, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            ahead = load_ahead(base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            grad_ahead = load_ahead(grad_base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            moved = multiply_rebuild(product_a, product_b, rebuild, columns, P, PRODUCT, PRECISION)
            # one tile of float32 to exchange between threads, where y and t apart would be two
            rest = (scale * alpha)[:, None] * grad_tile.to(tl.float32) - (scale * beta)[:, None] * tile.to(tl.float32)
            rest -= beta[:, None] * tl.load(per_column + PADDED + columns)[None, :]
            if SHIFTED:
                rest -= gamma[:, None] * tl.load(per_column + 2 * PADDED + columns)[None, :]
            result = moved * factor[:, None] + rest
            tile = ahead
            grad_tile = grad_ahead
            store_rows(target, columns, inside, result, WIDTH, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["count"])
def split_backward_kernel(
    grad, y, grad_y, project, rebuild, leak_project, leak_rebuild, per_block, per_column, scalars, table,
    buckets, starts, pieces, count, grad_stride, row_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, CELLS: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, LEAK: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    read = tl.minimum(rows, count - 1)
    base = y + read * row_stride
    grad_base = grad + read * grad_stride
    a, b, leak_a, leak_b, _, _, _ = coordinates(
        base, project, leak_project, per_block, per_column, WIDTH, PADDED, P, False, LEAK, False, False,
        BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT, PRECISION,
    )  # fmt: skip
    bias_a, bias_b = block_pair(per_block, 0, P)
    target_a, target_b = block_pair(per_block, 2, P)
    a += bias_a
    b += bias_b
    rho, inverse, cos, sin = polar(a + target_a, b + target_b)
    mapped, slope = map_radius(
        rho, tl.arange(0, P)[None, :], per_block, table, buckets, starts, pieces, CELLS, STEPS, PIECES, P, True
    )
    k_a, k_b = mapped * cos, mapped * sin
    if LEAK:
        k_a -= leak_a
        k_b -= leak_b
    k_a, k_b, k_factor = to_product(k_a, k_b, PRODUCT, PRECISION)
    c_a, c_b, c_factor = to_product(a, b, PRODUCT, PRECISION)

    squares = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    dot_shift = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    dot_grad = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    grad_shift = tl.zeros((BLOCK_ROWS, 8), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
        t = load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
        w = split_rows(
            base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, k_a, project, rebuild, per_column,
            WIDTH, PADDED, P, False, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
        squares += product_sums(w * w, BLOCK_ROWS, BLOCK_COLUMNS)
        dot_grad += product_sums(w * t, BLOCK_ROWS, BLOCK_COLUMNS)
        if SHIFTED:
            shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
            dot_shift += product_sums(w * shift, BLOCK_ROWS, BLOCK_COLUMNS)
            grad_shift += product_sums(t * shift, BLOCK_ROWS, BLOCK_COLUMNS)
    alpha, beta, gamma = row_gradient(
        tl.sum(squares, axis=1), tl.sum(dot_shift, axis=1), tl.sum(dot_grad, axis=1), tl.sum(grad_shift, axis=1),
        tl.load(scalars + 3), SHIFTED,
    )  # fmt: skip

    n_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    m_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        t = load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
        w = split_rows(
            base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, k_a, project, rebuild, per_column,
            WIDTH, PADDED, P, False, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
        grad_w = alpha[:, None] * t - beta[:, None] * w
        if SHIFTED:
            grad_w -= gamma[:, None] * tl.load(per_column + 2 * PADDED + columns)[None, :]
        n_pair = multiply_project(grad_w.to(PRODUCT), project, columns, n_pair, P, PADDED, PRODUCT, PRECISION)
        scaled = (grad_w * tl.load(per_column + columns)[None, :]).to(PRODUCT)
        m_pair = multiply_project(scaled, project, columns, m_pair, P, PADDED, PRODUCT, PRECISION)
    n_a, n_b = halves(n_pair)
    m_a, m_b = halves(m_pair)
    d_a, d_b = map_backward(rho, inverse, cos, sin, mapped, slope, n_a, n_b)
    d_a, d_b, d_factor = to_product(d_a - m_a, d_b - m_b, PRODUCT, PRECISION)
    if LEAK:
        n_a, n_b, n_factor = to_product(-n_a, -n_b, PRODUCT, PRECISION)

    target = grad_y + rows * WIDTH
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
        t = load_rows(grad_base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
        w = split_rows(
            base, columns, k_a, k_b, k_factor, c_a, c_b, c_factor, k_a, project, rebuild, per_column,
            WIDTH, PADDED, P, False, BLOCK_COLUMNS, PRODUCT, PRECISION,
        )  # fmt: skip
        grad_w = alpha[:, None] * t - beta[:, None] * w
        if SHIFTED:
            grad_w -= gamma[:, None] * tl.load(per_column + 2 * PADDED + columns)[None, :]
        result = grad_w * tl.load(per_column + columns)[None, :]
        result += multiply_rebuild(d_a, d_b, rebuild, columns, P, PRODUCT, PRECISION) * d_factor[:, None]
        if LEAK:
            leak = multiply_rebuild(n_a, n_b, leak_rebuild, columns, P, PRODUCT, PRECISION)
            result += leak * n_factor[:, None]
        store_rows(target, columns, inside, result, WIDTH, BLOCK_COLUMNS)
