"""Gradients of the operators: against finite differences, the reference's autograd, and the accuracy contract."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import compositions
import oracle
import pytest
import torch
from cases import BRANCHES, COMPLEMENTS, ENCODERS, Case, arrays_of, deltas_of, frame_of, named, rows_of

from aniso_ext import ops

BACKENDS = ("reference", "cpu")
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


def call(operator: str, case: Case, inputs: tuple[torch.Tensor, ...], backend: str, **options: float) -> torch.Tensor:
    frame = frame_of(case)
    if operator.startswith("decode"):
        return ops.decode(*inputs, frame, literal=operator == "decode_literal", backend=backend, **options)
    return getattr(ops, operator)(*inputs, frame, backend=backend)


def cotangent(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", **named(SMALL))
def test_gradients_are_those_of_finite_differences(case, operator, backend):
    inputs = tuple(x.requires_grad_() for x in inputs_of(operator, case, 3))
    bounds = {"a_v": 0.3, "a_theta": 0.7, "a_rho": 0.4} if operator.startswith("decode") else {}
    assert torch.autograd.gradcheck(lambda *x: call(operator, case, x, backend, **bounds), inputs)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", **named(BRANCHES))
def test_float64_gradients_are_those_of_the_reference(case, operator):
    inputs = tuple(x.requires_grad_() for x in inputs_of(operator, case, ROWS))
    outputs = [call(operator, case, inputs, backend) for backend in ("cpu", "reference")]
    native, exact = (torch.autograd.grad(z, inputs, cotangent(z)) for z in outputs)
    for ours, theirs in zip(native, exact, strict=True):
        # Two orders of sums of D terms; the polar part amplifies by 1/rho, which is above 1e-2 in these rows but for
        # a few blocks: D eps/1e-3.
        assert (ours - theirs).norm(dim=1).max() <= case.width * 2.0**-52 * 1e3 * theirs.norm(dim=1).max()


@lru_cache(maxsize=8)
def expected(operator: str, case: Case, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], ...]:
    """(inputs, gradients of the float64 reference, gradients of the composition) for rows of one dtype."""
    inputs, arrays = inputs_of(operator, case, ROWS, dtype), arrays_of(case)

    def composed(*x: torch.Tensor) -> torch.Tensor:
        if operator.startswith("decode"):
            return compositions.decode(*x, arrays, literal=operator == "decode_literal")
        return getattr(compositions, operator)(*x, arrays, case.complement, case.center)

    def gradients(function, x: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = tuple(value.detach().requires_grad_() for value in x)
        z = function(*x)
        return torch.autograd.grad(z, x, cotangent(z).to(dtype).to(z.dtype))

    doubles = tuple(x.double() for x in inputs)
    return inputs, gradients(lambda *x: call(operator, case, x, "reference"), doubles), gradients(composed, inputs)


def root_mean_square(rows: torch.Tensor) -> float:
    return rows.double().norm(dim=1).square().mean().sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", **named(CONTRACT_CASES))
def test_gradients_meet_the_accuracy_contract(case, operator, dtype, backend):
    inputs, exact, composed = expected(operator, case, dtype)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    z = call(operator, case, leaves, backend)
    ours = torch.autograd.grad(z, leaves, cotangent(z))
    for gradient, truth, allowed in zip(ours, exact, composed, strict=True):
        assert gradient.dtype == dtype
        error = root_mean_square(gradient - truth)
        if dtype == torch.float16:
            # The composition has no gradient where a^2 + b^2 underflows. Sums are float32, so a row is off by the
            # rounding of its result, and by that of the projected moves in the literal form: 2^-11 each.
            assert error <= 2 * 2.0**-11 * root_mean_square(truth)
        else:
            assert error <= 3 * root_mean_square(allowed - truth)


def frame_with_a_zero_radius() -> ops.Frame:
    """Means are zero and the basis lies along the axes, so that block 0 of the row below is exactly at the origin."""
    knots = torch.tensor([[0.1, 0.5], [0.1, 0.5]])
    return ops.Frame(torch.zeros(6), torch.zeros(6), torch.eye(6)[:, :4], knots, 2 * knots, torch.ones(1))


ROW_AT_ORIGIN = [[0.0, 0.0, 0.3, -0.4, 0.5, 0.6]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["plus", "minus"])
def test_the_phase_at_zero_radius_is_zero(dtype, backend, zero):
    y = torch.tensor(ROW_AT_ORIGIN, dtype=dtype)
    y[0, :2] = zero
    sin, cos, log_rho = ops.encode(y, frame_with_a_zero_radius(), backend=backend)[0, [0, 2, 4]].double()
    assert (sin, cos) == (0, 1)
    # rho = sqrt(eps) = 1e-6, and the map doubles it; one rounding of the output dtype on top of float32's
    assert abs(log_rho - torch.tensor(2e-6).double().log()) <= 14 * (torch.finfo(dtype).eps + 2.0**-23)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_polar_gradients_vanish_at_zero_radius(dtype, backend):
    y = torch.tensor(ROW_AT_ORIGIN, dtype=dtype, requires_grad=True)
    frame = frame_with_a_zero_radius()
    polar = ops.encode(y, frame, backend=backend)[:, [0, 2, 4]]
    (gradient,) = torch.autograd.grad(polar, y, torch.ones_like(polar))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    # Through the whole correction the origin only matters to the norm of the row: finite, and nothing along block 0.
    row = ops.correct(y, frame, backend=backend)
    (gradient,) = torch.autograd.grad(row, y, torch.ones_like(row))
    assert gradient.isfinite().all()
    assert torch.equal(gradient[0, :2], torch.zeros(2, dtype=dtype))
    assert gradient[0, 2:].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_near_the_origin_stay_finite(backend):
    """Radii from 1e-30 to 1e-3, float32: 1/length must not overflow into the product with a vanishing factor."""
    y = torch.tensor(ROW_AT_ORIGIN).repeat(28, 1)
    y[:, 0] = torch.logspace(-30, -3, 28)
    y.requires_grad_()
    z = ops.correct(y, frame_with_a_zero_radius(), backend=backend)
    (gradient,) = torch.autograd.grad(z, y, torch.ones_like(z))
    assert gradient.isfinite().all()


def test_only_asked_gradients_are_given_and_constants_get_none():
    case = BRANCHES[1]
    state, deltas = inputs_of("decode", case, 4)
    deltas.requires_grad_()
    call("decode", case, (state, deltas), "cpu").sum().backward()
    assert state.grad is None and deltas.grad is not None
    assert all(not value.requires_grad for value in frame_of(case).tensors().values())


def test_no_gradient_mode_builds_no_graph():
    y = rows_of(BRANCHES[0], 3).requires_grad_()
    with torch.no_grad():
        assert not ops.correct(y, frame_of(BRANCHES[0]), backend="cpu").requires_grad


def test_second_derivatives_are_refused_with_the_way_out():
    case = SMALL[0]
    y = rows_of(case, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.correct(y, frame_of(case), backend="cpu").sin().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        gradient.sum().backward()
    assert torch.autograd.gradgradcheck(lambda x: ops.correct(x, frame_of(case), backend="reference"), (y,))


@pytest.mark.parametrize("where", ["first use", "construction"])
def test_a_frame_met_in_inference_mode_still_trains(where):
    case = SMALL[0]
    tensors = {name: torch.tensor(value) for name, value in arrays_of(case).items()}
    frame = ops.Frame.from_tensors(tensors)
    y = rows_of(case, 4)
    with torch.inference_mode():
        if where == "construction":
            frame = ops.Frame.from_tensors({name: value.clone() for name, value in tensors.items()})
        expected_rows = ops.correct(y, frame, backend="cpu")
    y.requires_grad_()
    z = ops.correct(y, frame, backend="cpu")
    z.sum().backward()
    assert torch.equal(z, expected_rows) and y.grad.abs().max() > 0
