"""Stock PyTorch that the kernels are timed against is the same function; what differs is caught before it is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, frame_of

from aniso_ext.bench import variants
from aniso_ext.bench.checks import Checker, relative_error, sampled_rows
from aniso_ext.bench.suite import CASES, BenchCase

CPU = torch.device("cpu")


def small(case: BenchCase, format: str = "fp32") -> BenchCase:
    """A case of the suite at a width and rank that a processor does at once."""
    problem = Case(40, 8, knots=32, complement=case.problem.complement, calibrated=True, sampled=True)
    return replace(case, problem=problem, format=format)


# Each takes the compiler seconds: one with both forms, one with a backward of two gradients.
COMPILED = ("correct-d1280-r128-bf16", "decode-backward-d1280-r128-bf16")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_variant_passes_the_check(case):
    compile = case.name in COMPILED
    case = small(case)
    batch = variants.draw(case, 300, CPU, seed=0)
    checker, steps = Checker(case, batch), None
    for variant in variants.variants(case, ["cpu", "reference"], CPU, compile):
        check = checker.check(variants.runner(case, variant.function, batch)(), variant.problem, variant.ours, steps)
        assert check.reason is None, variant.name
        # float32: a thousand roundings of 2^-24, and slopes of a few knots
        assert check.relative < 1e-3, variant.name
        steps = check if variant.name == "eager" else steps
    if compile:
        torch._dynamo.reset()


@pytest.mark.parametrize("complement", ["scalar", "diagonal"])
@pytest.mark.parametrize("operation", ["correct", "correct_sums", "encode", "decode"])
def test_the_folded_form_is_the_operation(operation, complement):
    """What torch.compile gets; in float64 eps = 1e-12 under the root makes 1e-12/(2 rho^2), with rho above 0.03."""
    problem = Case(40, 8, knots=32, complement=complement, calibrated=True, sampled=True)
    case = replace(small(CASES[0]), operation=operation, problem=problem)
    inputs = tuple(value.double() for value in variants.draw(case, 200, CPU, seed=0).inputs)
    folded = getattr(variants.FoldedForm(frame_of(problem), torch.float64), operation)
    expected = variants.ours(operation, problem, "reference")(*inputs)
    # sums are float32 there, 200 rows of at most 1
    assert relative_error(folded(*inputs).double(), expected) <= (1e-5 if operation == "correct_sums" else 1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_a_wrong_result_is_caught(case, format):
    """One wrong element in the last row, one row shifted into the next, or a NaN: nothing of that is timed."""
    case = small(case, format)
    batch = variants.draw(case, 5000, CPU, seed=0)
    checker = Checker(case, batch)
    right = variants.runner(case, variants.ours(case.operation, case.problem, "cpu"), batch)()

    def reason(change) -> str | None:
        outputs = tuple(value.clone() for value in right)
        change(outputs[0])
        return checker.check(outputs, case.problem, True, None).reason

    def one_nan(value: torch.Tensor) -> None:
        value[-1] = float("nan")

    def wrong_rows(value: torch.Tensor) -> None:
        value.copy_(value.roll(1, 0))

    assert reason(lambda value: None) is None
    assert reason(one_nan) == "not finite"
    assert "allowed" in reason(wrong_rows)
    assert "allowed" in reason(lambda value: value.mul_(-1))


def test_less_accurate_than_stock_is_caught():
    """The contract: twice the error of the composition in the same format, even inside the fixed bound."""
    case = small(CASES[0], "bf16")
    batch = variants.draw(case, 500, CPU, seed=0)
    checker = Checker(case, batch)
    (right,) = variants.runner(case, variants.ours("correct", case.problem, "reference"), batch)()
    steps = checker.check((right,), case.problem, False, None)
    # 2 |noise| beside the rounding makes sqrt(5) times its error: above 2, and 1 - cos stays below 2e-5
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)) / right.shape[1] ** 0.5
    rough = (right.float() + 2 * steps.relative * noise).bfloat16()
    assert checker.check((rough,), case.problem, True, None).reason is None
    assert "times" in checker.check((rough,), case.problem, True, steps).reason


@pytest.mark.parametrize("rows, count", [(1, 1), (7, 7), (2000, 2000), (1_000_000, 3072)])
def test_checked_rows_are_all_or_come_from_both_ends_and_the_middle(rows, count):
    chosen = sampled_rows(rows)
    assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == rows - 1
    assert rows // 2 in chosen
