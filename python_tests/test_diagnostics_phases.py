"""Phases, projection and corrections against NumPy and closed forms."""

from __future__ import annotations

import doctest
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from aniso_ext import AnisoAlign, Frame, diagnostics
from aniso_ext.align import PriorOptions, RefinementOptions, TrainingOptions
from aniso_ext.errors import InputError
from aniso_ext.ops import correct


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_frame(width: int = 12, rank: int = 8, knots: int = 300, center: bool = False) -> Frame:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(width, rank)))[0]
    means = rng.normal(size=(2, width)) * 0.2
    tables = np.sort(rng.uniform(0.01, 1, size=(2, rank // 2, knots)), axis=2)
    arrays = (torch.from_numpy(np.ascontiguousarray(array)) for array in (*means, basis, *tables, np.ones(1)))
    return Frame(*arrays, center=center)


@pytest.fixture
def clouds() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    y, x = unit(rng.normal(size=(500, 12)) + 0.3), unit(rng.normal(size=(500, 12)) - 0.2)
    return y, x, {"first": unit(y + 0.1), "minimum": unit(rng.normal(size=y.shape))}


@pytest.mark.parametrize("center", [False, True])
def test_phases_equal_numpy(clouds: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]], center: bool) -> None:
    y, x, stand_ins = clouds
    frame = make_frame(center=center)
    report = diagnostics.phase_report(y, x, stand_ins, frame, blocks=3)
    m_s, m_t, basis = (getattr(frame, name).numpy() for name in ("source_mean", "target_mean", "basis"))
    shift = m_t if center else 0 * m_t
    rows = {"target": x - shift, "source": y - m_s + (0 if center else m_t)}
    rows |= {name: z - shift for name, z in stand_ins.items()}
    complex_rows = {name: (r @ basis)[:, 0::2] + 1j * (r @ basis)[:, 1::2] for name, r in rows.items()}
    energy = np.mean(np.abs(complex_rows["target"]) ** 2, axis=0)
    order = np.argsort(energy)[::-1]
    assert report.blocks == tuple(order[:3]) and report.coupled_blocks == tuple(order)
    np.testing.assert_allclose(report.energy, energy[order] / energy.sum(), rtol=1e-12)
    assert report.coupling_threshold == pytest.approx(math.sqrt(math.log(16 / 0.02) / 500))
    assert list(report.clouds) == ["target", "source", "first", "minimum"]
    for name, cloud in report.clouds.items():
        phases = complex_rows[name][:, order] / np.abs(complex_rows[name][:, order])
        np.testing.assert_allclose(cloud.concentration, np.abs(phases.mean(axis=0)), atol=1e-12)
        np.testing.assert_allclose(cloud.coupling, np.abs(phases.T @ phases.conj()) / 500, atol=1e-12)
        for place, shares in enumerate(cloud.histograms):
            angles = np.floor((np.angle(phases[:, place]) + np.pi) / (2 * np.pi) * 64).astype(int)
            np.testing.assert_allclose(shares, np.bincount(angles, minlength=64) / 500, rtol=1e-12)
    assert [item.block for item in report.radius_maps] == list(order[:3])
    for item in report.radius_maps:
        assert len(item.source) == 128 and len(item.target) == 128
        knots = frame.radius_source_knots[item.block].numpy(), frame.radius_target_knots[item.block].numpy()
        assert item.source[0] == knots[0][0] and item.target[-1] == knots[1][-1]
        assert set(zip(item.source, item.target, strict=True)) <= set(
            zip(*(array.tolist() for array in knots), strict=True)
        )


def test_the_closed_form_keeps_phases_and_moves_radii() -> None:
    """Before its calibration the closed form turns no phase: the stand-ins' are those of the recentred source."""
    rng = np.random.default_rng(2)
    y, x = unit(rng.normal(size=(600, 16)) + 0.4), unit(rng.normal(size=(600, 16)) * np.linspace(2, 0.5, 16))
    aligner = AnisoAlign(rank=8, refine=False, calibration=None, seed=1).fit(y, x)
    stand_ins = correct(torch.from_numpy(y), aligner.frame_)
    report = diagnostics.phase_report(y, x, {"closed form": stand_ins}, aligner.frame_)
    source, output = report.clouds["source"], report.clouds["closed form"]
    np.testing.assert_allclose(output.concentration, source.concentration, atol=1e-12)
    np.testing.assert_allclose(output.coupling, source.coupling, atol=1e-12)
    assert output.histograms == source.histograms


def test_known_phases() -> None:
    """Uniform phases have no concentration, equal ones all, and the second block turns with the first."""
    n = 640
    theta = -np.pi + 2 * np.pi * (np.arange(n) + 0.5) / n
    x = np.stack((np.cos(theta), np.sin(theta), 0.5 * np.cos(theta + 1), 0.5 * np.sin(theta + 1)), axis=1)
    knots = torch.linspace(0.1, 1.0, 8, dtype=torch.float64).repeat(2, 1)
    zeros = torch.zeros(4, dtype=torch.float64)
    frame = Frame(zeros, zeros, torch.eye(4, dtype=torch.float64), knots, knots, torch.ones(1, dtype=torch.float64))
    report = diagnostics.phase_report(np.ones((n, 4)), x, {}, frame)
    assert report.blocks == (0, 1) and report.energy == pytest.approx((0.8, 0.2))
    target, source = report.clouds["target"], report.clouds["source"]
    assert target.concentration == pytest.approx((0, 0), abs=1e-12)
    assert target.histograms[0] == (1 / 64,) * 64
    assert target.coupling[0][1] == pytest.approx(1)
    assert source.concentration == pytest.approx((1, 1)) and source.histograms[0][40] == 1  # 45 degrees
    with pytest.warns(diagnostics.DiagnosticsWarning, match="flat has 1280 phases in blocks that are zero"):
        diagnostics.phase_report(np.ones((n, 4)), x, {"flat": np.zeros((n, 4))}, frame)


def test_samples_are_of_the_same_pairs_and_follow_the_seed(
    clouds: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    y, x, stand_ins = clouds
    frame = make_frame()
    chosen = np.sort(np.random.default_rng(7).choice(500, size=100, replace=False))
    few = {name: rows[chosen] for name, rows in stand_ins.items()}
    np.save(tmp_path / "x.npy", x)
    report = diagnostics.phase_report(torch.from_numpy(y), tmp_path / "x.npy", stand_ins, frame, max_rows=100, seed=7)
    expected = diagnostics.phase_report(y[chosen], x[chosen], few, frame)
    assert report.clouds == expected.clouds and (report.n, report.n_available) == (100, 500)
    plane = diagnostics.projection(y, tmp_path / "x.npy", stand_ins, max_rows=100, seed=7)
    assert plane.coordinates == diagnostics.projection(y[chosen], x[chosen], few).coordinates
    json.loads(report.to_json()), json.loads(plane.to_json())


def test_projection_equals_numpy(clouds: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]) -> None:
    y, x, stand_ins = clouds
    report = diagnostics.projection(y, x, stand_ins)
    pooled = np.concatenate((x, y, *stand_ins.values()))
    centred = pooled - pooled.mean(axis=0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(report.explained, values[:2] ** 2 / (values**2).sum(), rtol=1e-10)
    signs = np.sign(vectors[[0, 1], np.abs(vectors[:2]).argmax(axis=1)])
    drawn = np.concatenate([np.array(points) for points in report.coordinates.values()])
    np.testing.assert_allclose(drawn, centred @ (vectors[:2] * signs[:, None]).T, atol=1e-10)
    assert list(report.coordinates) == ["target", "source", "first", "minimum"]


def test_corrections_equal_numpy(clouds: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]) -> None:
    y, _, stand_ins = clouds
    initial = {"first": unit(y + 0.05)}
    report = diagnostics.corrections(y, stand_ins, initial=initial, bounds={"first": 0.1})
    top = max(np.linalg.norm(z - y, axis=1).max() for z in stand_ins.values())
    np.testing.assert_allclose(report.length_edges, np.linspace(0, top, 97), rtol=1e-12)
    for name, z in stand_ins.items():
        lengths = np.linalg.norm(z - y, axis=1)
        angles = np.degrees(np.arccos((z * y).sum(axis=1)))
        for sizes, values, edges in (
            (report.lengths[name], lengths, report.length_edges),
            (report.angles[name], angles, report.angle_edges),
        ):
            np.testing.assert_allclose(sizes.shares, np.histogram(values, edges)[0] / 500, atol=0.0021)  # one row
            assert sum(sizes.shares) == pytest.approx(1)
            expected = values.mean(), np.median(values), np.quantile(values, 0.95), values.max()
            np.testing.assert_allclose((sizes.mean, sizes.median, sizes.p95, sizes.largest), expected, rtol=1e-6)
    moved = np.linalg.norm(stand_ins["first"] - initial["first"], axis=1)
    realised = report.realised["first"]
    assert realised.bound == 0.1 and realised.beyond == pytest.approx((moved > 0.1).mean()) and 0 < realised.beyond < 1
    assert realised.sizes.largest == pytest.approx(moved.max())
    assert diagnostics.corrections(y, stand_ins).realised_edges == ()


def test_small_and_undefined_angles() -> None:
    y = np.tile([[1.0, 0.0]], (4, 1))
    turned = np.tile([[math.cos(1e-7), math.sin(1e-7)]], (4, 1))
    report = diagnostics.corrections(y, {"turned": turned, "same": y})
    # an arc cosine of 1 - 5e-15 would have two digits left
    assert report.angles["turned"].mean == pytest.approx(math.degrees(1e-7), rel=1e-8)
    assert report.angles["same"].largest == 0 and report.lengths["same"].shares[0] == 1
    with pytest.warns(diagnostics.DiagnosticsWarning, match="4 pairs of source and 'none' have a zero row"):
        report = diagnostics.corrections(y, {"none": np.zeros((4, 2))})
    assert math.isnan(report.angles["none"].mean) and sum(report.angles["none"].shares) == 0
    assert "undefined" not in str(report) and json.loads(report.to_json())["angles"]["none"]["mean"] is None


def test_a_refined_aligner_stays_within_its_bound() -> None:
    rng = np.random.default_rng(4)
    y, x = unit(rng.normal(size=(400, 16)) + 0.3), unit(rng.normal(size=(400, 16)) * np.linspace(2, 0.5, 16))
    short = TrainingOptions(steps=30, batch_rows=64)
    aligner = AnisoAlign(
        rank=8, prior=PriorOptions(width=32, blocks=1), prior_training=short, calibration=None,
        refinement=RefinementOptions(hidden=32), refinement_training=short,
    ).fit(y, x)  # fmt: skip
    bound = aligner.summary_["eps_eff_largest"]
    report = diagnostics.corrections(
        y, {"anisoalign": aligner.transform(y)}, initial={"anisoalign": aligner.closed_form().transform(y)},
        bounds={"anisoalign": 2 * math.sin(math.asin(bound) / 2)},
    )  # fmt: skip
    realised = report.realised["anisoalign"]
    assert realised.beyond == 0 and 0 < realised.sizes.largest < bound


def test_wrong_inputs_are_named(clouds: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]) -> None:
    y, x, stand_ins = clouds
    frame = make_frame()
    with pytest.raises(InputError, match="rows have width 6 but the frame has width 12"):
        diagnostics.phase_report(y[:, :6], x[:, :6], {}, frame)
    with pytest.raises(InputError, match="source has 500 rows but stand-in 'first' has 499"):
        diagnostics.phase_report(y, x, {"first": y[1:]}, frame)
    with pytest.raises(InputError, match="stand-ins may not be called 'target'"):
        diagnostics.projection(y, x, {"target": y})
    with pytest.raises(InputError, match="blocks must be at least 1, got 0"):
        diagnostics.phase_report(y, x, {}, frame, blocks=0)
    with pytest.raises(InputError, match="max_rows must be at least 1, got 0"):
        diagnostics.projection(y, x, {}, max_rows=0)
    with pytest.raises(InputError, match="seed must not be negative, got -1"):
        diagnostics.projection(y, x, {}, seed=-1)
    with pytest.raises(InputError, match="width 2 or more, got 1"):
        diagnostics.projection(y[:, :1], x[:, :1], {})
    with pytest.raises(InputError, match="no stand-ins"):
        diagnostics.corrections(y, {})
    with pytest.raises(InputError, match=r"source is \[500, 12\] but stand-in 'short' is \[10, 12\]"):
        diagnostics.corrections(y, {"short": y[:10]})
    with pytest.raises(InputError, match="initial rows of 'other' have no stand-ins: there are first, minimum"):
        diagnostics.corrections(y, stand_ins, initial={"other": y})
    with pytest.raises(InputError, match="bound of 'first' needs its rows before the refinement"):
        diagnostics.corrections(y, stand_ins, bounds={"first": 0.1})
    with pytest.raises(InputError, match="bound of 'first' must be finite and not negative, got nan"):
        diagnostics.corrections(y, stand_ins, initial={"first": y}, bounds={"first": math.nan})
    broken = y.copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="stand-in 'first' has non-finite values"):
        diagnostics.phase_report(y, x, {"first": broken}, frame)


def test_reports_are_read_as_text(clouds: tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]) -> None:
    y, x, stand_ins = clouds
    text = str(diagnostics.phase_report(y, x, stand_ins, make_frame()))
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["target", "source", "first", "minimum"]
    assert "target, source, first, minimum" in str(diagnostics.projection(y, x, stand_ins))
    text = str(diagnostics.corrections(y, stand_ins, initial={"first": y}, bounds={"first": 1.0}))
    assert "bound 1.000, 0.0% beyond it" in text


@pytest.mark.parametrize("name", ["phases", "projection", "corrections"])
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"aniso_ext.diagnostics.{name}")).failed == 0
