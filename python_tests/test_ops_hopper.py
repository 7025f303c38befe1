"""What the Hopper kernels read: the tables of radius maps, the wrapped basis, and which rows are served at all."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import BRANCHES, Case, arrays_of, frame_of, frame_with_jumps, rows_of

from aniso_ext.ops import backends, hopper, radius_table
from aniso_ext.ops.operands import operands

CPU = torch.device("cpu")
SAMPLED = Case(96, 48, knots=1024, sampled=True)
CALIBRATED = Case(96, 48, knots=1024, sampled=True, calibrated=True)
SMOOTH = Case(96, 48, knots=256)
STREAMED = Case(160, 136, knots=1024, sampled=True)


def folded(case: Case, dtype: torch.dtype) -> hopper.HopperOperands:
    result = hopper.fold_hopper(frame_of(case), dtype, CPU)
    assert result is not None
    return result


def table_values(found: hopper.HopperOperands, block: int, radii: np.ndarray) -> np.ndarray:
    """T(rho) as the kernel takes it from the table; NaN where it would search."""
    cells = found.cells[block].numpy().view(np.float16).reshape(-1, 2).astype(np.float64)
    cell_scale, last_slope, unit = found.map_scales[:, block].double().numpy()
    place = np.minimum(radii * cell_scale, len(cells) - 1)
    cell = place.astype(int)
    return radii * last_slope + unit * (cells[cell, 0] + cells[cell, 1] * (place - cell))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [SAMPLED, SMOOTH, STREAMED, BRANCHES[0], Case(48, 48, knots=2)], ids=str)
def test_a_cell_is_off_by_no_more_than_it_may_or_is_marked(case, dtype):
    """At radii from zero to past the last knot, against NumPy's interpolation of the knots."""
    found, arrays = folded(case, dtype), arrays_of(case)
    source, target = arrays["radius_source_knots"], arrays["radius_target_knots"]
    size = np.sqrt(np.square(target).mean())
    rounding = torch.finfo(hopper.product_dtype(dtype)).eps / 2
    allowed = hopper.largest_errors(dtype, case.blocks)[1] * rounding * size
    marked = 0.0
    for block in range(case.blocks):
        radii = np.concatenate((source[block], np.linspace(0, 1.3 * source[block, -1], 4001)))
        values = table_values(found, block, radii)
        exact = oracle.radius_map(radii, source[block], target[block])
        slack = 8 * 2.0**-24 * (np.abs(exact) + radii * 16)  # the scales are float32
        coarse = np.isnan(values)
        assert (np.abs(values - exact)[~coarse] <= allowed + slack[~coarse]).all()
        assert not coarse[radii > source[block, -1]].any(), "beyond the last knot the ratio is kept, exactly"
        marked += coarse[: source.shape[1]].mean() / case.blocks
    assert marked <= radius_table.MOST_COARSE_KNOTS


def test_the_table_is_as_small_as_its_error_allows():
    """Half the rounding of a coefficient: a format with finer rounding needs more cells."""
    few, many = (folded(SAMPLED, dtype).cells.shape[1] - 1 for dtype in (torch.bfloat16, torch.float16))
    assert few == radius_table.CELL_COUNTS[0] < many <= radius_table.CELL_COUNTS[-1]


def test_cells_that_stream_fill_stages_whole():
    """A stage of 32 or 48 KB takes a power of two of groups of four blocks, of four bytes a cell."""
    few, many = (folded(STREAMED, dtype).cells.shape[1] for dtype in (torch.bfloat16, torch.float16))
    assert few - 1 == hopper.STREAMED_CELL_COUNTS[0] < many - 1 <= hopper.STREAMED_CELL_COUNTS[-1]
    for count in hopper.STREAMED_CELL_COUNTS:
        assert 2**15 % (4 * 4 * (count + 1)) == 0


def test_the_table_of_float32_rows_moves_no_row_by_more_than_the_contract_leaves():
    """1 - cos is half the square of the error over |w| >= |T(rho)|: of all cells in the mean, and of the worst one."""
    rounding = 2.0**-11  # of a TF32 factor
    for blocks in (1, 24, 64):
        most, most_of_cell = hopper.largest_errors(torch.float32, blocks)
        assert 0.5 * (most * rounding) ** 2 <= 1e-7
        assert 0.5 * (most_of_cell * rounding) ** 2 / blocks <= 1.2e-7


def test_maps_with_many_jumps_have_no_table():
    """Copies in a corpus make coinciding quantiles: then other kernels serve, which search the knots."""
    assert hopper.fold_hopper(frame_with_jumps(SMOOTH, 8), torch.float16, CPU) is None


def test_padding_is_zero_and_coordinates_are_those_of_the_rounded_basis():
    found, frame = folded(CALIBRATED, torch.bfloat16), frame_of(CALIBRATED)
    assert torch.equal(found.basis[:, : CALIBRATED.rank], frame.basis.bfloat16())
    assert not found.basis[:, CALIBRATED.rank :].any()
    assert torch.equal(found.shuffled, hopper.shuffle(found.basis[:, : CALIBRATED.rank]))
    assert not found.cells[CALIBRATED.blocks :].any() and not found.map_scales[:, CALIBRATED.blocks :].any()
    basis, target = frame.basis.bfloat16().double(), frame.target_mean
    offset = target - frame.basis @ (frame.basis.T @ target) - frame.complement_scale * frame.source_mean
    exact = torch.stack((-frame.source_mean, offset, target - frame.output_mean)) @ basis
    # one rounding to float32 of sums of D terms
    assert torch.allclose(found.coordinates.double(), exact, rtol=2.0**-24, atol=SAMPLED.width * 2.0**-53)


def test_products_of_float32_rows_are_float16():
    """Which keeps the 10 bits of TF32; sums and constants stay float32."""
    found = folded(CALIBRATED, torch.float32)
    exact = frame_of(CALIBRATED).basis
    assert torch.equal(found.basis[:, : CALIBRATED.rank], exact.half())
    assert torch.equal(found.shuffled, hopper.shuffle(exact.half(), run=4))
    assert found.coordinates.dtype == found.map_scales.dtype == torch.float32


def test_a_basis_that_is_not_orthonormal_to_the_rounding_is_not_served():
    """The norms come from quadratic forms that take Q^T Q for I; those of float32 rows are summed from the rows."""
    skewed = frame_of(Case(96, 48, knots=256, basis_dtype="bfloat16"))
    assert hopper.fold_hopper(skewed, torch.float32, CPU) is not None
    assert hopper.fold_hopper(skewed, torch.bfloat16, CPU) is not None
    assert hopper.fold_hopper(skewed, torch.float16, CPU) is None


def test_only_hopper_gpus_are_served():
    assert not hopper.serves("cpu", torch.bfloat16, 1280, 128)
    assert not hopper.serves("meta", torch.bfloat16, 1280, 128)


@pytest.mark.parametrize(
    "dtype, width, rank, served",
    [
        (torch.bfloat16, 1280, 128, True),
        (torch.float16, 64, 2, True),
        (torch.float32, 1280, 128, False),
        (torch.bfloat16, 1288, 128, False),
        (torch.bfloat16, 1280, 130, False),
        (torch.bfloat16, 516, 128, False),
        (torch.bfloat16, 56, 16, False),
    ],
)
def test_which_rows_a_hopper_gpu_serves(dtype, width, rank, served, monkeypatch):
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    assert hopper.serves("cuda:0", dtype, width, rank) is served


@pytest.mark.parametrize(
    "width, rank, served",
    [(1280, 128, True), (100, 2, True), (1284, 128, False), (1280, 130, False), (514, 128, False), (60, 16, False)],
)
def test_which_float32_rows_correct_serves(width, rank, served, monkeypatch):
    """Where products may round to TF32, and at no other time."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    kind = ("cuda:0", torch.float32, width, rank)
    assert not hopper.serves_correct(*kind)
    for precision in ("high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert hopper.serves_correct(*kind) is served
        assert not hopper.serves(*kind)


@pytest.mark.parametrize(
    "dtype, width, rank, served",
    [
        (torch.bfloat16, 1280, 256, True),
        (torch.float16, 4096, 64, True),
        (torch.bfloat16, 1280, 128, True),
        (torch.bfloat16, 1280, 258, False),
        (torch.bfloat16, 4104, 64, False),
        (torch.bfloat16, 1284, 64, False),
        (torch.float32, 1280, 256, False),
    ],
)
def test_which_large_bases_correct_serves(dtype, width, rank, served, monkeypatch):
    """Those that stream, and those that stay."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert hopper.serves_correct("cuda:0", dtype, width, rank) is served


def test_a_basis_that_streams_has_its_rows_shuffled_alone():
    case = Case(400, 140, knots=64)
    found = folded(case, torch.float16)
    assert found.basis.shape == (400, 256) and found.cells.shape[0] == found.map_scales.shape[1] == 128
    assert not found.basis[:, 140:].any() and not found.cells[70:].any()
    rows = np.arange(448).reshape(-1, 4, 4, 2).transpose(0, 2, 1, 3).ravel()
    expected = np.zeros((448, 256), np.float16)
    expected[:400] = found.basis.numpy()
    np.testing.assert_array_equal(found.shuffled.numpy(), expected[rows])


@pytest.mark.parametrize("run", [8, 4])
def test_a_shuffled_basis_gives_every_thread_neighbours(run):
    """Product entry 8 pair + 2 quarter + side of a group of 32 is the entry 8 quarter + 2 pair + side of the matrix; of
    a group of 16 it is 4 quarter + 2 pair + side."""
    basis = torch.arange(72 * 48, dtype=torch.float64).reshape(72, 48)
    shuffled = hopper.shuffle(basis, run)
    assert shuffled.shape == (128, 128)

    def place(run: int) -> np.ndarray:
        pairs, sides = range(run // 2), range(2)
        return np.array([run * quarter + 2 * pair + side for pair in pairs for quarter in range(4) for side in sides])

    expected = np.zeros((128, 128))
    for row in range(128):
        for column in range(128):
            j, r = row // (4 * run) * (4 * run) + place(run)[row % (4 * run)], column // 32 * 32 + place(8)[column % 32]
            expected[row, column] = float(basis[j, r]) if j < 72 and r < 48 else 0.0
    np.testing.assert_array_equal(shuffled.numpy(), expected)


def test_decode_of_an_unaligned_rank_has_no_hopper_kernel(monkeypatch):
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    order = backends.ranking(torch.device("cuda", 0), "decode", torch.bfloat16, 1280, 24, "scalar", False)
    assert order[0] == "triton"


@pytest.mark.parametrize(
    "operation, complement, gradient, first",
    [
        ("correct", "scalar", False, "cuda"),
        ("correct", "scalar", True, "triton"),
        ("correct", "diagonal", False, "triton"),
        ("correct_sums", "scalar", False, "triton"),
        ("encode", "scalar", False, "triton"),
        ("decode", "scalar", False, "triton"),
    ],
)
def test_float32_rows_at_a_lower_precision_have_one_hopper_kernel(operation, complement, gradient, first, monkeypatch):
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    order = backends.ranking(torch.device("cuda", 0), operation, torch.float32, 1280, 128, complement, gradient)
    assert order[0] == first


@pytest.mark.parametrize(
    "operation, dtype, complement, gradient, first",
    [
        ("correct", torch.bfloat16, "scalar", False, "cuda"),
        ("correct", torch.bfloat16, "diagonal", False, "cuda"),
        ("correct", torch.bfloat16, "diagonal_projected", False, "triton"),
        ("correct", torch.bfloat16, "scalar", True, "cuda"),
        ("correct", torch.float16, "scalar", True, "cuda"),
        ("correct", torch.bfloat16, "diagonal", True, "triton"),
        ("correct_sums", torch.float16, "scalar", True, "cuda"),
        ("encode", torch.bfloat16, "diagonal", False, "triton"),
        ("encode", torch.bfloat16, "scalar", True, "cuda"),
        ("encode", torch.bfloat16, "diagonal", True, "triton"),
        ("encode", torch.float16, "scalar", True, "triton"),
        ("decode", torch.bfloat16, "scalar", False, "cuda"),
        ("decode", torch.bfloat16, "diagonal_projected", False, "cuda"),
        ("decode", torch.bfloat16, "scalar", True, "cuda"),
        ("correct", torch.float32, "scalar", False, "cuda"),
        ("correct", torch.float64, "scalar", False, "triton"),
    ],
)
def test_the_ranking_follows_the_measurements(operation, dtype, complement, gradient, first, monkeypatch):
    """float64 is named for Triton as well, which refuses it: the next in line then serves."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    order = backends.ranking(torch.device("cuda", 0), operation, dtype, 1280, 128, complement, gradient)
    assert order[0] == first and set(order) == {"cuda", "triton", "reference"} and order[-1] == "reference"


@pytest.mark.parametrize(
    "operation, dtype, scalar, served",
    [
        ("correct", torch.bfloat16, True, True),
        ("correct", torch.float16, True, True),
        ("correct", torch.bfloat16, False, False),
        ("correct_sums", torch.bfloat16, True, False),
        ("encode", torch.bfloat16, True, True),
        ("encode", torch.float16, True, False),
        ("encode", torch.bfloat16, False, False),
        ("decode", torch.float16, False, True),
    ],
)
def test_which_gradients_the_kernels_have(operation, dtype, scalar, served):
    assert hopper.serves_gradient(operation, dtype, 1280, 128, scalar=scalar) is served
    assert not hopper.serves_gradient(operation, dtype, 1280, 256, scalar=scalar)
    assert not hopper.serves_gradient(operation, torch.float32, 1280, 128, scalar=scalar)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["correct_backward", "encode_backward"])
def test_operators_of_gradients_are_what_torch_expects(operation):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    frame, y = frame_of(CALIBRATED), rows_of(CALIBRATED, 70, torch.bfloat16).cuda()
    special = hopper.operands(y, frame)
    assert special is not None
    constants = operands(frame, torch.float32, torch.float32, y.device)
    shift = (constants.shift,) if operation == "correct_backward" else ()
    columns = CALIBRATED.width + (0 if shift else 3 * CALIBRATED.blocks)
    grad = torch.ones(70, columns, dtype=y.dtype, device=y.device)
    operator = getattr(torch.ops.aniso_ext, f"hopper_{operation}").default
    arguments = (grad, y, *special.tensors(), *constants.initialisation(), *shift)
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}
