"""Kernel of the gradient of ``decode``."""

from __future__ import annotations

import triton
import triton.language as tl

from aniso_ext.ops.triton.common import (
    LEAST_NORMAL,
    afresh,
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
    multiply_rebuild_two,
    no_sums,
    part_of_blocks,
    parts_of,
    product_sums,
    row_gradient,
    row_sums,
    store_rows,
    tanh,
    to_product,
    together,
)
from aniso_ext.ops.triton.decode import coefficient_parts, turned_blocks, updated_tile
from aniso_ext.ops.triton.maps import block_row


@triton.jit
def product_parts(
    state, deltas, w_a, w_b, step_a, step_b, h_a, h_b, first, per_block, a_theta, a_rho, BLOCKS: tl.constexpr,
    P: tl.constexpr, SHIFTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """k.k + 2 k.Q^T u, k.Q^T g and k.h of blocks from ``first`` on; from Q^T u, less the step that has coordinates of
    its own."""
    if PARTS == 1:
        blocks = part_of_blocks(first, w_a.shape[1], P)
        radius, cos, sin, _, _, _, _ = turned_blocks(state, deltas, blocks, a_theta, a_rho, BLOCKS, P)
        k_a, k_b = radius * cos - step_a, radius * sin - step_b
        squares = tl.sum(k_a * (k_a + 2.0 * (w_a + step_a)) + k_b * (k_b + 2.0 * (w_b + step_b)), axis=1)
        dot_shift = tl.zeros_like(squares)
        if SHIFTED:
            at = blocks[None, :]
            dot_shift = tl.sum(k_a * block_row(per_block, 7, at, P) + k_b * block_row(per_block, 8, at, P), axis=1)
        return squares, dot_shift, tl.sum(k_a * h_a + k_b * h_b, axis=1)
    else:
        low_w_a, high_w_a = halves(w_a)
        low_w_b, high_w_b = halves(w_b)
        low_a, high_a = halves(step_a)
        low_b, high_b = halves(step_b)
        low_h_a, high_h_a = halves(h_a)
        low_h_b, high_h_b = halves(h_b)
        squares, dot_shift, dot_grad = product_parts(
            state, deltas, low_w_a, low_w_b, low_a, low_b, low_h_a, low_h_b, first, per_block, a_theta, a_rho, BLOCKS,
            P, SHIFTED, PARTS // 2,
        )  # fmt: skip
        more_squares, more_dot_shift, more_dot_grad = product_parts(
            state, deltas, high_w_a, high_w_b, high_a, high_b, high_h_a, high_h_b, first + w_a.shape[1] // 4, per_block,
            a_theta, a_rho, BLOCKS, P, SHIFTED, PARTS // 2,
        )  # fmt: skip
        return squares + more_squares, dot_shift + more_dot_shift, dot_grad + more_dot_grad


@triton.jit
def gradient_parts(
    state, deltas, state_out, deltas_out, inside, w_a, w_b, step_a, step_b, h_a, h_b, first, inverse_factor, alpha,
    beta, gamma, per_block, a_theta, a_rho, BLOCKS: tl.constexpr, P: tl.constexpr, FORMS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """-beta k and grad_k, times a number for each row, as products take them, with their factors, of blocks from
    ``first`` on; stores the gradients of what turns the blocks."""
    if PARTS == 1:
        blocks = part_of_blocks(first, w_a.shape[1], P)
        at = blocks[None, :]
        radius, cos, sin, step_cos, step_sin, tanh_theta, tanh_rho = turned_blocks(
            state, deltas, blocks, a_theta, a_rho, BLOCKS, P
        )
        k_a, k_b = radius * cos - step_a, radius * sin - step_b
        if FORMS:
            w_a += step_a + k_a
            w_b += step_b + k_b
        h_a = alpha[:, None] * h_a - beta[:, None] * w_a - gamma[:, None] * block_row(per_block, 7, at, P)
        h_b = alpha[:, None] * h_b - beta[:, None] * w_b - gamma[:, None] * block_row(per_block, 8, at, P)
        radial = radius * (h_a * cos + h_b * sin)
        tangential = radius * (h_b * cos - h_a * sin)
        store_rows(state_out, blocks, inside, radius * (h_b * step_cos - h_a * step_sin), BLOCKS, P)
        store_rows(state_out + BLOCKS, blocks, inside, radius * (h_a * step_cos + h_b * step_sin), BLOCKS, P)
        store_rows(state_out + 2 * BLOCKS, blocks, inside, radial, BLOCKS, P)
        turn = a_theta * (1.0 - tanh_theta * tanh_theta) * tangential
        store_rows(deltas_out, blocks, inside, turn, BLOCKS, P)
        store_rows(deltas_out + BLOCKS, blocks, inside, a_rho * (1.0 - tanh_rho * tanh_rho) * radial, BLOCKS, P)
        of_k = (-beta * inverse_factor)[:, None]
        k_a, k_b, k_factor = to_product(of_k * k_a, of_k * k_b, PRODUCT, PRECISION)
        of_h = inverse_factor[:, None]
        h_a, h_b, h_factor = to_product(of_h * h_a, of_h * h_b, PRODUCT, PRECISION)
        return k_a, k_b, k_factor, h_a, h_b, h_factor
    else:
        low_w_a, high_w_a = halves(w_a)
        low_w_b, high_w_b = halves(w_b)
        low_a, high_a = halves(step_a)
        low_b, high_b = halves(step_b)
        low_h_a, high_h_a = halves(h_a)
        low_h_b, high_h_b = halves(h_b)
        low_a, low_b, k_factor, low_h_a, low_h_b, h_factor = gradient_parts(
            state, deltas, state_out, deltas_out, inside, low_w_a, low_w_b, low_a, low_b, low_h_a, low_h_b, first,
            inverse_factor, alpha, beta, gamma, per_block, a_theta, a_rho, BLOCKS, P, FORMS, PRODUCT, PRECISION,
            PARTS // 2,
        )  # fmt: skip
        high_a, high_b, _, high_h_a, high_h_b, _ = gradient_parts(
            state, deltas, state_out, deltas_out, inside, high_w_a, high_w_b, high_a, high_b, high_h_a, high_h_b,
            first + w_a.shape[1] // 4, inverse_factor, alpha, beta, gamma, per_block, a_theta, a_rho, BLOCKS, P, FORMS,
            PRODUCT, PRECISION, PARTS // 2,
        )  # fmt: skip
        return (
            together(low_a, high_a), together(low_b, high_b), k_factor, together(low_h_a, high_h_a),
            together(low_h_b, high_h_b), h_factor,
        )  # fmt: skip


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
    joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    step_joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    grad_joined = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        tile = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
        h_pair = multiply_project(tile, project, columns, h_pair, P, PADDED, PRODUCT, PRECISION)
        step = a_v * tanh(load_rows(moves, columns, WIDTH, BLOCK_COLUMNS, PRODUCT), FAST)
        if PROJECT:
            step_pair = multiply_project(step.to(PRODUCT), project, columns, step_pair, P, PADDED, PRODUCT, PRECISION)
        t = tile.to(tl.float32)
        if SHIFTED and JOINED:
            weights = tl.trans(load_joined(project, columns, P, PADDED, PRODUCT))
            grad_joined = tl.dot(tile, weights, grad_joined)
            if PROJECT:
                step_joined = tl.dot(step.to(PRODUCT), weights, step_joined)
        elif SHIFTED:
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
            if SHIFTED and JOINED:
                joined = ended(tl.dot(v0, weights, joined), PRODUCT)
            elif SHIFTED:
                dot_shift += row_sums(u * shift, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT)
            if not (SHIFTED and JOINED):
                w_pair = ended(w_pair, PRODUCT)
        else:
            h_pair = ended(h_pair, PRODUCT)
    step_a, step_b = halves(step_pair)
    h_a, h_b = halves(h_pair)
    w_a, w_b = halves(w_pair)
    grad_shift = tl.sum(grad_shift, axis=1)
    if FORMS:
        cross, along_shift, along_grad = product_parts(
            state, deltas, w_a, w_b, step_a, step_b, h_a, h_b, 0, per_block, a_theta, a_rho, BLOCKS, P, SHIFTED,
            parts_of(PRODUCT, P),
        )  # fmt: skip
        squares = tl.sum(squares, axis=1) + cross
        dot_shift = tl.sum(dot_shift, axis=1) + along_shift
        dot_grad = tl.sum(dot_grad, axis=1) + along_grad
        if JOINED:
            unit = tl.load(scalars + 4)
            _, of_shift = joined_sums(joined + step_joined)
            dot_shift += unit * of_shift
            _, of_shift = joined_sums(grad_joined)
            grad_shift += unit * of_shift
    else:
        a, b, factor, _, _ = coefficient_parts(
            state, deltas, w_a, w_b, step_a, step_b, 0, per_block, a_theta, a_rho, BLOCKS, P, False, PRODUCT, PRECISION,
            parts_of(PRODUCT, P),
        )  # fmt: skip
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
        w_a, w_b = halves(w_pair)
        squares, dot_shift = tl.sum(rebuilt_squares, axis=1), tl.sum(rebuilt_shift, axis=1)
        dot_grad = tl.sum(rebuilt_grad, axis=1)
    alpha, beta, gamma = row_gradient(squares, dot_shift, dot_grad, grad_shift, tl.load(scalars + 3), SHIFTED)

    state_out = grad_state + rows * (3 * BLOCKS + WIDTH)
    deltas_out = grad_deltas + rows * (2 * BLOCKS + WIDTH)
    # JOINED: what the products are multiplied with, as rows t are added to them as they are
    row_factor = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if JOINED:
        row_factor = tl.where(alpha < LEAST_NORMAL, LEAST_NORMAL, alpha)
    k_a, k_b, k_factor, h_a, h_b, h_factor = gradient_parts(
        state, deltas, state_out, deltas_out, inside, afresh(w_a), afresh(w_b), afresh(step_a), afresh(step_b), h_a,
        h_b, 0, 1.0 / row_factor, alpha, beta, gamma, per_block, a_theta, a_rho, BLOCKS, P, FORMS, PRODUCT, PRECISION,
        parts_of(PRODUCT, P),
    )  # fmt: skip
    if JOINED:
        beta /= row_factor
        joined = joined_gradient(tl.zeros_like(gamma), -gamma * unit / row_factor, PRODUCT)
        added = identity(1.0, BLOCK_COLUMNS, PRODUCT)
        first = columns_back(0, WIDTH, BLOCK_COLUMNS)
        v0 = load_rows(state_v, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
            v0_ahead = load_ahead(state_v, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            move_ahead = load_ahead(moves, start, WIDTH, BLOCK_COLUMNS, PRODUCT)
            if PROJECT:
                result, leak = multiply_rebuild_two(k_a, k_b, h_a, h_b, rebuild, columns, P, PRODUCT, PRECISION)
            else:
                result = multiply_rebuild(k_a, k_b, rebuild, columns, P, PRODUCT, PRECISION)
            if SHIFTED:
                weights = load_joined(project, columns, P, PADDED, PRODUCT)
                result = tl.dot(joined, weights, result)
            t = load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)
            result = tl.dot(t, added, result)
            slope = tanh(move, FAST)
            result -= beta[:, None] * (v0.to(tl.float32) + a_v * slope)
            v0 = v0_ahead
            move = move_ahead
            inner = result
            if PROJECT:
                inner -= leak
            store_rows(state_out + 3 * BLOCKS, columns, inside, result * row_factor[:, None], WIDTH, BLOCK_COLUMNS)
            inner *= row_factor[:, None]
            inner *= a_v * (1.0 - slope * slope)
            store_rows(deltas_out + 2 * BLOCKS, columns, inside, inner, WIDTH, BLOCK_COLUMNS)
    else:
        k_factor *= -1.0
        first = columns_back(0, WIDTH, BLOCK_COLUMNS)
        v0 = load_rows(state_v, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        move = load_rows(moves, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        t = load_rows(base, first, WIDTH, BLOCK_COLUMNS, PRODUCT)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = columns_back(start, WIDTH, BLOCK_COLUMNS)
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
            kept *= a_v * (1.0 - slope * slope)
            store_rows(deltas_out + 2 * BLOCKS, columns, inside, kept, WIDTH, BLOCK_COLUMNS)
