"""Kernels of ``decode`` and its gradient.

    step = a_v tanh(dv)    u = v0 + step    k = c^ - Q^T step (project) or c^    w = Q k + u    e = Norm(Norm(w) + g)

With Q^T Q = I    |w|^2 = k.k + 2 k.Q^T u + u.u    w.g = k.Q^T g + u.g,   so that the row is rebuilt once; otherwise
(FORMS false) it is rebuilt once more for its norms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import (
    apart,
    block_pair,
    block_row,
    halves,
    identity,
    joined_gradient,
    joined_sums,
    load_ahead,
    load_joined,
    load_rows,
    multiply_project,
    multiply_rebuild,
    multiply_rebuild_two,
    no_sums,
    parts_of,
    product_sums,
    row_gradient,
    row_scales,
    row_sums,
    sine_cosine,
    store_rows,
    tanh,
    to_product,
    together,
)


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
        blocks = first + tl.arange(0, u_a.shape[1])
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
            state, deltas, high_u_a, high_u_b, high_a, high_b, first + u_a.shape[1] // 2, per_block, a_theta, a_rho,
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
                joined = tl.dot(v0, weights, joined, input_precision=PRECISION)
                if PROJECT:
                    joined = tl.dot(step.to(PRODUCT), weights, joined, input_precision=PRECISION)
            elif SHIFTED:
                shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                dot_shift += row_sums(u * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    u_a, u_b = apart(u_pair, BLOCK_ROWS, P)
    step_a, step_b = apart(step_pair, BLOCK_ROWS, P)
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
    first = tl.arange(0, BLOCK_COLUMNS)
    if JOINED:
        of_shift = tl.load(scalars + 4) / inverse
        joined = joined_gradient(tl.zeros_like(of_shift), of_shift, PRODUCT)
        kept = identity(1.0, BLOCK_COLUMNS, PRODUCT)
        move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            move_ahead = load_ahead(moves, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = multiply_rebuild(a, b, rebuild, columns, P, PRODUCT, PRECISION)
            if SHIFTED:
                w = tl.dot(joined, load_joined(project, columns, P, PADDED, PRODUCT), w, input_precision=PRECISION)
            v0 = load_rows(state_v, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = tl.dot(v0, kept, w, input_precision=PRECISION) + a_v * tanh(move, FAST)
            move = move_ahead
            store_rows(target, columns, inside, w * row_factor[:, None], WIDTH, BLOCK_COLUMNS)
        return
    v0 = load_rows(state_v, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
    move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        v0_ahead = load_ahead(state_v, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
        move_ahead = load_ahead(moves, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
        w = updated_tile(v0, move, columns, a_v, a, b, factor, rebuild, P, PRODUCT, PRECISION, FAST)
        v0 = v0_ahead
        move = move_ahead
        e = row_factor[:, None] * w
        if SHIFTED:
            e += tl.load(per_column + 2 * PADDED + columns)[None, :] * outer[:, None]
        store_rows(target, columns, inside, e, WIDTH, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["count"])
def decode_backward_kernel(
    grad, state, deltas, grad_state, grad_deltas, project, rebuild, per_block, per_column, scalars,
    count, grad_stride, state_stride, deltas_stride, a_theta, a_rho, a_v,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr, FORMS: tl.constexpr,
    JOINED: tl.constexpr, SHIFTED: tl.constexpr, PROJECT: tl.constexpr, FAST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With t at e, h = Q^T t and grad_w = alpha t - beta w - gamma g (common.row_gradient), in one rebuilding walk:

    grad_v0 = grad_w    grad_k = Q^T grad_w = alpha h - beta Q^T w - gamma Q^T g    grad_step = grad_w - Q grad_k
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    read = tl.minimum(rows, count - 1)
    base = grad + read * grad_stride
    state += read * state_stride
    deltas += read * deltas_stride
    state_v = state + 3 * BLOCKS
    moves = deltas + 2 * BLOCKS
    step_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    # Q^T u, less the step that has sums of its own; in the end Q^T w
    w_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    h_pair = tl.zeros((BLOCK_ROWS, 2 * P), tl.float32)
    squares = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    dot_grad = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    grad_shift = no_sums(BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        h_pair = multiply_project(tile, project, columns, h_pair, P, PADDED, PRODUCT, PRECISION)
        step = a_v * tanh(load_rows(moves, columns, WIDTH, BLOCK_COLUMNS, PRODUCT), FAST)
        if PROJECT:
            step_pair = multiply_project(step.to(PRODUCT), project, columns, step_pair, P, PADDED, PRODUCT, PRECISION)
        t = tile.to(tl.float32)
        if SHIFTED:
            shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
            grad_shift += row_sums(t * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
        if FORMS:
            v0 = load_rows(state_v, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            u = v0.to(tl.float32) + step
            if not PROJECT:
                v0 = u.to(PRODUCT)
            w_pair = multiply_project(v0, project, columns, w_pair, P, PADDED, PRODUCT, PRECISION)
            squares += row_sums(u * u, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            dot_grad += row_sums(u * t, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if SHIFTED:
                dot_shift += row_sums(u * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
    step_a, step_b = apart(step_pair, BLOCK_ROWS, P)
    h_a, h_b = apart(h_pair, BLOCK_ROWS, P)
    radius, cos, sin, step_cos, step_sin, tanh_theta, tanh_rho = turned_blocks(
        state, deltas, tl.arange(0, P), a_theta, a_rho, BLOCKS, P
    )
    k_a = radius * cos - step_a
    k_b = radius * sin - step_b
    shift_a, shift_b = block_pair(per_block, 7, P)
    grad_shift = tl.sum(grad_shift, axis=1)
    if FORMS:
        squares, dot_shift, dot_grad = tl.sum(squares, axis=1), tl.sum(dot_shift, axis=1), tl.sum(dot_grad, axis=1)
        w_a, w_b = apart(w_pair, BLOCK_ROWS, P)
        w_a += step_a
        w_b += step_b
        squares += tl.sum(k_a * (k_a + 2.0 * w_a) + k_b * (k_b + 2.0 * w_b), axis=1)
        dot_grad += tl.sum(k_a * h_a + k_b * h_b, axis=1)
        if SHIFTED:
            dot_shift += tl.sum(k_a * shift_a + k_b * shift_b, axis=1)
        w_a += k_a
        w_b += k_b
    else:
        a, b, factor = to_product(k_a, k_b, PRODUCT, PRECISION)
        rebuilt_squares = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        rebuilt_shift = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        rebuilt_grad = tl.zeros((BLOCK_ROWS, 8), tl.float32)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            v0 = load_rows(state_v, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            move = load_rows(moves, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            w = updated_tile(v0, move, columns, a_v, a, b, factor, rebuild, P, PRODUCT, PRECISION, FAST)
            rebuilt_squares += product_sums(w * w, BLOCK_ROWS, BLOCK_COLUMNS)
            t = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT).to(tl.float32)
            rebuilt_grad += product_sums(w * t, BLOCK_ROWS, BLOCK_COLUMNS)
            if SHIFTED:
                shift = tl.load(per_column + 2 * PADDED + columns)[None, :]
                rebuilt_shift += product_sums(w * shift, BLOCK_ROWS, BLOCK_COLUMNS)
            w_pair = multiply_project(w.to(PRODUCT), project, columns, w_pair, P, PADDED, PRODUCT, PRECISION)
        w_a, w_b = apart(w_pair, BLOCK_ROWS, P)
        squares, dot_shift = tl.sum(rebuilt_squares, axis=1), tl.sum(rebuilt_shift, axis=1)
        dot_grad = tl.sum(rebuilt_grad, axis=1)
    alpha, beta, gamma = row_gradient(squares, dot_shift, dot_grad, grad_shift, tl.load(scalars + 3), SHIFTED)
    h_a = alpha[:, None] * h_a - beta[:, None] * w_a - gamma[:, None] * shift_a
    h_b = alpha[:, None] * h_b - beta[:, None] * w_b - gamma[:, None] * shift_b

    blocks = tl.arange(0, P)
    state_out = grad_state + rows * (3 * BLOCKS + WIDTH)
    deltas_out = grad_deltas + rows * (2 * BLOCKS + WIDTH)
    radial = radius * (h_a * cos + h_b * sin)
    tangential = radius * (h_b * cos - h_a * sin)
    store_rows(state_out, blocks, inside, radius * (h_b * step_cos - h_a * step_sin), BLOCKS, P)
    store_rows(state_out + BLOCKS, blocks, inside, radius * (h_a * step_cos + h_b * step_sin), BLOCKS, P)
    store_rows(state_out + 2 * BLOCKS, blocks, inside, radial, BLOCKS, P)
    turn = a_theta * (1.0 - tanh_theta * tanh_theta) * tangential
    store_rows(deltas_out, blocks, inside, turn, BLOCKS, P)
    store_rows(deltas_out + BLOCKS, blocks, inside, a_rho * (1.0 - tanh_rho * tanh_rho) * radial, BLOCKS, P)

    k_a, k_b, k_factor = to_product(k_a, k_b, PRODUCT, PRECISION)
    h_a, h_b, h_factor = to_product(h_a, h_b, PRODUCT, PRECISION)
    k_factor *= beta
    first = tl.arange(0, BLOCK_COLUMNS)
    v0 = load_rows(state_v, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
    move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
    t = load_rows(base, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        v0_ahead = load_ahead(state_v, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
        move_ahead = load_ahead(moves, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
        t_ahead = load_ahead(base, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
        # 1 - tanh^2 doubles the error of a fast tanh, which bfloat16 alone would not show
        slope = tanh(move, FAST and PRODUCT == tl.bfloat16)
        u = v0.to(tl.float32) + a_v * slope
        result = alpha[:, None] * t.to(tl.float32) - beta[:, None] * u
        v0 = v0_ahead
        move = move_ahead
        t = t_ahead
        if SHIFTED:
            result -= gamma[:, None] * tl.load(per_column + 2 * PADDED + columns)[None, :]
        if PROJECT:
            moved, leak = multiply_rebuild_two(k_a, k_b, h_a, h_b, rebuild, columns, P, PRODUCT, PRECISION)
            result -= moved * k_factor[:, None]
            kept = result - leak * h_factor[:, None]
        else:
            result -= multiply_rebuild(k_a, k_b, rebuild, columns, P, PRODUCT, PRECISION) * k_factor[:, None]
            kept = result
        store_rows(state_out + 3 * BLOCKS, columns, inside, result, WIDTH, BLOCK_COLUMNS)
        store_rows(deltas_out + 2 * BLOCKS, columns, inside, a_v * (1.0 - slope * slope) * kept, WIDTH, BLOCK_COLUMNS)
