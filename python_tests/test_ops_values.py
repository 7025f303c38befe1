"""Values of the operators, every backend and dtype, against the NumPy oracle and the accuracy contract.

The contract (DESIGN section 3): the error is at most twice that of the composition of the same steps in PyTorch, every
step in the dtype of the rows, and 1 - cos stays within a bound for each dtype.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import compositions
import numpy as np
import oracle
import pytest
import torch
from cases import BRANCHES, ENCODERS, Case, arrays_of, calibrated, deltas_of, frame_of, named, rows_of
from devices import EVERY_BACKEND, Run, cases_and_runs, runs, widest

from aniso_ext import ops

ROWS = 128
CASES = (
    *BRANCHES,
    *(replace(case, basis_dtype="bfloat16") for case in BRANCHES),
    *(replace(case, center=True) for case in BRANCHES[1::2]),
    Case(48, 48, knots=2, calibrated=True),  # no complement at all, and the shortest map
    Case(9, 2, complement="diagonal_projected", calibrated=True),
    ENCODERS[0],
    calibrated(replace(ENCODERS[3], complement="diagonal_projected")),
)


@lru_cache(maxsize=8)  # the backends of one case and format follow each other
def exact(operator: str, case: Case, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], np.ndarray]:
    """Arguments of the operator and its exact result."""
    arrays = arrays_of(case)
    if operator in ("correct", "encode"):
        y = rows_of(case, ROWS, dtype)
        return (y,), getattr(oracle, operator)(y.double().numpy(), arrays, case.complement, case.center)
    state = torch.from_numpy(oracle.encode(rows_of(case, ROWS).numpy(), arrays, case.complement, case.center)).to(dtype)
    deltas = deltas_of(case, ROWS, dtype)
    literal = operator == "decode_literal"
    return (state, deltas), oracle.decode(state.double().numpy(), deltas.double().numpy(), arrays, literal=literal)


@lru_cache(maxsize=8)
def composed(operator: str, case: Case, dtype: torch.dtype, device: torch.device, precision: str) -> np.ndarray:
    """The composition on the device of the run, at its precision, which the fixture has set."""
    arguments = (x.to(device) for x in exact(operator, case, dtype)[0])
    if operator.startswith("decode"):
        result = compositions.decode(*arguments, arrays_of(case), literal=operator == "decode_literal")
    else:
        result = getattr(compositions, operator)(*arguments, arrays_of(case), case.complement, case.center)
    return result.double().cpu().numpy()


def results(operator: str, case: Case, run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result of a backend, exact result and result of the composition for the same rows."""
    arguments, truth = exact(operator, case, run.dtype)
    options = {"literal": operator == "decode_literal"} if operator.startswith("decode") else {}
    function = getattr(ops, operator.split("_")[0])
    result = function(*(x.to(run.device) for x in arguments), frame_of(case), backend=run.backend, **options)
    assert result.dtype == run.dtype and result.device.type == run.device.type
    allowed = composed(operator, case, run.dtype, run.device, run.precision)
    return result.double().cpu().numpy(), truth, allowed


def composition_is_comparable(case: Case, run: Run) -> bool:
    """float64: the oracle itself has this precision, so that a ratio of errors means nothing. tf32: where sides are no
    multiples of 8 a library may multiply in full float32, and then only the bound counts."""
    return run.format != "float64" and not (run.format == "tf32" and (case.width % 8 or case.rank % 8))


def row_errors(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(result - exact, axis=1)


@cases_and_runs(CASES, EVERY_BACKEND)
@pytest.mark.parametrize("operator", ["correct", "decode", "decode_literal"])
def test_unit_rows_meet_the_accuracy_contract(case, run, operator):
    result, truth, composition = results(operator, case, run)
    errors = row_errors(result, truth)
    # For unit vectors 1 - cos = |difference|^2/2; rounded rows differ from unit length by less than their error.
    assert 0.5 * errors.max() ** 2 <= run.cosine_loss
    if not composition_is_comparable(case, run):
        return
    allowed = row_errors(composition, truth)
    assert np.sqrt(np.mean(errors**2)) <= 2 * np.sqrt(np.mean(allowed**2))
    assert errors.max() <= 2 * allowed.max()


@cases_and_runs(CASES, EVERY_BACKEND)
def test_encoded_rows_meet_the_accuracy_contract(case, run):
    result, truth, composition = results("encode", case, run)
    polar = 3 * case.blocks
    errors = row_errors(result[:, polar:], truth[:, polar:])
    if run.format == "float64":
        # A coordinate c carries D eps |y| |q|; a phase and a log radius carry that over rho, times the condition of the
        # map, rho T'/T, about 1 here: 4 is safe.
        y = rows_of(case, ROWS).numpy()
        arrays = arrays_of(case)
        target = 0 if case.center else arrays["target_mean"]
        coordinates = (y - arrays["source_mean"] + target) @ arrays["basis"]
        rho = np.tile(np.hypot(coordinates[:, 0::2], coordinates[:, 1::2]), 3)
        rounding = case.width * 2.0**-52
        assert (np.abs(result - truth)[:, :polar] <= 4 * rounding * (1 + 1 / rho)).all()
        assert errors.max() <= 4 * rounding
    if not composition_is_comparable(case, run):
        return
    allowed = row_errors(composition[:, polar:], truth[:, polar:])
    assert np.sqrt(np.mean(errors**2)) <= 2 * np.sqrt(np.mean(allowed**2))
    # Errors of phases have the tail of 1/rho, and no variance: compare their mean.
    assert np.abs(result - truth)[:, :polar].mean() <= 2 * np.abs(composition - truth)[:, :polar].mean()


@widest(EVERY_BACKEND)
@pytest.mark.parametrize("case", **named(BRANCHES))
def test_decoding_an_encoded_row_without_moves_is_the_correction(case, run):
    y, frame = run.rows(case, 17), frame_of(case)
    state = ops.encode(y, frame, backend=run.backend)
    decoded = ops.decode(state, 0 * run.deltas(case, 17), frame, backend=run.backend)
    # Both are the same sum of D terms of at most 1.
    assert torch.allclose(decoded, ops.correct(y, frame, backend=run.backend), rtol=0, atol=case.width * run.eps)


@cases_and_runs([*BRANCHES, ENCODERS[0]], EVERY_BACKEND)
def test_sums_are_those_of_the_uncalibrated_rows(case, run):
    y, frame = run.rows(case, 1000), frame_of(case)
    arrays = {name: value for name, value in arrays_of(case).items() if name != "output_mean"}
    rows = oracle.correct(y.double().cpu().numpy(), arrays, case.complement)
    sums = ops.correct_sums(y, frame, backend=run.backend)
    assert sums.dtype == torch.float64 and sums.device.type == run.device.type
    # Each row is off by sqrt(2 (1 - cos)) at most, and in the worst case all in one direction.
    allowed = (2 * run.cosine_loss) ** 0.5
    assert np.linalg.norm(sums.cpu().numpy() - rows.sum(axis=0)) <= allowed * len(rows)
    parts = [ops.correct_sums(part, frame, backend=run.backend) for part in y.split((1, 998, 1))]
    # at worst float32 sums of a tile's rows
    assert (sum(parts) - sums).norm() <= 128 * 2.0**-24 * sums.norm()
    assert torch.equal(sums, ops.correct_sums(y, frame.with_output_mean(None), backend=run.backend))


@widest(EVERY_BACKEND)
def test_bounds_move_a_row_no_further_than_they_say(run):
    """rho^/rho0 within exp(+-a_rho), phases within a_theta, |dv| within a_v sqrt(D): METHOD D12."""
    case = Case(24, 8)
    frame, state = frame_of(case), ops.encode(run.rows(case, 50), frame_of(case), backend=run.backend)
    far = 100 * run.deltas(case, 50).sign()
    start, moved = (
        ops.decode(state, deltas, frame, a_theta=0.3, a_rho=0.2, a_v=0.01, backend=run.backend)
        for deltas in (0 * far, far)
    )
    log_rho = state[:, 2 * case.blocks : 3 * case.blocks]
    c0 = log_rho.exp().norm(dim=1)
    kappa = np.sqrt((np.exp(0.2) - 1) ** 2 + 4 * np.exp(0.2) * np.sin(0.15) ** 2)
    epsilon = kappa * c0 + 0.01 * np.sqrt(case.width)
    unnormalised = (log_rho.mul(2).exp().sum(1) + state[:, 3 * case.blocks :].square().sum(1)).sqrt()
    # |w/|w| - w'/|w'|| <= 2 |w - w'|/|w|
    assert ((start - moved).norm(dim=1) <= 2 * epsilon / unnormalised).all()
    assert (start - moved).norm(dim=1).min() > 0.01


@runs(EVERY_BACKEND, ["float32"])
def test_a_row_of_zero_length_comes_out_as_zero(run):
    """Norm has a floor instead of a division by zero: y = 0, zero means and a map that sends the radius to 0."""
    knots, none = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 0.0]])
    frame = ops.Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, none, torch.ones(1))
    zeros = torch.zeros(3, 4, device=run.device)
    assert torch.equal(ops.correct(zeros, frame, backend=run.backend), zeros)


def test_lower_matmul_precision_stays_within_the_contract_of_tf32():
    case = calibrated(Case(256, 64))
    exact = oracle.correct(rows_of(case, ROWS, torch.float32).double().numpy(), arrays_of(case), case.complement)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        result = ops.correct(rows_of(case, ROWS, torch.float32), frame_of(case), backend="cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    assert 0.5 * row_errors(result.double().numpy(), exact).max() ** 2 <= 1e-6


def test_autocast_changes_nothing():
    case = calibrated(Case(70, 22))
    y, frame = rows_of(case, 300, torch.float32), frame_of(case)
    plain = ops.correct(y, frame, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.correct(y, frame, backend="cpu"), plain)
