"""Layouts, isolation of rows, and repeatability: what must not change the result of a row."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BRANCHES, COMPLEMENTS, Case, calibrated, deltas_of, frame_of, named, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aniso_ext import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "offset", "row stride", "column stride", "transposed", "rows expanded", "all expanded")
# The element size times 8 is less than a vector, and 3 is odd: unaligned for every instruction set.
OFFSET = 3


def laid_out(rows: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout; whatever lies between and around them is NaN."""
    n, d = rows.shape
    if layout == "offset":
        flat = rows.new_full((OFFSET + n * d + OFFSET,), math.nan)
        view = flat[OFFSET : OFFSET + n * d].view(n, d)
    elif layout == "row stride":
        view = rows.new_full((2 * n + 1, d + 5), math.nan)[1::2, 2 : 2 + d]
    elif layout == "column stride":
        view = rows.new_full((n, 3 * d), math.nan)[:, ::3]
    elif layout == "transposed":
        view = rows.new_full((d, n), math.nan).T
    elif layout == "rows expanded":
        return rows[:1].expand(n, d) if n else rows
    elif layout == "all expanded":
        return rows[:1, :1].expand(n, d) if n and d else rows
    else:
        return rows.contiguous()
    view.copy_(rows)
    return view


def case_strategy() -> st.SearchStrategy[Case]:
    def build(width: int, half_rank: int, knots: int, complement: str, is_calibrated: bool) -> Case:
        return Case(width, min(2 * half_rank, width // 2 * 2), knots, complement, is_calibrated)

    knots = st.sampled_from([2, 3, 17])
    return st.builds(build, st.integers(2, 37), st.integers(1, 18), knots, st.sampled_from(COMPLEMENTS), st.booleans())


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    case=case_strategy(),
    rows=st.sampled_from([0, 1, 2, 3, 31, 33]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    operator=st.sampled_from(["correct", "encode", "decode"]),
)
def test_any_layout_gives_the_result_of_the_contiguous_copy(case, rows, dtype, layouts, operator):
    frame = frame_of(case)
    if operator == "decode":
        first = ops.encode(rows_of(case, rows, dtype), frame, backend="reference")
        inputs = [laid_out(first, layouts[0]), laid_out(deltas_of(case, rows, dtype), layouts[1])]
    else:
        inputs = [laid_out(rows_of(case, rows, dtype), layouts[0])]
    columns = case.width + (3 * case.blocks if operator == "encode" else 0)
    generator = torch.Generator().manual_seed(rows)
    cotangent = laid_out(torch.randn(rows, columns, generator=generator).to(dtype), layouts[2])

    def run(values: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        # detach keeps the strides: the kernels meet these very layouts
        leaves = [value.detach().requires_grad_() for value in values]
        z = getattr(ops, operator)(*leaves, frame, backend="cpu")
        return [z.detach(), *torch.autograd.grad(z, leaves, grad)]

    ours = run(inputs, cotangent)
    plain = run([value.contiguous() for value in inputs], cotangent.contiguous())
    assert ours[0].shape == (rows, columns)
    for value, expected in zip(ours, plain, strict=True):
        assert value.dtype == dtype and torch.equal(value, expected)


def test_summing_gives_an_expanded_gradient_that_is_read_right():
    case = BRANCHES[1]
    y = rows_of(case, 5).requires_grad_()
    for z in (ops.correct(y, frame_of(case), backend="cpu"), ops.encode(y, frame_of(case), backend="cpu")):
        (summed,) = torch.autograd.grad(z.sum(), y, retain_graph=True)
        (ones,) = torch.autograd.grad(z, y, torch.ones_like(z))
        assert torch.equal(summed, ones)


def test_frames_of_any_layout_are_read_right():
    case = BRANCHES[3]
    tensors = {
        name: laid_out(value[None], "column stride")[0] if value.dim() == 1 else laid_out(value, "transposed")
        for name, value in frame_of(case).tensors().items()
    }
    frame = ops.Frame.from_tensors(tensors, complement=case.complement)
    assert frame.fingerprint() == frame_of(case).fingerprint()
    y = rows_of(case, 9)
    assert torch.equal(ops.correct(y, frame, backend="cpu"), ops.correct(y, frame_of(case), backend="cpu"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", **named(BRANCHES[::3]))
def test_no_rows_give_no_rows(case, backend):
    y = rows_of(case, 0).requires_grad_()
    frame = frame_of(case)
    state = ops.encode(y, frame, backend=backend)
    assert state.shape == (0, 3 * case.blocks + case.width)
    z = ops.decode(state, deltas_of(case, 0), frame, backend=backend)
    assert z.shape == ops.correct(y, frame, backend=backend).shape == (0, case.width)
    z.sum().backward()
    assert y.grad.shape == (0, case.width)


BAD_ROWS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "zero": 0.0, "one nan": None}


def spoil(rows: torch.Tensor, kind: str, at: list[int]) -> torch.Tensor:
    spoilt = rows.clone()
    if kind == "one nan":
        spoilt[at, -1] = math.nan
    else:
        spoilt[at] = BAD_ROWS[kind]
    return spoilt


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 70, 300])
@pytest.mark.parametrize("case", **named([BRANCHES[1], BRANCHES[2], BRANCHES[5]]))
def test_bad_rows_stay_where_they_are(case, rows, dtype, kind):
    """Bad rows at both ends and inside; 300 rows are more than one chunk, 70 more than one tile."""
    at = [0, 1, rows // 2, rows - 1]
    good = [i for i in range(rows) if i not in at]
    frame, y, deltas = frame_of(case), rows_of(case, rows, dtype), deltas_of(case, rows, dtype)

    def run(y: torch.Tensor, deltas: torch.Tensor) -> list[torch.Tensor]:
        y = y.clone().requires_grad_()
        z = ops.correct(y, frame, backend="cpu")
        state = ops.encode(y, frame, backend="cpu")
        decoded = ops.decode(state, deltas, frame, backend="cpu")
        grads = [
            torch.autograd.grad(value, y, torch.ones_like(value), retain_graph=True)[0] for value in (z, state, decoded)
        ]
        return [value.detach() for value in (z, state, decoded, *grads)]

    clean, spoilt = run(y, deltas), run(spoil(y, kind, at), spoil(deltas, kind, at))
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[good], after[good])
        if kind == "zero":  # an ordinary row of this affine map
            assert after.isfinite().all()
        else:
            assert not after[at].isfinite().all(dim=1).any()


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("operator", ["correct", "encode"])
def test_bad_gradients_stay_where_they_are(operator, kind):
    case, rows, at = BRANCHES[5], 70, [0, 33, 69]
    good = [i for i in range(rows) if i not in at]
    y = rows_of(case, rows, torch.float32).requires_grad_()
    z = getattr(ops, operator)(y, frame_of(case), backend="cpu")
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
