"""Floors, goals and selection of the benchmark's cases, against numbers worked out by hand."""

from __future__ import annotations

import re

import pytest
import torch
from cases import arrays_of, rows_of, rows_on

from aniso_ext.bench.ceilings import Ceilings
from aniso_ext.bench.floors import work_of
from aniso_ext.bench.suite import CASES, Goal, select
from aniso_ext.bench.timing import Times, interleaved
from aniso_ext.errors import InputError

# BUILD.md's ceilings of one H200.
H200 = Ceilings(copy_gb_per_s=4250.0, gemm_tflop_per_s={"bf16": 709.0, "tf32": 438.0})


@pytest.mark.parametrize(
    "name, bytes_per_row, flop, floor",
    [
        # 2 * 1280 elements of two bytes; two products of 2 * 1280 * 128
        ("correct-d1280-r128-bf16", 5120, 655_360, 5120 / 4250),
        # a third product, and the products are the floor
        ("correct-d1280-r128-bf16-diagonal", 5120, 983_040, 983_040 / 709e3),
        ("correct-d1280-r128-tf32", 10_240, 655_360, 10_240 / 4250),
        ("correct-d768-r128-bf16", 3072, 393_216, 3072 / 4250),
        ("correct-d512-r128-bf16", 2048, 262_144, 2048 / 4250),
        ("correct-d1280-r256-bf16", 5120, 1_310_720, 1_310_720 / 709e3),
        # rows are read, the sums are nothing; one projection
        ("correct_sums-d1280-r128-bf16", 2560, 327_680, 2560 / 4250),
        # M = 64: 1280 read, 1280 + 192 written
        ("encode-d1280-r128-bf16", 2 * 2752, 655_360, 2 * 2752 / 4250),
        # 1472 and 1408 read, 1280 written
        ("decode-d1280-r128-bf16", 2 * 4160, 655_360, 2 * 4160 / 4250),
        ("encode_decode-d1280-r128-bf16", 2 * 6912, 1_310_720, 2 * 6912 / 4250),
        # rows and gradient read, gradient written; two projections and a rebuild
        ("correct-backward-d1280-r128-bf16", 7680, 983_040, 7680 / 4250),
        ("encode-backward-d1280-r128-bf16", 2 * (1280 + 1472 + 1280), 983_040, 2 * 4032 / 4250),
        # gradient, state and deltas read, the gradients of both written
        ("decode-backward-d1280-r128-bf16", 2 * (1280 + 2 * 1472 + 2 * 1408), 1_310_720, 2 * 7040 / 4250),
    ],
)
def test_floors_are_those_worked_out_by_hand(name, bytes_per_row, flop, floor):
    (case,) = select([name])
    work = work_of(case)
    assert (work.bytes, work.flop) == (bytes_per_row, flop)
    assert work.floor_ns(H200, case.format) == pytest.approx(floor)


def test_every_case_has_a_floor_and_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) == 13
    assert all(work_of(case).floor_ns(H200, case.format) > 0 for case in CASES)


def test_goals_are_limits_in_time_and_against_the_compiler():
    goal = Goal(floors=1.25)
    assert goal.limit(1.2) == 1.5
    assert goal.met(1.5, 1.2, 3.0) is True
    assert goal.met(1.5, 1.2, 2.9) is False  # less than twice as fast
    assert goal.met(1.6, 1.2, 9.0) is False
    assert goal.met(1.4, 1.2, None) is None  # not all of it was measured
    assert goal.met(1.6, 1.2, None) is False
    assert Goal(floors=2.0, over_compiled=3.0).met(2.3, 1.2, 6.9) is True


def test_goals_set_as_times_on_an_h200_are_those_times_there():
    (case,) = select(["correct-d1280-r128-bf16"])
    assert case.goal.limit(work_of(case).floor_ns(H200, case.format)) == pytest.approx(1.6, rel=0.01)


def test_cases_are_chosen_by_name_or_pattern():
    assert select([]) == CASES
    assert [case.name for case in select(["correct-d512-*", "encode-d*"])] == [
        "correct-d512-r128-bf16",
        "encode-d1280-r128-bf16",
    ]
    with pytest.raises(InputError, match=re.escape("there is no case 'corect-*'; choose of correct-d1280-r128-bf16, ")):
        select(["encode-*", "corect-*"])


def test_rows_drawn_on_a_device_have_the_law_of_those_of_the_tests():
    case = select(["correct-d512-r128-bf16"])[0].problem
    rows = rows_on(case, 4000, torch.float32, torch.device("cpu"), seed=1).double()
    again = rows_on(case, 4000, torch.float32, torch.device("cpu"), seed=1).double()
    assert torch.equal(rows, again)
    assert not torch.equal(rows, rows_on(case, 4000, torch.float32, torch.device("cpu"), seed=2).double())
    assert torch.allclose(rows.norm(dim=1), torch.ones(4000, dtype=torch.float64), rtol=0, atol=1e-6)
    other = rows_of(case, 4000)
    basis = torch.tensor(arrays_of(case)["basis"])
    # means of 4000 unit rows differ by about sqrt(2/4000) = 0.022; variances by 2.2 % each, and 16 % bounds 128 of them
    assert (rows.mean(0) - other.mean(0)).norm() < 0.05
    variances = [(drawn @ basis).var(dim=0) for drawn in (rows, other)]
    assert (variances[0] / variances[1] - 1).abs().max() < 0.16


def test_samples_are_taken_in_turn_and_summarised():
    calls: list[str] = []
    runs = {name: (lambda sample, name=name: calls.append(f"{name}{sample}")) for name in "ab"}
    times = interleaved(runs, torch.device("cpu"), rounds=3, warm_up=1)
    assert calls == ["a0", "b0", "a0", "b0", "b1", "a1", "a2", "b2"]
    assert set(times) == {"a", "b"} and all(t.p20 <= t.median <= t.p80 for t in times.values())
    summary = Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (summary.median, summary.p20, summary.p80) == (3.5, 2.0, 5.0)
