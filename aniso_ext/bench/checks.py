"""Nothing is timed before it is right: every variant against the float64 reference, on rows from all over the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from aniso_ext.bench.problems import Case
from aniso_ext.bench.suite import BenchCase
from aniso_ext.bench.variants import Batch, Outputs, ours

_CHECKED_IN_A_ROW = 1024
_SUMMED_AT_ONCE = 32_768

# 1 - cos of unit rows: the contract of the kernels (DESIGN section 3). What is not unit rows has the relative error of
# its steep parts, phases of small radii and, in gradients, slopes between close knots.
_COSINE_LOSS = {"bf16": 2e-5, "tf32": 1e-6, "fp32": 1e-10}
_ERROR = {"bf16": 2e-2, "tf32": 1e-2, "fp32": 1e-4}
# Stock PyTorch rounds every step in the format of the rows and has no contract: it must only be the same function.
_STOCK_COSINE_LOSS = {"bf16": 1e-3, "tf32": 1e-4, "fp32": 1e-8}
_STOCK_ERROR = {"bf16": 0.2, "tf32": 0.1, "fp32": 0.01}
# Slopes of fitted maps differ from knot to knot, and a coordinate that is rounded to bfloat16 reaches several knots:
# only the comparison with stock PyTorch says something there, this says that it is the same function.
_ERROR_OF_GRADIENTS = {"bf16": 0.9, "tf32": 0.5, "fp32": 0.1}
# Times the error of stock PyTorch, step by step in the same format.
_CONTRACT, _CONTRACT_OF_GRADIENTS = 2.0, 3.0
_USUAL_ROWS = 0.95


@dataclass(frozen=True)
class Check:
    """Errors of a variant; ``reason`` says why it failed."""

    error: float  # largest 1 - cos of unit rows, else relative: |out - ref| / |ref|, of gradients that of the usual row
    relative: float
    reason: str | None = None


class Checker:
    """Compares outputs of one case for one batch."""

    def __init__(self, case: BenchCase, batch: Batch) -> None:
        self._case, self._batch = case, batch
        rows = len(batch.inputs[0])
        self._rows = sampled_rows(rows).to(batch.inputs[0].device)
        self._expected: dict[Case, Outputs] = {}

    def check(self, outputs: Outputs, problem: Case, is_ours: bool, steps: Check | None) -> Check:
        """``steps`` is the check of stock PyTorch step by step, which the accuracy contract refers to."""
        case, expected = self._case, self._reference(problem)
        summed = case.operation == "correct_sums"
        found = [(value if summed else value[self._rows]).double() for value in outputs]
        measure = usual_row_error if case.backward else relative_error
        relative = max(measure(a, b) for a, b in zip(found, expected, strict=True))
        error = max(_cosine_loss(found[0], expected[0]), 0.0) if case.unit_rows else relative
        if not relative < float("inf"):
            return Check(float("nan"), float("nan"), "not finite")
        allowed = _allowed(case, is_ours)
        if error > allowed:
            what = "1 - cos" if case.unit_rows else "relative error"
            return Check(error, relative, f"{what} is {error:.2g}, allowed {allowed:.2g}")
        factor = _CONTRACT_OF_GRADIENTS if case.backward else _CONTRACT
        if is_ours and steps is not None and relative > factor * steps.relative:
            reason = f"error is {relative:.2g}, more than {factor:g} times {steps.relative:.2g} of eager"
            return Check(error, relative, reason)
        return Check(error, relative)

    def _reference(self, problem: Case) -> Outputs:
        if problem not in self._expected:
            function = ours(self._case.operation, problem, "reference")
            if self._case.operation == "correct_sums":
                (y,) = self._batch.inputs
                parts = (function(part.double()) for part in y.split(_SUMMED_AT_ONCE))
                self._expected[problem] = (sum(parts, torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)),)
            else:
                self._expected[problem] = self._exact(function)
        return self._expected[problem]

    def _exact(self, function: Callable[..., torch.Tensor]) -> Outputs:
        inputs = tuple(value[self._rows].double() for value in self._batch.inputs)
        if self._batch.cotangent is None:
            with torch.no_grad():
                return (function(*inputs),)
        leaves = tuple(value.requires_grad_() for value in inputs)
        return torch.autograd.grad(function(*leaves), leaves, self._batch.cotangent[self._rows].double())


def _allowed(case: BenchCase, is_ours: bool) -> float:
    if case.unit_rows:
        limits = _COSINE_LOSS if is_ours else _STOCK_COSINE_LOSS
    elif case.backward:
        limits = _ERROR_OF_GRADIENTS
    else:
        limits = _ERROR if is_ours else _STOCK_ERROR
    return limits[case.format]


def sampled_rows(rows: int) -> torch.Tensor:
    """The first, the middle and the last rows, a few thousand in all."""
    part = min(_CHECKED_IN_A_ROW, rows)
    starts = (0, (rows - part) // 2, rows - part)
    return torch.cat([torch.arange(start, start + part) for start in starts]).unique()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; infinite where anything is not finite."""
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def usual_row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error that 95 of 100 rows stay below; infinite where anything is not finite.

    Gradients go through 1/rho: the error of a row with a block near the origin has no variance, and a norm over all
    rows would compare the few worst ones, which differ from one order of summation to the next.
    """
    if not bool(found.isfinite().all()):
        return float("inf")
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return float(errors.nan_to_num(0.0).quantile(_USUAL_ROWS))


def _cosine_loss(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((1 - torch.nn.functional.cosine_similarity(found, expected, dim=1)).max())
