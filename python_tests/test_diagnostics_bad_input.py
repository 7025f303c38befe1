"""Input at the edge of what can be measured: a defined result, or an error that says what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_diagnostics_alignment import three_sides
from test_diagnostics_gap import unit

from aniso_ext import diagnostics
from aniso_ext.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
SHARES = ("omega", "omega_chance", "omega_tied", "recall_at_1", "recall_at_10")


def within_range(report: diagnostics.AlignmentReport) -> None:
    """Shares lie in [0, 1], correlations and cosines in [-1, 1], and every interval is in order."""
    for name in SHARES:
        assert 0 <= getattr(report, name) <= 1, name
    for name in ("psi", "paired_cosine"):
        assert math.isnan(getattr(report, name)) or abs(getattr(report, name)) <= 1 + 1e-12, name
    assert all(low <= high for low, high in report.intervals.values())
    assert report.to_json() and str(report)


@pytest.mark.parametrize("measure", ["gap", "alignment", "oracle_path"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda y, x: (y[:-1], x),
            "source has 299 rows but target has 300: row i of each must belong to the same pair",
        ),
        (lambda y, x: (y[:0], x[:0]), r"0 pairs are too few: at least \d+ are needed"),
        (lambda y, x: (y[:2], x[:2]), r"2 pairs are too few: at least \d+ are needed"),
        (lambda y, x: (np.where(np.arange(300)[:, None] == 5, np.nan, y), x), "source .* first in row 5: drop or mend"),
        (lambda y, x: (y, np.where(np.arange(300)[:, None] == 299, -np.inf, x)), "target .* first in row 299"),
        (lambda y, x: (y[:, :0], x[:, :0]), "width 0"),
    ],
    ids=["unpaired", "none", "two", "nan", "inf", "no width"],
)
def test_rows_that_are_no_pairs_are_refused(measure: str, change, message: str) -> None:
    y, x = change(*three_sides()[:2])
    with pytest.raises(InputError, match=message):
        getattr(diagnostics, measure)(y, x, *((y,) if measure == "alignment" else ()))


@pytest.mark.parametrize(("n", "k"), [(20, 20), (20, 21), (3, 3)])
def test_more_neighbours_than_other_rows_are_refused(n: int, k: int) -> None:
    y, x, z = three_sides(n=n)
    with pytest.raises(InputError, match=f"{n} pairs are too few: at least {k + 1}"):
        diagnostics.alignment(y, x, z, k=k)
    with pytest.raises(InputError, match=f"{n} pairs are too few: at least {k + 1}"):
        diagnostics.oracle_path(y, x, k=k)


def test_all_other_rows_as_neighbours_overlap_fully() -> None:
    report = diagnostics.alignment(*three_sides(n=20), k=19, bootstrap=40)
    assert report.omega == 1 and report.omega_chance == 1 and report.intervals["omega"] == (1, 1)
    within_range(report)


def test_three_pairs_and_two_dimensions() -> None:
    rng = np.random.default_rng(0)
    for n, width in ((3, 16), (3, 2), (50, 2), (50, 1)):
        y, x, z = (unit(rng.normal(size=(n, width)) + 0.1) for _ in range(3))
        report = diagnostics.alignment(y, x, z, k=2, exact_psi=True, bootstrap=40)
        within_range(report)
        gap = diagnostics.gap(y, x, bootstrap=40)
        assert 1 <= gap.a_r <= width + 1e-9 or math.isnan(gap.a_r)
        assert gap.overlap[-1].q == width and gap.overlap[-1].overlap == pytest.approx(1)
        assert len(diagnostics.oracle_path(y, x, k=2, alphas=(0.0, 1.0)).points) >= 2


def test_source_equal_to_target_has_no_gap_and_no_residual() -> None:
    y, _, _ = three_sides()
    report = diagnostics.gap(y, y, bootstrap=40)
    assert report.g_mu == report.g_sigma == report.d_center == report.residual_norm == 0
    assert math.isnan(report.a_r) and math.isnan(report.r_res) and math.isnan(report.d_eff)
    assert report.c_lambda == pytest.approx(1) and report.o_q == pytest.approx(1)
    assert report.intervals["g_mu"] == (0, 0) and "a_r" not in report.intervals
    after = diagnostics.alignment(y, y, y, bootstrap=40)
    assert after.delta_mu == 0 and after.recall_at_1 == 1 and after.paired_cosine == pytest.approx(1)
    assert math.isnan(after.a_r) and "a_r" not in after.intervals
    assert after.m_z == pytest.approx(after.m_x)


def test_constant_rows_have_no_geometry() -> None:
    """All source rows are the same: no covariance and no order of neighbours, so that ties keep their index order."""
    _, x, z = three_sides()
    y = np.tile(np.eye(16)[0], (300, 1))
    gap = diagnostics.gap(y, x, bootstrap=40)
    assert math.isnan(gap.c_lambda) and gap.c_lambda_count == 0 and not math.isnan(gap.d_center)
    report = diagnostics.alignment(y, x, z, bootstrap=40)
    assert math.isnan(report.psi) and report.omega_tied == 1 and "psi" not in report.intervals
    assert diagnostics.alignment(y, x, y, exact_psi=True).omega == 1
    within_range(report)


@pytest.mark.parametrize("half", [False, True])
def test_zero_rows_are_neighbours_of_nobody_in_particular(half: bool) -> None:
    from aniso_ext.diagnostics.alignment import measure
    from aniso_ext.diagnostics.alignment_intervals import Settings

    y, x, z = (torch.from_numpy(side.copy()) for side in three_sides())
    for side in (y, x, z):
        side[::3] = 0
    report = measure(y, x, z, Settings(k=5, bootstrap=40, half=half))
    within_range(report)
    assert sum("100 zero rows" in text for text in report.warnings) == 3
    everything = measure(*(torch.zeros(40, 4, dtype=torch.float64) for _ in range(3)), Settings(k=5, half=half))
    assert everything.omega == 1 and everything.paired_cosine == 0 and math.isnan(everything.psi)


def test_a_few_copies_of_one_pair() -> None:
    y, x, z = (np.tile(side[:3], (20, 1)) for side in three_sides())
    report = diagnostics.alignment(y, x, z, k=4, bootstrap=40)
    within_range(report)
    assert report.omega == 1 and report.omega_tied == 1
    assert report.recall_at_1 <= 1 / 20 + 1e-12


@pytest.mark.parametrize("device", ["tpu", "mps", 1.5, pytest.param("cuda", id="no cuda")])
def test_devices_that_are_not_there_are_named(monkeypatch, device: object) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    y, x, z = three_sides()
    for measure in (
        lambda: diagnostics.gap(y, x, device=device),
        lambda: diagnostics.alignment(y, x, z, device=device),
        lambda: diagnostics.oracle_path(y, x, device=device),
    ):
        with pytest.raises(InputError, match=r"device = .* pass (device=)?'cpu'"):
            measure()
