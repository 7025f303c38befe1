"""Kernel of ``decode``.

    step = a_v tanh(dv)    u = v0 + step    k = c^ - Q^T step (project) or c^    w = Q k + u    e = Norm(Norm(w) + g)

With Q^T Q = I    |w|^2 = k.k + 2 k.Q^T u + u.u    w.g = k.Q^T g + u.g,   so that the row is rebuilt once; otherwise
(FORMS false) it is rebuilt once more for its norms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import (
    columns_back,
    ended,
    halves,
    identity,
    joined_gradient,
    joined_sums,
    load_ahead,
    load_joined,
    load_rows,
    multiply_project,
    multiply_rebuild,
    no_sums,
    part_of_blocks,
    parts_of,
    product_sums,
    row_scales,
    row_sums,
    sine_cosine,
    store_rows,
    tanh,
    to_product,
    together,
)
from aniso_ext.ops.triton.maps import block_row


@triton.jit
def turned_blocks(state, deltas, blocks, a_theta, a_rho, BLOCKS: tl.constexpr, P: tl.constexpr):
    """What moves the blocks of a row: rho^, cos and sin of theta^ and of the increment, both tanh."""
    sin0 = load_rows(state, blocks, BLOCKS, P, tl.float32)
    cos0 = load_rows(state + BLOCKS, blocks, BLOCKS, P, tl.float32)
    log_rho = load_rows(state + 2 * BLOCKS, blocks, BLOCKS, P, tl.float32)
    tanh_theta = tanh(load_rows(deltas, blocks, BLOCKS, P, tl.float32), False)
    tanh_rho = tanh(load_rows(deltas + BLOCKS, blocks, BLOCKS, P, tl.float32), False)
    step_sin, step_cos = sine_cosine(a_theta * tanh_theta)
    # blocks that only pad have no radius
    radius = tl.where((blocks < BLOCKS)[None, :], tl.exp(log_rho + a_rho * tanh_rho), 0.0)
    cos = cos0 * step_cos - sin0 * step_sin
    sin = sin0 * step_cos + cos0 * step_sin
    return radius, cos, sin, step_cos, step_sin, tanh_theta, tanh_rho


@triton.jit
def coefficient_parts(
    state, deltas, u_a, u_b, step_a, step_b, first, per_block, a_theta, a_rho, BLOCKS: tl.constexpr, P: tl.constexpr,
    SHIFTED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k as a product takes it, its factor, k.k + 2 k.Q^T u and k.Q^T g, of blocks from ``first`` on; from Q^T u, less
    the step that has coordinates of its own."""
    if PARTS == 1:
        blocks = part_of_blocks(first, u_a.shape[1], P)
        radius, cos, sin, _, _, _, _ = turned_blocks(state, deltas, blocks, a_theta, a_rho, BLOCKS, P)
        a, b, factor = to_product(radius * cos - step_a, radius * sin - step_b, PRODUCT, PRECISION)
        k_a = a.to(tl.float32) * factor[:, None]
        k_b = b.to(tl.float32) * factor[:, None]
        squares = tl.sum(k_a * (k_a + 2.0 * (u_a + step_a)) + k_b * (k_b + 2.0 * (u_b + step_b)), axis=1)
        dot_shift = tl.zeros_like(squares)
        if SHIFTED:
            at = blocks[None, :]
            dot_shift = tl.sum(k_a * block_row(per_block, 7, at, P) + k_b * block_row(per_block, 8, at, P), axis=1)
        return a, b, factor, squares, dot_shift
    else:
        low_u_a, high_u_a = halves(u_a)
        low_u_b, high_u_b = halves(u_b)
        low_a, high_a = halves(step_a)
        low_b, high_b = halves(step_b)
        low_a, low_b, factor, squares, dot_shift = coefficient_parts(
            state, deltas, low_u_a, low_u_b, low_a, low_b, first, per_block, a_theta, a_rho, BLOCKS, P, SHIFTED,
            PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        high_a, high_b, _, more_squares, more_dot_shift = coefficient_parts(
            state, deltas, high_u_a, high_u_b, high_a, high_b, first + u_a.shape[1] // 4, per_block, a_theta, a_rho,
            BLOCKS, P, SHIFTED, PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return (
            together(low_a, high_a), together(low_b, high_b), factor, squares + more_squares,
            dot_shift + more_dot_shift,
        )  # fmt: skip


@triton.jit
def updated_tile(
    v0, move, columns, a_v, a, b, factor, rebuild, P: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """A tile of w from tiles of v0 and dv."""
    moved = multiply_rebuild(a, b, rebuild, columns, P, PRODUCT, PRECISION) * factor[:, None]
    return moved + (v0.to(tl.float32) + a_v * tanh(move, FAST))


@triton.jit(do_not_specialize=["count"])
def decode_kernel(
    state, deltas, out, project, rebuild, per_block, per_column, scalars,
    count, state_stride, deltas_stride, a_theta, a_rho, a_v,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, FORMS: tl.constexpr,
    JOINED: tl.constexpr, SHIFTED: tl.constexpr, PROJECT: tl.constexpr, FAST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    read = tl.minimum(rows, count - 1)
    state += read * state_stride
    deltas += read * deltas_stride
    state_v = state + 3 * BLOCKS
    moves = deltas + 2 * BLOCKS
    # without the projection of the step, one pair of sums has Q^T u
    u_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    step_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    squares = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        step = a_v * tanh(load_rows(moves, columns, WIDTH, BLOCK_COLUMNS, PRODUCT), FAST)
        if PROJECT:
            step_pair = multiply_project(step.to(PRODUCT), project, columns, step_pair, P, PADDED, PRODUCT, PRECISION)
        if FORMS:
            v0 = load_rows(state_v, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            u = v0.to(tl.float32) + step
            if not PROJECT:
                v0 = u.to(PRODUCT)
            u_pair = multiply_project(v0, project, columns, u_pair, P, PADDED, PRODUCT, PRECISION)
            squares += row_sums(u * u, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if SHIFTED and JOINED:
                weights = tl.trans(load_joined(project, columns, P, PADDED, PRODUCT))
                joined = tl.dot(v0, weights, joined)
                if PROJECT:
                    joined = tl.dot(step.to(PRODUCT), weights, joined)
            elif SHIFTED:
                shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                dot_shift += row_sums(u * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            u_pair = ended(u_pair, PRODUCT)
            if JOINED:
                joined = ended(joined, PRODUCT)
    u_a, u_b = halves(u_pair)
    step_a, step_b = halves(step_pair)
    a, b, factor, cross, along_shift = coefficient_parts(
        state, deltas, u_a, u_b, step_a, step_b, 0, per_block, a_theta, a_rho, BLOCKS, P, SHIFTED, PRODUCT, PRECISION,
        parts_of(PRODUCT, P),
    )  # fmt: skip
    if FORMS:
        squares = tl.sum(squares, axis=1) + cross
        dot_shift = tl.sum(dot_shift, axis=1) + along_shift
        if JOINED:
            _, of_shift = joined_sums(joined)
            dot_shift += tl.load(scalars + 4) * of_shift
    else:
        rebuilt_squares = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        rebuilt_shift = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            v0 = load_rows(state_v, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            move = load_rows(moves, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = updated_tile(v0, move, columns, a_v, a, b, factor, rebuild, P, PRODUCT, PRECISION, FAST)
            rebuilt_squares += product_sums(w * w, BLOCK_ROWS, BLOCK_COLUMNS)
            if SHIFTED:
                shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                rebuilt_shift += product_sums(w * shift, BLOCK_ROWS, BLOCK_COLUMNS)
        squares, dot_shift = tl.sum(rebuilt_squares, axis=1), tl.sum(rebuilt_shift, axis=1)
    inverse, outer, _, _ = row_scales(squares, dot_shift, tl.load(scalars + 3), SHIFTED)
    row_factor = inverse * outer
    target = out + rows * WIDTH
    first = columns_back(0, WIDTH, BLOCK_COLUMNS)
    if JOINED:
        of_shift = tl.load(scalars + 4) / inverse
        joined = joined_gradient(tl.zeros_like(of_shift), of_shift, PRODUCT)
        kept = identity(1.0, BLOCK_COLUMNS, PRODUCT)
        move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            move_ahead = load_ahead(moves, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = multiply_rebuild(a, b, rebuild, columns, P, PRODUCT, PRECISION)
            if SHIFTED:
                w = tl.dot(joined, load_joined(project, columns, P, PADDED, PRODUCT), w)
            v0 = load_rows(state_v, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = tl.dot(v0, kept, w) + a_v * tanh(move, FAST)
            move = move_ahead
            store_rows(target, columns, inside, w * row_factor[:, None], WIDTH, BLOCK_COLUMNS)
    else:
        v0 = load_rows(state_v, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            v0_ahead = load_ahead(state_v, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            move_ahead = load_ahead(moves, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = updated_tile(v0, move, columns, a_v, a, b, factor, rebuild, P, PRODUCT, PRECISION, FAST)
            v0 = v0_ahead
            move = move_ahead
            e = row_factor[:, None] * w
            if SHIFTED:
                e += tl.load(per_column + 2 * PADDED + columns)[None, :] * outer[:, None]
            store_rows(target, columns, inside, e, WIDTH, BLOCK_COLUMNS)
