"""The CUDA kernel of ``correct``, through its operator, against the float64 reference on the same device."""

from __future__ import annotations

import pytest
import torch
from cases import BRANCHES, Case, calibrated, frame_of, named, rows_of

from aniso_ext.ops import backends, native, reference
from aniso_ext.ops.operands import operands

pytestmark = pytest.mark.gpu

# fp32 and fp64: the sums of D products round by about sqrt(D) eps of a unit row; half precision adds the rounding of
# the result (2^-11, 2^-8 of an element) and, with bfloat16 products, that of weights and coefficients.
LARGEST_COSINE_LOSS = {torch.float64: 1e-14, torch.float32: 1e-10, torch.float16: 1e-6, torch.bfloat16: 2e-5}
PRODUCTS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture(autouse=True)
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if native.probe() is not None:
        pytest.fail(f"the kernels are not built: {native.probe()}")
    return torch.device("cuda")


def correct(y: torch.Tensor, case: Case, product: torch.dtype) -> torch.Tensor:
    working = reference.compute_dtype(y.dtype)
    constants = operands(frame_of(case), product, working, y.device)
    return torch.ops.aniso_ext.correct(y, *constants.initialisation(), constants.shift)


def cosine_loss(result: torch.Tensor, expected: torch.Tensor) -> float:
    result = result.double()
    norms = result.norm(dim=1) * expected.norm(dim=1)
    return float((1 - (result * expected).sum(1) / norms).max())


def expected_rows(y: torch.Tensor, case: Case) -> torch.Tensor:
    return reference.correct(y.double(), frame_of(case).to(device=y.device))


@pytest.mark.parametrize("storage, product", PRODUCTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", **named([*BRANCHES, calibrated(Case(1280, 128, knots=1024))]))
def test_matches_the_reference(case: Case, storage: torch.dtype, product: torch.dtype, device: torch.device) -> None:
    y = rows_of(case, 333, storage).to(device)
    result = correct(y, case, product)
    assert result.dtype == storage and result.device == y.device
    assert cosine_loss(result, expected_rows(y, case)) <= LARGEST_COSINE_LOSS[storage]


@pytest.mark.parametrize("rows", [0, 1, 31, 33])
def test_any_number_of_rows(rows: int, device: torch.device) -> None:
    case = BRANCHES[1]
    y = rows_of(case, rows, torch.float32).to(device)
    result = correct(y, case, torch.float32)
    assert result.shape == y.shape
    if rows:
        assert cosine_loss(result, expected_rows(y, case)) <= LARGEST_COSINE_LOSS[torch.float32]


def test_layouts_give_the_result_of_the_contiguous_copy(device: torch.device) -> None:
    case = BRANCHES[0]
    base = rows_of(case, 200, torch.float32).to(device)
    padded = torch.empty(200, case.width + 3, device=device)
    padded[:, 3:] = base
    layouts = {
        "transposed": base.T.contiguous().T,
        "every other row": base.repeat_interleave(2, 0)[::2],
        "offset columns": padded[:, 3:],
        "expanded": base[:1].expand(200, -1),
    }
    for name, y in layouts.items():
        assert torch.equal(correct(y, case, torch.float32), correct(y.contiguous(), case, torch.float32)), name


def test_a_bad_row_stays_in_its_row(device: torch.device) -> None:
    case = BRANCHES[1]
    y = rows_of(case, 100, torch.float32).to(device)
    clean = correct(y, case, torch.float32)
    y[40], y[41] = float("nan"), float("inf")
    result = correct(y, case, torch.float32)
    others = torch.ones(100, dtype=torch.bool, device=device)
    others[40:42] = False
    assert torch.equal(result[others], clean[others])
    assert not torch.isfinite(result[40:42]).any()


def test_runs_on_the_current_stream_and_repeats_bit_for_bit(device: torch.device) -> None:
    case = BRANCHES[1]
    y = rows_of(case, 500, torch.float32).to(device)
    first = correct(y, case, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delayed = y * 0
        torch.cuda._sleep(20_000_000)  # the copy below lands late: a kernel on another stream would read zeros
        delayed.copy_(y)
        again = correct(delayed, case, torch.float32)
    stream.synchronize()
    assert torch.equal(first, again)


def test_auto_runs_on_a_cuda_tensor(device: torch.device) -> None:
    from aniso_ext import ops

    case = BRANCHES[1]
    y = rows_of(case, 50, torch.float32).to(device)
    assert backends.explain(device).startswith("auto on cuda takes ")
    assert cosine_loss(ops.correct(y, frame_of(case)), expected_rows(y, case)) <= LARGEST_COSINE_LOSS[torch.float32]
