"""Layouts, isolation of rows, and repeatability: what must not change the result of a row."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BRANCHES, Case, calibrated, deltas_of, frame_of, named, rows_of
from devices import EVERY_BACKEND, KERNELS, Run, cases_and_runs, runs, widest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, case_strategy, check_layouts, laid_out

from aniso_ext import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("correct", "encode", "decode")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    case=case_strategy(37),
    rows=st.sampled_from([0, 1, 2, 3, 31, 33]),
    format=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    operator=st.sampled_from(OPERATORS),
)
def test_any_layout_gives_the_result_of_the_contiguous_copy(case, rows, format, layouts, operator):
    check_layouts(case, rows, Run("cpu", format), layouts, operator)


@widest(KERNELS)
def test_summing_gives_an_expanded_gradient_that_is_read_right(run):
    case = BRANCHES[1]
    y = run.rows(case, 5).requires_grad_()
    for z in (getattr(ops, operator)(y, frame_of(case), backend=run.backend) for operator in ("correct", "encode")):
        (summed,) = torch.autograd.grad(z.sum(), y, retain_graph=True)
        (ones,) = torch.autograd.grad(z, y, torch.ones_like(z))
        assert torch.equal(summed, ones)


@widest(KERNELS)
def test_frames_of_any_layout_are_read_right(run):
    case = BRANCHES[3]
    tensors = {
        name: laid_out(value[None], "column stride")[0] if value.dim() == 1 else laid_out(value, "transposed")
        for name, value in frame_of(case).tensors().items()
    }
    frame = ops.Frame.from_tensors(tensors, complement=case.complement)
    assert frame.fingerprint() == frame_of(case).fingerprint()
    y = run.rows(case, 9)
    results = [ops.correct(y, each, backend=run.backend) for each in (frame, frame_of(case))]
    assert torch.equal(*results)


@widest(EVERY_BACKEND)
@pytest.mark.parametrize("case", **named(BRANCHES[::3]))
def test_no_rows_give_no_rows(case, run):
    y, frame, backend = run.rows(case, 0).requires_grad_(), frame_of(case), run.backend
    state = ops.encode(y, frame, backend=backend)
    assert state.shape == (0, 3 * case.blocks + case.width)
    z = ops.decode(state, run.deltas(case, 0), frame, backend=backend)
    assert z.shape == ops.correct(y, frame, backend=backend).shape == (0, case.width)
    z.sum().backward()
    assert y.grad.shape == (0, case.width)
    sums = ops.correct_sums(y, frame, backend=backend)
    assert torch.equal(sums, torch.zeros(case.width, dtype=torch.float64, device=run.device))


BAD_ROWS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "zero": 0.0, "one nan": None}


def spoil(rows: torch.Tensor, kind: str, at: list[int]) -> torch.Tensor:
    spoilt = rows.clone()
    if kind == "one nan":
        spoilt[at, -1] = math.nan
    else:
        spoilt[at] = BAD_ROWS[kind]
    return spoilt


def check_bad_rows(case: Case, rows: int, kind: str, run: Run) -> None:
    """Bad rows at both ends and inside leave all others as they are, bit for bit, forward and backward."""
    at = [0, 1, rows // 2, rows - 1]
    good = [i for i in range(rows) if i not in at]
    frame, y, deltas = frame_of(case), run.rows(case, rows), run.deltas(case, rows)

    def results(y: torch.Tensor, deltas: torch.Tensor) -> list[torch.Tensor]:
        y = y.clone().requires_grad_()
        z = ops.correct(y, frame, backend=run.backend)
        state = ops.encode(y, frame, backend=run.backend)
        decoded = ops.decode(state, deltas, frame, backend=run.backend)
        grads = [
            torch.autograd.grad(value, y, torch.ones_like(value), retain_graph=True)[0] for value in (z, state, decoded)
        ]
        return [value.detach() for value in (z, state, decoded, *grads)]

    clean, spoilt = results(y, deltas), results(spoil(y, kind, at), spoil(deltas, kind, at))
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[good], after[good])
        if kind == "zero":  # an ordinary row of this affine map
            assert after.isfinite().all()
        else:
            assert not after[at].isfinite().all(dim=1).any()


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("rows", [5, 70, 300])  # 300 are more than one chunk, 70 more than one tile
@cases_and_runs([BRANCHES[1], BRANCHES[2], BRANCHES[5]], ["cpu"])
def test_bad_rows_stay_where_they_are(case, rows, run, kind):
    check_bad_rows(case, rows, kind, run)


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("rows", [5, 300])
@cases_and_runs([BRANCHES[1], BRANCHES[2], BRANCHES[5]], ["cuda", "triton"], ["float32", "bfloat16"])
def test_bad_rows_stay_where_they_are_on_a_gpu(case, rows, run, kind):
    check_bad_rows(case, rows, kind, run)


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("operator", ["correct", "encode"])
@runs(KERNELS, ["float32"])
def test_bad_gradients_stay_where_they_are(operator, kind, run):
    case, rows, at = BRANCHES[5], 70, [0, 33, 69]
    good = [i for i in range(rows) if i not in at]
    y = run.rows(case, rows).requires_grad_()
    z = getattr(ops, operator)(y, frame_of(case), backend=run.backend)
    cotangent = torch.ones_like(z)
    (clean,) = torch.autograd.grad(z, y, cotangent, retain_graph=True)
    (spoilt,) = torch.autograd.grad(z, y, spoil(cotangent, kind, at))
    assert torch.equal(clean[good], spoilt[good])
    assert not spoilt[at].isfinite().all(dim=1).any()


@pytest.fixture
def poisoned_memory():
    """New tensors are filled with NaN, those of the kernels included: they come from aten::new_empty."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 31, 257])
@pytest.mark.parametrize("case", **named([*BRANCHES[::2], Case(2, 2), Case(3, 2), Case(33, 32, calibrated=True)]))
def test_every_element_is_written(case, rows, dtype, poisoned_memory):
    y, frame = rows_of(case, rows, dtype).requires_grad_(), frame_of(case)
    deltas = deltas_of(case, rows, dtype).requires_grad_()
    z = ops.correct(y, frame, backend="cpu")
    state = ops.encode(y, frame, backend="cpu")
    decoded = ops.decode(state, deltas, frame, backend="cpu")
    grads = [torch.autograd.grad(value.sum(), y, retain_graph=True)[0] for value in (z, state)]
    grads += torch.autograd.grad(decoded.sum(), (state, deltas))
    for value in (z, state, decoded, *grads):
        assert value.isfinite().all()


def everything(case: Case, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    frame, deltas = frame_of(case), deltas_of(case, rows, dtype)
    y = rows_of(case, rows, dtype).requires_grad_()
    z, state = ops.correct(y, frame, backend="cpu"), ops.encode(y, frame, backend="cpu")
    decoded = ops.decode(state, deltas, frame, backend="cpu")
    grads = [torch.autograd.grad(value.sin().sum(), y, retain_graph=True)[0] for value in (z, state, decoded)]
    return [value.detach() for value in (z, state, decoded, *grads)]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("case", **named([calibrated(Case(96, 32)), BRANCHES[5]]))
def test_repeats_are_equal_bit_for_bit(case, rows, dtype, threads):
    first = everything(case, rows, dtype)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(case, rows, dtype), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 33, 300])
def test_the_number_of_threads_changes_roundings_at_most(dtype, rows):
    """Chunks of rows depend on the threads, and a library may sum a product of another height in another order."""
    case = calibrated(Case(96, 32))
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(everything(case, rows, dtype))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        # D eps of the largest number of the row, in the dtype of the sums, and one rounding of the output
        working = torch.float64 if dtype == torch.float64 else torch.float32
        allowed = 1e3 * torch.finfo(working).eps + (torch.finfo(dtype).eps if working != dtype else 0)
        scale = one.double().abs().amax(dim=1, keepdim=True)
        assert ((one.double() - two.double()).abs() <= allowed * scale).all()
