"""Pieces that the kernels share: tiles of rows, products, elementary functions, norms.

Letters of operands.py. A program owns BLOCK_ROWS rows and walks over their columns BLOCK_COLUMNS at a time. P is M
padded to a power of two (constants.py). PRODUCT is the format of tiles, which tensor cores multiply in PRECISION:
"ieee", "tf32", or "fp16", for which float32 is rounded (:func:`factor_format`); sums are float32.
Everything is widened right after it is loaded when PRODUCT is float32: Triton's interpreter computes wrongly with
bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_NORMAL = tl.constexpr(2.0**-126)  # a square below it has lost its bits, and its root may be flushed to zero
NORM_FLOOR = tl.constexpr(1e-12)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(base, columns, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr):
    """A tile of rows; ``base`` points at the first column of each, in 64 bits."""
    pointers = base[:, None] + columns[None, :]
    if WIDTH % BLOCK_COLUMNS == 0:
        return tl.load(pointers).to(PRODUCT)
    return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0).to(PRODUCT)


@triton.jit
def columns_back(start, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Columns of a tile of a walk back, which meets in the second-level cache what the walk before it read last."""
    return (WIDTH - 1) // BLOCK_COLUMNS * BLOCK_COLUMNS - start + tl.arange(0, BLOCK_COLUMNS)


@triton.jit
def load_ahead(base, start, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr):
    """The tile of a walk back after that at ``start``; after the last one the first again, which nobody reads.

    Loads that no product reads are not pipelined by the compiler: rebuilding walks ask for them one tile ahead.
    """
    following = tl.where(start + BLOCK_COLUMNS < WIDTH, start + BLOCK_COLUMNS, 0)
    columns = columns_back(following, WIDTH, BLOCK_COLUMNS)
    return load_rows(base, columns, WIDTH, BLOCK_COLUMNS, PRODUCT)


@triton.jit
def store_rows(base, columns, inside, values, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    pointers = base[:, None] + columns[None, :]
    mask = inside[:, None]
    if WIDTH % BLOCK_COLUMNS != 0:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.constexpr_function
def factor_format(product, precision):
    """What tensor cores multiply. TF32 keeps ten bits of a number, and so does float16, in half the bytes."""
    return tl.float16 if precision == "fp16" else product


@triton.jit
def load_basis(pointers, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.load(pointers).to(factor_format(PRODUCT, PRECISION))


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b of factors that are rounded already."""
    return tl.dot(a, b, sums, input_precision="ieee" if PRECISION == "ieee" else "tf32")


@triton.jit
def accumulate(tile, weights, sums, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """sums + tile weights.

    IEEE float32 sums each tile of columns apart, as one running sum over D terms would lose more than a library's
    product does; written as fma because the compiler makes one running sum of a plus. Tensor cores cut float32 down to
    TF32 instead of rounding it, which makes every sum too small.
    """
    if PRODUCT == tl.float32 and PRECISION == "ieee":
        return tl.fma(multiply(tile, weights, None, PRECISION), 1.0, sums)
    elif PRECISION == "tf32":
        return multiply(round_tf32(tile), weights, sums, PRECISION)
    else:
        return multiply(tile.to(weights.dtype), weights, sums, PRECISION)


@triton.jit
def multiply_project(
    tile, weights, columns, pair, P: tl.constexpr, PADDED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr
):
    """pair += tile [Qa, Qb] for one tile of columns, [BLOCK_ROWS, 2P]; see :func:`halves`.

    Weights are [2P, PADDED], K-major as TF32 products need; for float16 [4P, PADDED], the rounding errors of the basis
    after the basis.
    """
    pointers = weights + columns[:, None] + tl.arange(0, 2 * P)[None, :] * PADDED
    pair = accumulate(tile, load_basis(pointers, PRODUCT, PRECISION), pair, PRODUCT, PRECISION)
    if PRODUCT == tl.float16:
        pair = tl.dot(tile, tl.load(pointers + 2 * P * PADDED), pair)
    return pair


@triton.jit
def afresh(value):
    """The value, of which the compiler does not know that it has seen it: what follows from it is computed again."""
    if INTERPRETED:
        return value
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def ended(sums, PRODUCT: tl.constexpr):
    """Sums of a product after it has ended, for walks whose tiles a product and registers read.

    The compiler gives such tiles no more buffers than are on their way, and so the next copy would overwrite one while
    an asynchronous product still reads it. Tiles of float32 are rounded first, and read from there.
    """
    return sums if PRODUCT == tl.float32 else afresh(sums)


@triton.jit
def halves(value):
    """First and second quarters of each half of the columns, which a thread holds side by side, whether or not the
    halves lie in different warps."""
    quarters = tl.reshape(value, (value.shape[0], 2, 2, value.shape[1] // 4))
    a, b = tl.split(tl.permute(quarters, (0, 1, 3, 2)))
    a = tl.reshape(a, (value.shape[0], value.shape[1] // 2))
    return a, tl.reshape(b, (value.shape[0], value.shape[1] // 2))


@triton.jit
def together(a, b):
    """The inverse of :func:`halves`."""
    of_a = tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2))
    of_b = tl.reshape(b, (a.shape[0], 2, a.shape[1] // 2))
    return tl.reshape(tl.permute(tl.join(of_a, of_b), (0, 1, 3, 2)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def part_of_blocks(first, COUNT: tl.constexpr, P: tl.constexpr):
    """Blocks of a part that :func:`halves` made: half of them from ``first`` on, the others P / 2 further on."""
    at = tl.arange(0, COUNT)
    return at // (COUNT // 2) * (P // 2) + at % (COUNT // 2) + first


@triton.jit
def multiply_rebuild(a, b, weights, columns, P: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """a Qa^T + b Qb^T for one tile of columns; weights are [PADDED, 2P].

    One product where both coordinates of all blocks fit the registers as its operand, two otherwise.
    """
    if P < 128:
        pointers = weights + tl.arange(0, 2 * P)[:, None] + columns[None, :] * (2 * P)
        tile = multiply(together(a, b), load_basis(pointers, PRODUCT, PRECISION), None, PRECISION)
    else:
        pointers = weights + part_of_blocks(0, P, 2 * P)[:, None] + columns[None, :] * (2 * P)
        tile = multiply(a, load_basis(pointers, PRODUCT, PRECISION), None, PRECISION)
        tile = multiply(b, load_basis(pointers + P // 2, PRODUCT, PRECISION), tile, PRECISION)
    return tile


@triton.jit
def multiply_rebuild_two(a, b, c, d, weights, columns, P: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """a Qa^T + b Qb^T and c Qa^T + d Qb^T with one load of the weights."""
    if P < 128:
        pointers = weights + tl.arange(0, 2 * P)[:, None] + columns[None, :] * (2 * P)
        tile = load_basis(pointers, PRODUCT, PRECISION)
        first = multiply(together(a, b), tile, None, PRECISION)
        second = multiply(together(c, d), tile, None, PRECISION)
    else:
        pointers = weights + part_of_blocks(0, P, 2 * P)[:, None] + columns[None, :] * (2 * P)
        even = load_basis(pointers, PRODUCT, PRECISION)
        first = multiply(a, even, None, PRECISION)
        second = multiply(c, even, None, PRECISION)
        odd = load_basis(pointers + P // 2, PRODUCT, PRECISION)
        first = multiply(b, odd, first, PRECISION)
        second = multiply(d, odd, second, PRECISION)
    return first, second


@triton.jit
def load_joined(project, columns, P: tl.constexpr, PADDED: tl.constexpr, PRODUCT: tl.constexpr):
    """Offset and shift in pieces for a tile of columns, [16, n]; constants._columns_of_products."""
    pointers = project + (2 * P + tl.arange(0, 16))[:, None] * PADDED + columns[None, :]
    return tl.load(pointers).to(PRODUCT)


@triton.jit
def joined_coefficients(norm, PRODUCT: tl.constexpr):
    """What takes offset + |w| shift from :func:`load_joined`, [BLOCK_ROWS, 16]."""
    at = tl.arange(0, 16)[None, :]
    high = norm.to(PRODUCT).to(tl.float32)
    of_shift = tl.where(at < 4, high[:, None], tl.where(at == 4, (norm - high)[:, None], 0.0))
    return tl.where(at < 2, 1.0, of_shift).to(PRODUCT)


@triton.jit
def joined_gradient(of_offset, of_shift, PRODUCT: tl.constexpr):
    """What takes of_offset offset + of_shift shift from :func:`load_joined`, [BLOCK_ROWS, 16]."""
    at = tl.arange(0, 16)[None, :]
    offset_high, shift_high = of_offset.to(PRODUCT).to(tl.float32), of_shift.to(PRODUCT).to(tl.float32)
    low = tl.where(at == 5, (of_offset - offset_high)[:, None], 0.0)
    low = tl.where(at == 4, (of_shift - shift_high)[:, None], low)
    return tl.where(at < 2, offset_high[:, None], tl.where(at < 4, shift_high[:, None], low)).to(PRODUCT)


@triton.jit
def joined_sums(joined):
    """Dot products with offset and shift from those with :func:`load_joined`."""
    at = tl.arange(0, 16)[None, :]
    of_shift = tl.where((at == 2) | (at == 3), joined, 0.0)
    return tl.sum(tl.where(at < 2, joined, 0.0), axis=1), tl.sum(of_shift, axis=1)


@triton.jit
def identity(scale, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr):
    """A factor that adds scaled rows to a product: from where they are, exactly, and while others are fetched.

    Rows that only such a product reads come out where threads hold its result, without an exchange.
    """
    at = tl.arange(0, BLOCK_COLUMNS)
    return tl.where(at[:, None] == at[None, :], scale, 0.0).to(PRODUCT)


@triton.jit
def block_pair(per_block, row: tl.constexpr, P: tl.constexpr):
    """Constants of the blocks, [1, P] for each coordinate."""
    pointers = per_block + row * P + tl.arange(0, P)
    return tl.load(pointers)[None, :], tl.load(pointers + P)[None, :]


@triton.constexpr_function
def parts_of(product, blocks):
    """In how many parts what lies between two products is computed, one after the other, so that few registers hold it.

    A factor of float16 coefficients is that of the whole row. More than eight parts the compiler would study for
    minutes, and the more blocks there are, the fewer rows are mapped at a time.
    """
    return 1 if product == tl.float16 else min(blocks // 16, 8)


@triton.jit
def no_sums(BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr):
    """Sums of rows in parts that no thread shares, so that a walk over the columns exchanges nothing: see row_sums."""
    if PRODUCT == tl.float32:
        return tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS // 4), tl.float32)
    else:  # a second return of another type would be compiled as well
        return tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS // 8), tl.float32)


@triton.jit
def row_sums(values, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT: tl.constexpr):
    """Sums over the columns that a thread loads at once, 16 bytes."""
    if PRODUCT == tl.float32:
        return tl.sum(tl.reshape(values, (BLOCK_ROWS, BLOCK_COLUMNS // 4, 4)), axis=2)
    else:
        return tl.sum(tl.reshape(values, (BLOCK_ROWS, BLOCK_COLUMNS // 8, 8)), axis=2)


@triton.jit
def product_sums(values, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The same for results of a product, of which a thread has two columns of every 8: [BLOCK_ROWS, 8]."""
    return tl.sum(tl.reshape(values, (BLOCK_ROWS, BLOCK_COLUMNS // 8, 8)), axis=1)


@triton.jit
def to_product(a, b, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """Coefficients rounded for the rebuild, and a factor for each row that the product has to be multiplied with.

    float16 has few exponents: coefficients are divided by a power of two so that none overflows, and gradients, which
    loss scaling may leave anywhere in its range, keep their bits. TF32 would be truncated by tensor cores.
    """
    if PRODUCT == tl.float16:
        largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1)
        # the exponent alone; zero, subnormal and non-finite rows are left as they are
        bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
        usual = (bits > 0x0C000000) & (bits < 0x73000000)
        factor = tl.where(usual, bits, 0x3F800000).to(tl.float32, bitcast=True)
        inverse = (1.0 / factor)[:, None]
        a *= inverse
        b *= inverse
    else:
        factor = tl.full((a.shape[0],), 1.0, tl.float32)
    if PRECISION == "tf32":
        a = round_tf32(a)
        b = round_tf32(b)
    return a.to(factor_format(PRODUCT, PRECISION)), b.to(factor_format(PRODUCT, PRECISION)), factor


@triton.jit
def round_tf32(value):
    rounded = ((value.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < 3e38, rounded, value)


@triton.jit
def row_scales(squares, dot_shift, shift_squares, SHIFTED: tl.constexpr):
    """(1/n, 1/|h|, |e'|^2, e'.g) from |w|^2, w.g and |g|^2; aniso/row_norms.h."""
    # rounding can take the sum of a quadratic form below zero; a NaN stays
    norm = tl.sqrt(tl.where(squares < 0, 0.0, squares))
    inverse = 1.0 / tl.where(norm < NORM_FLOOR, NORM_FLOOR, norm)
    unit_squared = norm * norm * inverse * inverse
    unit_dot_shift = dot_shift * inverse
    outer = tl.full((squares.shape[0],), 1.0, tl.float32)
    if SHIFTED:
        length = tl.sqrt(unit_squared + 2.0 * unit_dot_shift + shift_squares)
        outer = 1.0 / tl.where(length < NORM_FLOOR, NORM_FLOOR, length)
    return inverse, outer, unit_squared, unit_dot_shift


@triton.jit
def row_gradient(squares, dot_shift, dot_grad, grad_shift, shift_squares, SHIFTED: tl.constexpr):
    """alpha, beta, gamma of grad_w = alpha t - beta w - gamma g; finish_row_backward of core/cpu/row_norms.h."""
    inverse, outer, unit_squared, unit_dot_shift = row_scales(squares, dot_shift, shift_squares, SHIFTED)
    unit_dot_grad = dot_grad * inverse
    radial = tl.zeros_like(squares)
    if SHIFTED:
        radial = (unit_dot_grad + grad_shift) * outer * outer * outer
    along = outer * unit_dot_grad - radial * (unit_squared + unit_dot_shift)
    return inverse * outer, inverse * inverse * (radial + along), inverse * radial


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh to 2^-23 of 1, or, for steps of half-precision rows, to 2^-11 with two values an instruction."""
    if FAST and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "tanh.approx.f16x2 $0, $1;", "=r,r", [x.to(tl.float16)], dtype=tl.float16, is_pure=True, pack=2
        ).to(tl.float32)
    x = x.to(tl.float32)
    small = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def sine_cosine(x):
    """sin and cos as in aniso/elementary.h: the library's have a slow path that needs local memory."""
    quadrant = tl.floor(tl.where(x == x, x * 0.63661977236758134, 0.0) + 0.5)
    r = x - quadrant * 1.5703125
    r = r - quadrant * 4.837512969970703125e-4
    r = r - quadrant * 7.54978995489188216e-8
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    q = quadrant.to(tl.int32) & 3
    swapped = (q & 1) == 1
    sine, cosine = tl.where(swapped, c, s), tl.where(swapped, s, c)
    return tl.where(q >= 2, -sine, sine), tl.where((q == 1) | (q == 2), -cosine, cosine)
