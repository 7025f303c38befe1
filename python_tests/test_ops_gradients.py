"""Gradients of the operators: against finite differences, the reference's autograd, and the accuracy contract."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import compositions
import oracle
import pytest
import torch
from cases import BRANCHES, COMPLEMENTS, ENCODERS, Case, arrays_of, deltas_of, frame_of, named, rows_of
from devices import EVERY_BACKEND, KERNELS, ON_GPU, Run, cases_and_runs, runs, widest

from aniso_ext import ops

OPERATORS = ("correct", "encode", "decode", "decode_literal")
SMALL = tuple(
    Case(11, 4, knots=5, complement=complement, calibrated=calibrated)
    for complement in COMPLEMENTS
    for calibrated in (False, True)
)
ROWS = 96
CONTRACT_CASES = (
    *BRANCHES,
    replace(BRANCHES[0], basis_dtype="bfloat16"),
    replace(BRANCHES[3], center=True),
    ENCODERS[3],
)


def inputs_of(operator: str, case: Case, rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    if operator in ("correct", "encode"):
        return (rows_of(case, rows, dtype),)
    state = oracle.encode(rows_of(case, rows).numpy(), arrays_of(case), case.complement, case.center)
    return torch.from_numpy(state).to(dtype), deltas_of(case, rows, dtype)


def on(run: Run, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Leaves on the device of a run."""
    return tuple(x.detach().to(run.device).requires_grad_() for x in inputs)


def call(operator: str, case: Case, inputs: tuple[torch.Tensor, ...], backend: str, **options: float) -> torch.Tensor:
    frame = frame_of(case)
    if operator.startswith("decode"):
        return ops.decode(*inputs, frame, literal=operator == "decode_literal", backend=backend, **options)
    return getattr(ops, operator)(*inputs, frame, backend=backend)


def cotangent(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)


@runs(EVERY_BACKEND, ["float64"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", **named(SMALL))
def test_gradients_are_those_of_finite_differences(case, operator, run):
    inputs = on(run, inputs_of(operator, case, 3))
    bounds = {"a_v": 0.3, "a_theta": 0.7, "a_rho": 0.4} if operator.startswith("decode") else {}
    assert torch.autograd.gradcheck(lambda *x: call(operator, case, x, run.backend, **bounds), inputs)


@runs(KERNELS, ["float64"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", **named(BRANCHES))
def test_float64_gradients_are_those_of_the_reference(case, operator, run):
    inputs = on(run, inputs_of(operator, case, ROWS))
    outputs = [call(operator, case, inputs, backend) for backend in (run.backend, "reference")]
    native, exact = (torch.autograd.grad(z, inputs, cotangent(z)) for z in outputs)
    for ours, theirs in zip(native, exact, strict=True):
        # Two orders of sums of D terms; the polar part amplifies by 1/rho, which is above 1e-2 in these rows but for
        # a few blocks: D eps/1e-3.
        assert (ours - theirs).norm(dim=1).max() <= case.width * 2.0**-52 * 1e3 * theirs.norm(dim=1).max()


def gradients(function, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Gradients for a cotangent that was rounded to the dtype of the rows."""
    leaves = tuple(value.detach().requires_grad_() for value in inputs)
    z = function(*leaves)
    return torch.autograd.grad(z, leaves, cotangent(z).to(dtype).to(z.dtype))


@lru_cache(maxsize=8)
def exact(operator: str, case: Case, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Inputs of a dtype, and the gradients of the float64 reference."""
    inputs = inputs_of(operator, case, ROWS, dtype)
    doubles = tuple(x.double() for x in inputs)
    return inputs, gradients(lambda *x: call(operator, case, x, "reference"), doubles, dtype)


@lru_cache(maxsize=8)
def composed(
    operator: str, case: Case, dtype: torch.dtype, device: torch.device, precision: str
) -> tuple[torch.Tensor, ...]:
    """Gradients of the composition on the device of the run, at its precision, which the fixture has set."""
    arrays = arrays_of(case)

    def function(*x: torch.Tensor) -> torch.Tensor:
        if operator.startswith("decode"):
            return compositions.decode(*x, arrays, literal=operator == "decode_literal")
        return getattr(compositions, operator)(*x, arrays, case.complement, case.center)

    return gradients(function, tuple(x.to(device) for x in exact(operator, case, dtype)[0]), dtype)


def root_mean_square(rows: torch.Tensor) -> float:
    return rows.double().norm(dim=1).square().mean().sqrt().item()


def usual_length(rows: torch.Tensor) -> float:
    """What the lengths of 9 of 10 rows stay below."""
    return rows.double().norm(dim=1).quantile(0.9).item()


@cases_and_runs(CONTRACT_CASES, EVERY_BACKEND, ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_meet_the_accuracy_contract(case, operator, run):
    inputs, truths = exact(operator, case, run.dtype)
    there = tuple(x.to(run.device) for x in inputs)
    ours = gradients(lambda *x: call(operator, case, x, run.backend), there, run.dtype)
    allowed = composed(operator, case, run.dtype, run.device, run.precision)
    for gradient, truth, composition in zip(ours, truths, allowed, strict=True):
        assert gradient.dtype == run.dtype
        error, size = root_mean_square(gradient.cpu() - truth), root_mean_square(truth)
        if run.format == "float16":
            # The composition has no gradient where a^2 + b^2 underflows. Sums are float32, so a row is off by the
            # rounding of its result, and by that of the projected moves in the literal form: 2^-11 each. A GPU rounds
            # basis and coefficients as well.
            assert error <= (4 if run.backend in ON_GPU else 2) * 2.0**-11 * size
        elif run.format == "tf32" and (case.width % 8 or case.rank % 8):
            # A library may multiply such matrices in full float32. Four roundings of 2^-11, and slopes of neighbouring
            # pieces that differ by a few percent where the rounding of a radius crosses a knot.
            assert error <= 0.02 * size
        else:
            # The gradient of a phase goes with 1/rho, its error with 1/rho^2, which has no mean: rows near the origin
            # would decide.
            measure = usual_length if operator == "encode" else root_mean_square
            assert measure(gradient.cpu() - truth) <= 3 * measure(composition.cpu() - truth)


def frame_with_a_zero_radius() -> ops.Frame:
    """Means are zero and the basis lies along the axes, so that block 0 of the row below is exactly at the origin."""
    knots = torch.tensor([[0.1, 0.5], [0.1, 0.5]])
    return ops.Frame(torch.zeros(6), torch.zeros(6), torch.eye(6)[:, :4], knots, 2 * knots, torch.ones(1))


ROW_AT_ORIGIN = [[0.0, 0.0, 0.3, -0.4, 0.5, 0.6]]


@runs(EVERY_BACKEND)
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["plus", "minus"])
def test_the_phase_at_zero_radius_is_zero(run, zero):
    y = torch.tensor(ROW_AT_ORIGIN, dtype=run.dtype, device=run.device)
    y[0, :2] = zero
    sin, cos, log_rho = ops.encode(y, frame_with_a_zero_radius(), backend=run.backend)[0, [0, 2, 4]].double().cpu()
    assert (sin, cos) == (0, 1)
    # rho = sqrt(eps) = 1e-6, and the map doubles it; one rounding of the output dtype on top of float32's
    assert abs(log_rho - torch.tensor(2e-6).double().log()) <= 14 * (run.eps + 2.0**-23)


@runs(EVERY_BACKEND, ["float64", "float32"])
def test_polar_gradients_vanish_at_zero_radius(run):
    y = torch.tensor(ROW_AT_ORIGIN, dtype=run.dtype, device=run.device, requires_grad=True)
    frame = frame_with_a_zero_radius()
    polar = ops.encode(y, frame, backend=run.backend)[:, [0, 2, 4]]
    (gradient,) = torch.autograd.grad(polar, y, torch.ones_like(polar))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    # Through the whole correction the origin only matters to the norm of the row: finite, and nothing along block 0.
    row = ops.correct(y, frame, backend=run.backend)
    (gradient,) = torch.autograd.grad(row, y, torch.ones_like(row))
    assert gradient.isfinite().all()
    assert torch.equal(gradient[0, :2], torch.zeros_like(gradient[0, :2]))
    assert gradient[0, 2:].abs().min() > 0


@runs(EVERY_BACKEND, ["float32"])
def test_gradients_near_the_origin_stay_finite(run):
    """Radii from 1e-30 to 1e-3, float32: 1/length must not overflow into the product with a vanishing factor."""
    y = torch.tensor(ROW_AT_ORIGIN).repeat(28, 1)
    y[:, 0] = torch.logspace(-30, -3, 28)
    y = y.to(run.device).requires_grad_()
    z = ops.correct(y, frame_with_a_zero_radius(), backend=run.backend)
    (gradient,) = torch.autograd.grad(z, y, torch.ones_like(z))
    assert gradient.isfinite().all()


@widest(KERNELS)
def test_only_asked_gradients_are_given_and_constants_get_none(run):
    case = BRANCHES[1]
    state, deltas = (x.to(run.device, run.dtype) for x in inputs_of("decode", case, 4))
    deltas.requires_grad_()
    call("decode", case, (state, deltas), run.backend).sum().backward()
    assert state.grad is None and deltas.grad is not None
    assert all(not value.requires_grad for value in frame_of(case).tensors().values())


@widest(KERNELS)
def test_no_gradient_mode_builds_no_graph(run):
    y = run.rows(BRANCHES[1], 3).requires_grad_()
    with torch.no_grad():
        assert not ops.correct(y, frame_of(BRANCHES[1]), backend=run.backend).requires_grad


@widest(KERNELS)
def test_second_derivatives_are_refused_with_the_way_out(run):
    case = BRANCHES[1]
    y = run.rows(case, 2).requires_grad_()
    z = ops.correct(y, frame_of(case), backend=run.backend)
    (gradient,) = torch.autograd.grad(z.sin().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()


def test_the_reference_has_second_derivatives():
    y = rows_of(SMALL[0], 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ops.correct(x, frame_of(SMALL[0]), backend="reference"), (y,))


@widest(KERNELS)
@pytest.mark.parametrize("where", ["first use", "construction"])
def test_a_frame_met_in_inference_mode_still_trains(where, run):
    case = BRANCHES[1]
    tensors = {name: torch.tensor(value) for name, value in arrays_of(case).items()}
    frame = ops.Frame.from_tensors(tensors)
    y = run.rows(case, 4)
    with torch.inference_mode():
        if where == "construction":
            frame = ops.Frame.from_tensors({name: value.clone() for name, value in tensors.items()})
        expected_rows = ops.correct(y, frame, backend=run.backend)
    y.requires_grad_()
    z = ops.correct(y, frame, backend=run.backend)
    z.sum().backward()
    assert torch.equal(z, expected_rows) and y.grad.abs().max() > 0
