"""The published held-out facts of real embeddings, computed independently of this package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import aniso_ext as aniso
from aniso_ext import diagnostics
from aniso_ext.diagnostics.alignment import measure
from aniso_ext.diagnostics.alignment_intervals import Settings

PRINTED = 0.0015


@pytest.fixture(scope="module")
def fashion(real_data: Path) -> dict[str, np.ndarray]:
    folder = real_data / "fashion44k"
    image, text = (np.load(folder / f"{side}.npy", mmap_mode="r", allow_pickle=False) for side in ("image", "text"))
    with open(folder / "captions.jsonl", encoding="utf-8") as lines:
        split = np.array([json.loads(line)["split"] for line in lines])
    held_out, train = np.flatnonzero(split == "test")[:4000], np.flatnonzero(split == "train")
    return {
        "image": image[held_out],
        "text": text[held_out],
        "image_train": image[train],
        "text_train": np.random.default_rng(0).permutation(text[train]),
        "image_mean": image[train].astype(np.float64).mean(axis=0),
        "text_mean": text[train].astype(np.float64).mean(axis=0),
    }


def test_gap(fashion: dict[str, np.ndarray]) -> None:
    report = diagnostics.gap(fashion["text"], fashion["image"])
    expected = {"g_mu": 0.272, "c_lambda": 0.947, "o_q": 0.386, "residual_norm": 0.717, "d_eff_ratio": 0.055}
    for name, value in expected.items():
        assert getattr(report, name) == pytest.approx(value, abs=PRINTED), name
    assert (report.q, report.n, report.warnings) == (128, 4000, ())
    assert report.a_r == pytest.approx(32.5, abs=0.1)


def check(report: diagnostics.AlignmentReport, expected: dict[str, float], tolerance: float) -> None:
    for name, value in expected.items():
        assert getattr(report, name) == pytest.approx(value, abs=tolerance), name


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_identity(fashion: dict[str, np.ndarray]) -> None:
    report = diagnostics.alignment(fashion["text"], fashion["image"], fashion["text"])
    near = {"delta_mu": 0.272, "m_z": 0.597, "m_x": 0.629, "paired_cosine": 0.696, "recall_at_1": 0.196}
    check(report, {**near, "recall_at_10": 0.633, "phi": 1, "psi": 1}, PRINTED)
    assert report.a_r == pytest.approx(70.6, abs=0.1)
    assert report.omega == 1
    assert report.a_r_centred == pytest.approx(32.5, abs=0.1)


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_mean_shift(fashion: dict[str, np.ndarray]) -> None:
    """A quarter of the captions are copies, so omega depends on how ties fall: hence its wider tolerance."""
    z = fashion["text"].astype(np.float64) - fashion["text_mean"] + fashion["image_mean"]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    report = diagnostics.alignment(fashion["text"], fashion["image"], z)
    near = {"delta_mu": 0.018, "phi": 0.965, "psi": 0.992, "m_z": 0.738, "m_x": 0.823, "paired_cosine": 0.737}
    check(report, {**near, "recall_at_1": 0.196, "recall_at_10": 0.634}, PRINTED)
    check(report, {"omega": 0.964}, 0.01)
    assert report.a_r == pytest.approx(32.5, abs=0.1)
    assert report.omega_tied > 0.2


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_realign(fashion: dict[str, np.ndarray]) -> None:
    aligner = aniso.make_aligner("realign").fit(fashion["text_train"], fashion["image_train"])
    report = diagnostics.alignment(fashion["text"], fashion["image"], aligner.transform(fashion["text"]))
    near = {"delta_mu": 0.016, "phi": 0.964, "psi": 0.991, "m_z": 0.738, "m_x": 0.826, "paired_cosine": 0.738}
    check(report, {**near, "recall_at_1": 0.196, "recall_at_10": 0.633}, PRINTED)
    check(report, {"omega": 0.964}, 0.01)
    assert report.a_r == pytest.approx(32.5, abs=0.1)


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_half_precision_candidates_find_the_same(fashion: dict[str, np.ndarray]) -> None:
    """A quarter of the captions are copies: lists overflow, and what they cannot decide is settled on all scores.

    Intervals of omega depend on how often the neighbour k + 1 is shared, and which of equal ones that is, is left open.
    """
    text = torch.from_numpy(fashion["text"]).double()
    image = torch.from_numpy(fashion["image"]).double()
    shifted = text - torch.from_numpy(fashion["text_mean"]) + torch.from_numpy(fashion["image_mean"])
    rows = text[:2500], image[:2500], shifted[:2500]
    single, half = (measure(*rows, Settings(psi_pairs=None, bootstrap=40, half=half)) for half in (False, True))
    assert replace(half, intervals={}) == replace(single, intervals={})
    for name, bounds in single.intervals.items():
        assert half.intervals[name] == pytest.approx(bounds, abs=1e-3), name
