"""The gap report against brute-force NumPy, closed forms and the facts of real embeddings."""

from __future__ import annotations

import doctest
import importlib
import json
import math

import numpy as np
import pytest
import torch

from aniso_ext import diagnostics
from aniso_ext.data import open_embeddings
from aniso_ext.errors import InputError

MODULES = ("alignment", "consistency", "gap", "mixing", "oracle")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def paired_rows(n: int = 400, width: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scale = np.arange(1, width + 1) ** -0.7
    y = rng.normal(size=(n, width)) * scale
    x = (y + 0.5 * rng.normal(size=(n, width)) * scale[::-1]) @ np.linalg.qr(
        np.eye(width) + 0.1 * rng.normal(size=(width, width))
    )[0]
    return unit(y + 0.3), unit(x - 0.2)


def brute_force(y: np.ndarray, x: np.ndarray, q: int, basis: np.ndarray) -> dict[str, float]:
    """METHOD section 1 written out, one number at a time."""
    n, width = y.shape
    s_y, s_x = np.cov(y.T, bias=True), np.cov(x.T, bias=True)
    r = (x - x.mean(0)) - (y - y.mean(0))
    s_r = sum(np.outer(row, row) for row in r) / n
    l_y, u_y = np.linalg.eigh(s_y)
    l_x, u_x = np.linalg.eigh(s_x)
    l_r = np.linalg.eigvalsh(s_r)[::-1]
    return {
        "g_mu": np.linalg.norm(x.mean(0) - y.mean(0)),
        "g_sigma_abs": np.linalg.norm(s_x - s_y),
        "g_sigma": np.linalg.norm(s_x - s_y) / np.linalg.norm(s_x),
        "c_lambda": np.corrcoef(np.log(np.sort(l_x)), np.log(np.sort(l_y)))[0, 1],
        "o_q": np.linalg.norm(u_x[:, -q:].T @ u_y[:, -q:]) ** 2 / q,
        "o_q_baseline": q / width,
        "d_center": np.mean(np.linalg.norm(r, axis=1) ** 2),
        "residual_norm": np.mean(np.linalg.norm(r, axis=1)),
        "r_res": np.mean(np.sum(r**2, 1)) / np.mean(np.sum((x - y) ** 2, 1)),
        "r_res_distance": np.mean(np.linalg.norm(r, axis=1)) / np.mean(np.linalg.norm(x - y, axis=1)),
        "a_r": l_r[0] / (np.trace(s_r) / width),
        "d_eff": np.trace(s_r) ** 2 / np.trace(s_r @ s_r),
        "d_eff_ratio": np.trace(s_r) ** 2 / np.trace(s_r @ s_r) / width,
        "eta_u": np.trace(basis @ basis.T @ s_r) / np.trace(s_r),
    }


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"aniso_ext.diagnostics.{module}"))
    assert failed == 0 and attempted > 0


def test_every_number_equals_brute_force() -> None:
    y, x = paired_rows()
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(24, 6)))[0]
    report = diagnostics.gap(y, x, q=5, basis=basis)
    for name, value in brute_force(y, x, 5, basis).items():
        assert getattr(report, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert (report.n, report.width, report.q, report.eta_u_rank) == (400, 24, 5, 6)
    r = (x - x.mean(0)) - (y - y.mean(0))
    spectrum = np.linalg.eigvalsh(r.T @ r / 400)[::-1]
    np.testing.assert_allclose(report.residual_spectrum, spectrum, rtol=1e-9)
    np.testing.assert_allclose(report.source_spectrum, np.linalg.eigvalsh(np.cov(y.T, bias=True))[::-1], rtol=1e-9)
    np.testing.assert_allclose(report.target_spectrum, np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1], rtol=1e-9)
    assert [point.rank for point in report.energy] == [1, 2, 4, 8, 16, 24]
    for point in report.energy:
        assert point.energy == pytest.approx(spectrum[: point.rank].sum() / spectrum.sum(), rel=1e-9)
        assert point.isotropic == point.rank / 24


def test_default_frame_of_eta_is_the_top_of_the_joint_covariance() -> None:
    y, x = paired_rows()
    joint = np.cov(y.T, bias=True) + np.cov(x.T, bias=True)
    basis = np.linalg.eigh(joint)[1][:, -6:]
    assert diagnostics.gap(y, x, rank=6).eta_u == pytest.approx(brute_force(y, x, 5, basis)["eta_u"], rel=1e-9)


def test_batches_do_not_change_the_result(tmp_path) -> None:
    y, x = paired_rows(n=9001, width=6)
    expected = brute_force(y, x, 2, np.eye(6)[:, :2])
    folder = tmp_path / "target"
    folder.mkdir()
    for index, part in enumerate(np.array_split(x, 4)):
        np.save(folder / f"part_{index}.npy", part)
    np.save(tmp_path / "source.npy", y)
    for source, target in ((y, x), (str(tmp_path / "source.npy"), open_embeddings(folder))):
        report = diagnostics.gap(source, target, q=2, basis=np.eye(6)[:, :2])
        for name, value in expected.items():
            assert getattr(report, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(np.float16),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(">f8"),
        lambda a: np.asfortranarray(a)[::-1][::-1],
        lambda a: torch.from_numpy(a).half(),
        lambda a: torch.from_numpy(a).bfloat16(),
        lambda a: torch.from_numpy(np.repeat(a, 2, axis=1))[:, ::2].requires_grad_(),
    ],
    ids=["fp16", "fp32", "big-endian", "fortran", "torch-fp16", "torch-bf16", "torch-strided-grad"],
)
def test_dtypes_and_layouts_are_measured_as_the_values_they_hold(convert) -> None:
    y, x = (convert(rows) for rows in paired_rows())
    held = [
        (rows.detach().double().numpy() if isinstance(rows, torch.Tensor) else rows.astype(float)) for rows in (y, x)
    ]
    basis = np.eye(24)[:, :3]
    report = diagnostics.gap(y, x, q=5, basis=torch.from_numpy(basis))
    for name, value in brute_force(held[0], held[1], 5, basis).items():
        assert getattr(report, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_isotropic_residual_follows_marchenko_pastur() -> None:
    """E tr S^2 = D (1 + D/n), and the largest eigenvalue sits at the edge (1 + sqrt(D/n))^2.

    The ratio (tr S)^2 / tr S^2 fluctuates by order 1/n. The edge is off by the Tracy-Widom law, of mean -1.2 and
    deviation 1.3 in units of (sqrt n + sqrt D)(1/sqrt n + 1/sqrt D)^(1/3) / n = .0038: 5 units cover three deviations.
    """
    n, width = 20_000, 64
    rng = np.random.default_rng(1)
    y = rng.normal(size=(n, width)) * 3
    report = diagnostics.gap(y, y + rng.normal(size=(n, width)))
    assert report.d_eff_ratio == pytest.approx(1 / (1 + width / n), abs=1e-3)
    assert report.d_eff_ratio_isotropic == 1 / (1 + width / n)
    assert report.a_r == pytest.approx((1 + math.sqrt(width / n)) ** 2, abs=5 * 0.0038)
    assert report.a_r_isotropic == pytest.approx((1 + math.sqrt(width / n)) ** 2)


def test_few_rows_read_half_the_dimension_and_say_so() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(200, 200))
    with pytest.warns(diagnostics.DiagnosticsWarning) as caught:
        report = diagnostics.gap(y, y + rng.normal(size=(200, 200)))
    assert report.d_eff_ratio == pytest.approx(0.5, abs=0.02)
    assert report.c_lambda_count == 199
    assert tuple(str(item.message) for item in caught) == report.warnings and len(report.warnings) == 2
    assert all(item.filename == __file__ for item in caught)


def test_unrelated_subspaces_overlap_by_q_over_width() -> None:
    """For Haar subspaces Var ||U^T V||^2 = 2 q^2 (D-q)^2 / (D^2 (D-1)(D+2)); 24 draws of exact sample covariances."""
    n, width, q, draws = 128, 64, 16, 24
    rng = np.random.default_rng(3)
    white = np.linalg.qr(np.c_[np.ones(n), rng.normal(size=(n, width))])[0][:, 1:] * math.sqrt(n)
    scale = np.geomspace(1, 0.1, width)

    def rotated() -> np.ndarray:
        return white * scale @ np.linalg.qr(rng.normal(size=(width, width)))[0]

    with pytest.warns(diagnostics.DiagnosticsWarning):
        reports = [diagnostics.gap(rotated(), rotated(), q=q) for _ in range(draws)]
    deviation = math.sqrt(2) * (width - q) / (width * math.sqrt((width - 1) * (width + 2)))
    assert np.mean([report.o_q for report in reports]) == pytest.approx(q / width, abs=4 * deviation / math.sqrt(draws))
    for report in reports:
        assert report.c_lambda == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(report.target_spectrum, scale**2, rtol=1e-9)


def test_a_pure_shift_has_no_residual() -> None:
    y, _ = paired_rows()
    report = diagnostics.gap(y, y + 0.25)
    assert report.g_mu == pytest.approx(0.25 * math.sqrt(24))
    assert report.o_q == pytest.approx(1) and report.g_sigma == pytest.approx(0, abs=1e-12)
    assert report.r_res == pytest.approx(0, abs=1e-20) and report.residual_norm == pytest.approx(0, abs=1e-12)
    exact = diagnostics.gap(y, y)
    assert math.isnan(exact.a_r) and math.isnan(exact.r_res) and math.isnan(exact.eta_u)
    assert json.loads(exact.to_json())["a_r"] is None
    assert "undefined" in str(exact)


def test_json_round_trip_and_text() -> None:
    report = diagnostics.gap(*paired_rows())
    parsed = json.loads(report.to_json())
    assert parsed == report.to_dict()
    assert parsed["energy"][0] == {"rank": 1, "energy": report.energy[0].energy, "isotropic": 1 / 24}
    text = str(report)
    assert f"{report.g_mu:.3f}" in text and "O_6" in text and "d_eff/D" in text
    with pytest.raises(AttributeError):
        report.g_mu = 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, x: (y[:-1], x), r"source has 399 rows but target has 400"),
        (lambda y, x: (y[:, :-1], x), r"source has width 23 but target has width 24"),
        (lambda y, x: (y[0], x), r"source must be \[N, D\], got shape \[24\]"),
        (lambda y, x: (y, (x * 100).astype(int)), r"target is int64"),
        (lambda y, x: (y, torch.ones(400, 24, dtype=torch.int32)), r"target is torch.int32"),
        (lambda y, x: (y, x.tolist()), r"target is a list"),
        (lambda y, x: (y[:2], x[:2]), r"2 pairs are too few: at least 3"),
        (lambda y, x: (y[:, :0], x[:, :0]), r"width 0"),
    ],
)
def test_unusable_input_is_named(change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        diagnostics.gap(*change(*paired_rows()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_non_finite_row_is_named(bad: float) -> None:
    y, x = paired_rows(n=9000, width=4)
    x[8500, 2] = bad
    with pytest.raises(InputError, match=r"target has non-finite .* first in row 8500"):
        diagnostics.gap(y, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 25}, "q must be between 1 and the width 24"),
        ({"q": 0}, "q must be between"),
        ({"rank": 30}, "rank must be between"),
        ({"energy_ranks": (1, 25)}, "energy_ranks must be between"),
        ({"basis": np.ones((24, 2))}, "not orthonormal"),
        ({"basis": np.eye(12)}, r"basis must be \[D, R\] with D = 24"),
    ],
)
def test_unusable_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        diagnostics.gap(*paired_rows(), **options)
