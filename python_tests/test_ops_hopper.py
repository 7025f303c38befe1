"""What the Hopper kernels read: the tables of radius maps, the wrapped basis, and which rows are served at all."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import BRANCHES, Case, arrays_of, frame_of

from aniso_ext.ops import backends, hopper

CPU = torch.device("cpu")
SAMPLED = Case(96, 48, knots=1024, sampled=True)
CALIBRATED = Case(96, 48, knots=1024, sampled=True, calibrated=True)
SMOOTH = Case(96, 48, knots=256)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [SAMPLED, SMOOTH, BRANCHES[0], Case(48, 48, knots=2)], ids=str)
def test_a_cell_is_off_by_no_more_than_it_may_or_is_marked(case, dtype):
    """At radii from zero to past the last knot, against NumPy's interpolation of the knots."""
    found, arrays = folded(case, dtype), arrays_of(case)
    source, target = arrays["radius_source_knots"], arrays["radius_target_knots"]
    size = np.sqrt(np.square(target).mean())
    allowed = hopper.LARGEST_CELL_ERROR * torch.finfo(dtype).eps / 2 * size
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
    assert marked <= hopper.MOST_COARSE_KNOTS


def test_the_table_is_as_small_as_its_error_allows():
    """Half the rounding of a coefficient: a format with finer rounding needs more cells."""
    few, many = (folded(SAMPLED, dtype).cells.shape[1] - 1 for dtype in (torch.bfloat16, torch.float16))
    assert few == hopper.CELL_COUNTS[0] < many <= hopper.CELL_COUNTS[-1]


def test_maps_with_many_jumps_have_no_table():
    """Copies in a corpus make coinciding quantiles: then other kernels serve, which search the knots."""
    arrays = {name: torch.tensor(value) for name, value in arrays_of(SMOOTH).items()}
    steps = torch.arange(SMOOTH.knots, dtype=torch.float64).div(8, rounding_mode="floor")
    arrays["radius_target_knots"] = (0.1 + 0.02 * steps).expand(SMOOTH.blocks, -1).contiguous()
    frame = type(frame_of(SMOOTH)).from_tensors(arrays)
    assert hopper.fold_hopper(frame, torch.float16, CPU) is None


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


def test_a_basis_that_is_not_orthonormal_to_the_rounding_is_not_served():
    """The norms come from quadratic forms that take Q^T Q for I."""
    skewed = frame_of(Case(96, 48, knots=256, basis_dtype="bfloat16"))
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


def test_a_shuffled_basis_gives_every_thread_neighbours():
    """Product entry 8 pair + 2 quarter + side of a group of 32 is the entry 8 quarter + 2 pair + side of the matrix."""
    basis = torch.arange(72 * 48, dtype=torch.float64).reshape(72, 48)
    shuffled = hopper.shuffle(basis)
    assert shuffled.shape == (128, 128)
    place = np.array([8 * quarter + 2 * pair + side for pair in range(4) for quarter in range(4) for side in range(2)])
    expected = np.zeros((128, 128))
    for row in range(128):
        for column in range(128):
            j, r = row // 32 * 32 + place[row % 32], column // 32 * 32 + place[column % 32]
            expected[row, column] = float(basis[j, r]) if j < 72 and r < 48 else 0.0
    np.testing.assert_array_equal(shuffled.numpy(), expected)


def test_decode_of_an_unaligned_rank_has_no_hopper_kernel(monkeypatch):
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    order = backends.ranking(torch.device("cuda", 0), "decode", torch.bfloat16, 1280, 24, "scalar", False)
    assert order[0] == "triton"


@pytest.mark.parametrize(
    "operation, dtype, complement, gradient, first",
    [
        ("correct", torch.bfloat16, "scalar", False, "cuda"),
        ("correct", torch.bfloat16, "diagonal", False, "cuda"),
        ("correct", torch.bfloat16, "diagonal_projected", False, "triton"),
        ("correct", torch.bfloat16, "scalar", True, "triton"),
        ("correct_sums", torch.float16, "scalar", True, "cuda"),
        ("encode", torch.bfloat16, "diagonal", False, "triton"),
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

