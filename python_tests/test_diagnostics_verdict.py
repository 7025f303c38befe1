"""The verdict on worlds whose answer is known by construction, and on reports with chosen numbers and intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aniso_ext import diagnostics
from aniso_ext.diagnostics import AlignmentReport, GapReport, Verdict, verdict
from aniso_ext.diagnostics.choice import score
from aniso_ext.diagnostics.intervals import Interval
from aniso_ext.diagnostics.verdict import C_LAMBDA, EXCESS

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
WIDTH, ROWS, Q = 16, 1200, 4
DECAY = 2.0 ** -np.arange(WIDTH)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clouds(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """Rows whose variances halve from direction to direction."""
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)) * np.sqrt(DECAY)


def noise(seed: int, scale: np.ndarray | float, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)) * scale


def gap_of(source: np.ndarray, target: np.ndarray) -> GapReport:
    return diagnostics.gap(source, target, q=min(Q, source.shape[1]), rank=min(Q, source.shape[1]))


def judged(source: np.ndarray, target: np.ndarray, **methods: np.ndarray) -> Verdict:
    reports = {
        name: diagnostics.alignment(source, target, rows, k=5, exact_psi=True)
        for name, rows in {"identity": source, **methods}.items()
    }
    return verdict(gap_of(source, target), reports)


def outcomes(found: Verdict, *topics: str) -> tuple[str, ...]:
    return tuple(found[topic].outcome for topic in topics)


def test_a_shift_and_little_else_is_bias() -> None:
    y = clouds()
    x = y + 3 * np.eye(WIDTH)[-1] + noise(1, np.sqrt(0.05 * DECAY))
    found = judged(y, x, shifted=y - y.mean(axis=0) + x.mean(axis=0))
    # E||r||^2 = .05 tr S = .1 against ||shift||^2 = 9: the residual is 1.1 % of the whole
    assert outcomes(found, "composition", "pairing", "geometry") == ("bias", "paired", "compatible")
    assert "bias 98.9" in found["composition"].sentence
    assert outcomes(found, "method") == ("favoured",) and "favour shifted" in found["method"].sentence


def test_an_isotropic_residual_fails_the_premise() -> None:
    y = clouds()
    found = judged(y, y + noise(1, 0.3))
    assert outcomes(found, "anisotropy", "geometry", "premise") == ("isotropic", "compatible", "fails")
    assert "residual is isotropic" in found["premise"].sentence


def test_a_residual_along_shared_directions_meets_the_premise() -> None:
    y = clouds()
    found = judged(y, y + noise(1, np.sqrt(DECAY)))
    assert outcomes(found, "composition", "anisotropy", "geometry", "premise") == (
        "residual", "anisotropic", "compatible", "holds",
    )  # fmt: skip


def test_strong_directions_that_are_not_shared_fail_the_premise() -> None:
    # the same fall-off, from the other end of the axes: equal spectra, and leading subspaces that are orthogonal
    y = clouds()
    found = judged(y, clouds(1)[:, ::-1] + 0.5 * y)
    assert outcomes(found, "geometry", "premise") == ("incompatible", "fails")
    assert "not shared" in found["premise"].sentence


def test_clouds_without_strong_directions_have_no_geometry_to_share() -> None:
    y = noise(0, 1.0)
    found = judged(y, y + noise(1, np.sqrt(DECAY)))
    assert outcomes(found, "geometry", "premise") == ("flat", "fails")


def test_source_equal_to_target_leaves_nothing_to_do() -> None:
    y = clouds()
    found = judged(y, y, turned=y @ np.linalg.qr(noise(2, 1.0, WIDTH))[0])
    assert outcomes(found, "composition", "pairing", "anisotropy", "premise", "method") == (
        "none", "same", "none", "none", "identity",
    )  # fmt: skip
    assert "Nothing is to be corrected" in found["method"].sentence


def test_rows_in_another_order_are_found_out() -> None:
    y = clouds()
    x = (y + noise(1, 0.2))[np.random.default_rng(3).permutation(ROWS)]
    found = judged(y, x, shifted=y + 0.01)
    assert outcomes(found, "pairing", "premise") == ("unpaired", "undecided")
    assert "same order" in found["pairing"].sentence


@pytest.mark.parametrize("shape", [(3, 2), (3, 1), (4, 64), (12, 16)])
def test_few_rows_give_an_answer_that_says_so(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    y, x = rng.normal(size=shape), rng.normal(size=shape)
    report = diagnostics.alignment(y, x, y, k=1)
    found = verdict(diagnostics.gap(y, x), {"identity": report})
    assert found["premise"].outcome in ("undecided", "fails") and found["method"].outcome == "alone"
    if shape[0] < 4 * shape[1]:
        assert found["rows"].outcome == "few"
    assert all(one.sentence and one.rule and not re.search(r"\bnan\b", one.sentence) for one in found.findings)


def test_rows_that_do_not_vary_are_no_error() -> None:
    y, x = np.tile([[1.0, 0.0]], (30, 1)), np.tile([[0.0, 1.0]], (30, 1))
    found = verdict(diagnostics.gap(y, x), {"identity": diagnostics.alignment(y, x, y, k=3)})
    assert outcomes(found, "composition", "pairing", "geometry", "premise") == (
        "bias", "undecided", "undecided", "undecided",
    )  # fmt: skip


def test_without_methods_it_asks_for_some() -> None:
    y = clouds()
    assert "give aligners" in judged(y, y + 1)["method"].sentence


def test_identity_is_favoured_over_methods_that_lose_their_source() -> None:
    y = clouds()
    x = y + noise(1, np.sqrt(0.1 * DECAY))
    found = judged(y, x, permuted=x[np.random.default_rng(4).permutation(ROWS)])
    assert outcomes(found, "method") == ("identity",)
    assert "leave it" in found["method"].sentence and "Left out" in found["method"].sentence


def test_equal_methods_cannot_be_told_apart() -> None:
    y = clouds()
    x = y + 3 * np.eye(WIDTH)[-1] + noise(1, np.sqrt(0.05 * DECAY))
    shifted = y - y.mean(axis=0) + x.mean(axis=0)
    sentence = judged(y, x, one=shifted, other=shifted.copy())["method"].sentence
    assert "one and other cannot be told apart" in sentence and "simplest" in sentence


@pytest.fixture(scope="module")
def reports() -> tuple[GapReport, AlignmentReport]:
    y = clouds()
    x = y + noise(1, np.sqrt(DECAY)) + 0.5
    return gap_of(y, x), diagnostics.alignment(y, x, y, k=5, exact_psi=True)


@pytest.mark.parametrize(
    ("r_res", "interval", "outcome"),
    [
        (0.9, (0.85, 0.92), "residual"),
        (0.7, (0.6, 0.8), "undecided"),
        (0.2, (0.1, 0.3), "bias"),
        (0.3, (0.2, 0.4), "undecided"),
        (0.5, (0.4, 0.6), "both"),
    ],
)
def test_the_interval_decides_what_dominates(
    reports: tuple[GapReport, AlignmentReport], r_res: float, interval: tuple[float, float], outcome: str
) -> None:
    gap = replace(reports[0], r_res=r_res, intervals={"r_res": Interval(*interval)})
    found = verdict(gap, {"identity": reports[1]})
    assert outcomes(found, "composition") == (outcome,)
    assert f"{100 * interval[0]:.1f}, {100 * interval[1]:.1f}" in found["composition"].sentence


@pytest.mark.parametrize(
    ("numbers", "outcome"),
    [
        ({"c_lambda": (0.85, 0.99), "o_q": (0.5, 0.7)}, "compatible"),
        ({"c_lambda": (0.75, 0.85), "o_q": (0.5, 0.7)}, "undecided"),
        ({"c_lambda": (0.6, 0.75), "o_q": (0.5, 0.7)}, "incompatible"),
        ({"c_lambda": (0.85, 0.99), "o_q": (0.2, 0.24)}, "incompatible"),
        ({"c_lambda": (0.85, 0.99), "o_q": (0.1, 0.9)}, "undecided"),
    ],
)
def test_the_intervals_decide_about_geometry(
    reports: tuple[GapReport, AlignmentReport], numbers: Mapping[str, tuple[float, float]], outcome: str
) -> None:
    values = {name: sum(bounds) / 2 for name, bounds in numbers.items()}
    changed: dict[str, Any] = {**values, "intervals": {name: Interval(*bounds) for name, bounds in numbers.items()}}
    found = verdict(replace(reports[0], **changed), {"identity": reports[1]})
    assert outcomes(found, "geometry") == (outcome,)


def test_rules_name_their_thresholds(reports: tuple[GapReport, AlignmentReport]) -> None:
    gap = reports[0]
    rule = verdict(gap, {"identity": reports[1]})["geometry"].rule
    needed = gap.o_q_baseline + EXCESS * (1 - gap.o_q_baseline)
    assert f"C_lambda ≥ {C_LAMBDA:g}" in rule and f"O_q ≥ {needed:.3f}" in rule


def test_overlapping_intervals_are_a_tie(reports: tuple[GapReport, AlignmentReport]) -> None:
    gap, base = reports

    def method(m_z: float, half: float) -> AlignmentReport:
        values = {"psi": 0.95, "omega": 0.9, "m_z": m_z, "m_x": 0.9, "paired_cosine": 0.9, "recall_at_10": 0.9}
        return replace(base, **values, intervals={name: Interval(v - half, v + half) for name, v in values.items()})

    low = replace(method(0.1, 0.001), paired_cosine=0.2, recall_at_10=0.2, intervals={})
    apart = verdict(gap, {"identity": low, "a": method(0.5, 0.01), "b": method(0.6, 0.01)})["method"]
    assert apart.outcome == "favoured" and "favour b" in apart.sentence
    tied = verdict(gap, {"identity": low, "a": method(0.5, 0.1), "b": method(0.6, 0.1)})["method"]
    assert tied.outcome == "tied" and "b and a cannot be told apart" in tied.sentence


def test_the_score_orders_the_papers_methods_as_the_paper_does(reports: tuple[GapReport, AlignmentReport]) -> None:
    def published(psi: float, omega: float, m_z: float, m_x: float) -> float:
        return score(replace(reports[1], psi=psi, omega=omega, m_z=m_z, m_x=m_x, intervals={})).value

    c3, anisoalign = published(0.925, 0.840, 0.410, 0.075), published(0.983, 0.945, 0.372, 0.337)
    assert anisoalign > c3
    # P = (.983 + .945) / 2 = .964, M = .337
    assert anisoalign == pytest.approx(2 * 0.964 * 0.337 / (0.964 + 0.337), abs=1e-12)
    assert math.isnan(published(0.9, 0.9, math.nan, 0.5))
