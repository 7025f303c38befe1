"""The Triton kernels in Triton's interpreter, on the CPU; test_ops_triton.py runs this file with TRITON_INTERPRET=1.

The variable must be set before Triton is imported, so that these tests have a process of their own. Values and
gradients are held to the contracts of test_ops_values.py and test_ops_gradients.py.
"""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import test_ops_gradients as gradients
import test_ops_values as values
import torch
from cases import BRANCHES, COMPLEMENTS, Case, arrays_of, deltas_of, frame_of, frame_with_jumps, named, rows_of
from devices import Run

from aniso_ext import ops
from aniso_ext.errors import InputError
from aniso_ext.ops import backends
from aniso_ext.ops.triton import backend, launch
from aniso_ext.ops.triton.configurations import Configuration, overridden

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUNS = tuple(Run("triton", name) for name in ("float32", "bfloat16", "float16"))
CASES = (
    BRANCHES[0],
    *BRANCHES[1::2],
    replace(BRANCHES[1], basis_dtype="bfloat16"),
    replace(BRANCHES[3], basis_dtype="bfloat16", sampled=True),
    replace(BRANCHES[1], center=True, sampled=True),
    Case(48, 48, knots=2, calibrated=True),
    Case(9, 2, complement="diagonal_projected", calibrated=True),
    Case(140, 130, calibrated=True),  # products of half of the coordinates, as for every rank above 128
)
GRADIENT_CASES = (
    *BRANCHES[1::2],
    CASES[-1],
    replace(BRANCHES[0], basis_dtype="bfloat16"),
    replace(BRANCHES[3], center=True),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def test_the_kernels_are_interpreted_and_work():
    assert launch.INTERPRETED
    assert backends.available()["triton"] is None
    assert backends.resolve("triton", rows_of(CASES[0], 2, torch.float32), frame_of(CASES[0])).name == "triton"


@pytest.mark.parametrize("operator", ["correct", "decode", "decode_literal"])
@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("case", **named(CASES))
def test_unit_rows_meet_the_accuracy_contract(case, run, operator):
    values.test_unit_rows_meet_the_accuracy_contract(case, run, operator)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("case", **named(CASES))
def test_encoded_rows_meet_the_accuracy_contract(case, run):
    values.test_encoded_rows_meet_the_accuracy_contract(case, run)


@pytest.mark.parametrize("operator", gradients.OPERATORS)
@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("case", **named(GRADIENT_CASES))
def test_gradients_meet_the_accuracy_contract(case, run, operator):
    gradients.test_gradients_meet_the_accuracy_contract(case, operator, run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(CASES))
def test_column_sums_are_those_of_the_rows(case, dtype):
    y, frame = rows_of(case, 37, dtype), frame_of(case)
    arrays = {name: value for name, value in arrays_of(case).items() if name != "output_mean"}
    exact = oracle.correct(y.double().numpy(), arrays, case.complement, case.center).sum(axis=0)
    sums = ops.correct_sums(y, frame, backend="triton")
    assert sums.dtype == torch.float64
    # each of the 37 unit rows is off by a few roundings of the basis at most
    error = (sums - torch.from_numpy(exact)).norm() / 37
    assert error <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("complement", COMPLEMENTS)
@pytest.mark.parametrize("shape", [(16, 16, 4), (32, 32, 4), (64, 16, 4)], ids=str)
def test_block_sizes_change_nothing_but_rounding(shape, complement):
    case = replace(BRANCHES[1], complement=complement)
    y, frame = rows_of(case, 50, torch.float32), frame_of(case)
    plain = ops.correct(y, frame, backend="triton")
    with overridden(Configuration(*shape, 2)):
        assert torch.allclose(ops.correct(y, frame, backend="triton"), plain, rtol=0, atol=1e-6)
        sums = ops.correct_sums(y, frame, backend="triton")
    assert torch.allclose(sums, ops.correct_sums(y, frame, backend="triton"), rtol=0, atol=1e-5)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same rows in memory of other strides and offsets; memory between them is poisoned."""
    n, width = x.shape
    wide = x.new_full((2 * n, width + 3), float("nan"))
    wide[::2, 1 : width + 1] = x
    transposed = x.T.contiguous().T
    return {"strided": wide[::2, 1 : width + 1], "transposed": transposed, "empty": x[:0], "one": x[:1], "odd": x[1:8]}


@pytest.mark.parametrize("layout", ["strided", "transposed", "empty", "one", "odd"])
def test_layouts_give_the_same_rows(layout):
    case = BRANCHES[1]
    frame, y = frame_of(case), rows_of(case, 11, torch.float32)
    state, deltas = ops.encode(y, frame, backend="triton"), deltas_of(case, 11, torch.float32)
    for function, inputs in (
        (ops.correct, (y,)),
        (ops.encode, (y,)),
        (ops.decode, (state, deltas)),
    ):
        changed = tuple(layouts(x)[layout].detach().requires_grad_() for x in inputs)
        plain = tuple(x.detach().clone().contiguous().requires_grad_() for x in changed)
        ours, theirs = (function(*x, frame, backend="triton") for x in (changed, plain))
        assert torch.equal(ours, theirs)
        grads = (torch.autograd.grad(z.sin().sum(), x) for z, x in ((ours, changed), (theirs, plain)))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_expanded_rows_and_gradients():
    case = BRANCHES[0]
    y = rows_of(case, 1, torch.float32).expand(5, -1)
    z = ops.correct(y, frame_of(case), backend="triton")
    assert torch.equal(z, z[:1].expand(5, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("complement", COMPLEMENTS)
def test_non_finite_rows_stay_in_their_row(complement, poison, dtype):
    case = replace(BRANCHES[1], complement=complement)
    frame, y = frame_of(case), rows_of(case, 9, dtype)
    expected = ops.correct(y, frame, backend="triton")
    y[4, 3] = poison
    y.requires_grad_()
    z = ops.correct(y, frame, backend="triton")
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(z[others], expected[others])
    assert not z[4].isfinite().any()
    (gradient,) = torch.autograd.grad(z.sin().sum(), y)
    assert gradient[others].isfinite().all()
    encoded = ops.encode(y.detach(), frame, backend="triton")
    assert encoded[others].isfinite().all() and not encoded[4].isfinite().all()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_the_phase_at_zero_radius_is_zero(run):
    for zero in (0.0, -0.0):
        gradients.test_the_phase_at_zero_radius_is_zero(run, zero)


def test_zero_radii_and_zero_rows():
    gradients.test_gradients_near_the_origin_stay_finite(RUNS[0])
    gradients.test_polar_gradients_vanish_at_zero_radius(RUNS[0])
    values.test_a_row_of_zero_length_comes_out_as_zero(RUNS[0])


@pytest.mark.parametrize("operator", ["correct", "encode"])
@pytest.mark.parametrize("jump", [256, 8], ids=["coarse cells", "no table"])
def test_radii_without_a_cell_that_is_fine_enough_are_searched(jump, operator):
    """A neighbour's value would be off by a jump, 0.02 of lengths near 1; float16 rows by a tenth of that."""
    case = Case(96, 48, knots=1024)
    frame, y = frame_with_jumps(case, jump), rows_of(case, 60, torch.float16)
    lookup = backend.constants(frame, y).lookup
    assert (lookup.cells > 0 and lookup.coarse) if jump == 256 else lookup.cells == 0
    if lookup.coarse:
        pairs = (y.double() - frame.source_mean + frame.target_mean) @ frame.basis
        rho = torch.hypot(pairs[:, 0::2], pairs[:, 1::2]).T
        cell = (rho / frame.radius_source_knots[:, -1:] * lookup.cells).clamp_max(lookup.cells).long()
        assert ((lookup.table[: case.blocks].gather(1, cell) & 0x7FFF) > 0x7C00).any()
    found = getattr(ops, operator)(y, frame, backend="triton").double()
    exact = getattr(ops, operator)(y.double(), frame, backend="reference")
    if operator == "encode":
        found, exact = (z[:, 2 * case.blocks : 3 * case.blocks].exp() for z in (found, exact))
    assert (found - exact).norm(dim=1).max() <= 2e-3


def test_half_precision_coefficients_neither_overflow_nor_vanish():
    """float16 rows whose coordinates leave the format, and gradients at both ends of it."""
    case = BRANCHES[0]
    frame = frame_of(case)
    y = (3e4 * rows_of(case, 5)).half().requires_grad_()
    z = ops.correct(y, frame, backend="triton")
    exact = oracle.correct(y.detach().double().numpy(), arrays_of(case), case.complement)
    assert (z.double() - torch.from_numpy(exact)).norm(dim=1).max() <= 4 * torch.finfo(torch.float16).eps
    y = rows_of(case, 5, torch.float16).requires_grad_()
    reference = y.detach().double().requires_grad_()
    for size in (3e4, 1e-4):
        t = (size * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)) / 4).half()
        (ours,) = torch.autograd.grad(ops.correct(y, frame, backend="triton"), y, t)
        (theirs,) = torch.autograd.grad(ops.correct(reference, frame, backend="reference"), reference, t.double())
        assert (ours.double() - theirs).norm() <= 4 * torch.finfo(torch.float16).eps * theirs.norm()


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("case", **named(BRANCHES))
def test_float32_rows_at_tf32_are_multiplied_with_a_basis_of_float16(case, tf32):
    """Within the contract of TF32; a number that float16 has no place for spoils its row alone."""
    frame, y = frame_of(case), rows_of(case, 40, torch.float32)
    assert backend.constants(frame, y).project.dtype == torch.float16
    exact = ops.correct(y.double(), frame, backend="reference")
    found = ops.correct(y, frame, backend="triton")
    assert (1 - torch.cosine_similarity(found.double(), exact, dim=1)).max() <= 1e-6
    state, deltas = ops.encode(y, frame, backend="triton"), deltas_of(case, 40, torch.float32)
    exact = ops.encode(y.double(), frame, backend="reference")
    assert (state.double() - exact).norm() <= 1e-2 * exact.norm()
    exact = ops.decode(state.double(), deltas.double(), frame, backend="reference")
    found_rows = ops.decode(state, deltas, frame, backend="triton")
    assert (1 - torch.cosine_similarity(found_rows.double(), exact, dim=1)).max() <= 1e-6
    y[7, 5] = 7e4
    spoilt = ops.correct(y, frame, backend="triton")
    others = torch.arange(40) != 7
    assert spoilt[7].isnan().all() and torch.equal(spoilt[others], found[others])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_gradients_at_tf32_may_be_of_any_size(size, tf32):
    frame, y = frame_of(BRANCHES[0]), rows_of(BRANCHES[0], 20, torch.float32).requires_grad_()
    grad = size * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    wide = y.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(ops.correct(y, frame, backend="triton"), y, grad)
    (exact,) = torch.autograd.grad(ops.correct(wide, frame, backend="reference"), wide, grad.double())
    assert (found.double() - exact).norm() <= 1e-2 * exact.norm()


def test_float64_and_large_ranks_are_refused_with_the_way_out():
    case = BRANCHES[0]
    with pytest.raises(InputError, match="backend 'triton' has no float64 kernels: use backend='reference'"):
        ops.correct(rows_of(case, 2), frame_of(case), backend="triton")
    assert "1024 of a row at most, got rank 1026" in (backend.supports(torch.float32, 1026) or "")


def test_operators_pass_opcheck_and_trace_without_breaks():
    case = BRANCHES[1]
    y, frame = rows_of(case, 5, torch.float32), frame_of(case)
    arguments = backend._initialisation(frame, y, norms=True)
    for operator in (torch.ops.aniso_ext.triton_correct, torch.ops.aniso_ext.triton_encode):
        torch.library.opcheck(operator.default, (y.clone().requires_grad_(), *arguments))
    torch.library.opcheck(torch.ops.aniso_ext.triton_correct_sums.default, (y, *arguments))
    c = backend.constants(frame, y)
    state, deltas = ops.encode(y, frame, backend="triton"), deltas_of(case, 5, torch.float32)
    arrays = (c.project, c.rebuild, c.per_block, c.per_column, c.scalars)
    update = (*arrays, c.rank, True, True, False, 0.1, 0.1, 0.01, True)
    inputs = (state.detach().requires_grad_(), deltas.requires_grad_())
    torch.library.opcheck(torch.ops.aniso_ext.triton_decode.default, (*inputs, *update))
    compiled = torch.compile(lambda y: ops.correct(y, frame, backend="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y), ops.correct(y, frame, backend="triton"))
