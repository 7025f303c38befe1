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
from aniso_ext.diagnostics.mixing import binary_entropy
from aniso_ext.diagnostics.neighbours import TIE, unit_rows
from aniso_ext.diagnostics.rows import open_rows
from aniso_ext.diagnostics.sampled import choose_queries, sampled_neighbours
from aniso_ext.diagnostics.searches import nearest, search_union
from aniso_ext.diagnostics.streams import Stream

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


Published = dict[str, float]
HAAR: Published = {"delta_mu": 0.016, "phi": 0.962, "psi": 0.991, "omega": 0.960, "m_z": 0.747, "m_x": 0.817}
HAAR |= {"paired_cosine": 0.735, "recall_at_1": 0.199, "recall_at_10": 0.635}
ADJACENT: Published = {"delta_mu": 0.017, "phi": 0.954, "psi": 0.990, "omega": 0.944, "m_z": 0.690, "m_x": 0.729}
ADJACENT |= {"paired_cosine": 0.717, "recall_at_1": 0.198, "recall_at_10": 0.637}


def initialised(fashion: dict[str, np.ndarray], mixing: str, seed: int = 0, **options: str) -> np.ndarray:
    """Held-out stand-ins of the closed-form initialisation."""
    aligner = aniso.AnisoAlign(rank=128, refine=False, mixing=mixing, seed=seed, **options)
    return aligner.fit(fashion["text_train"], fashion["image_train"]).transform(fashion["text"])


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_initialisation_in_adjacent_pairs_of_principal_axes(fashion: dict[str, np.ndarray]) -> None:
    report = diagnostics.alignment(fashion["text"], fashion["image"], initialised(fashion, "pca_adjacent"))
    check(report, {name: value for name, value in ADJACENT.items() if name != "omega"}, PRINTED)
    check(report, {"omega": ADJACENT["omega"]}, 0.01)
    assert report.a_r == pytest.approx(29.4, abs=0.1)


def by_row(fashion: dict[str, np.ndarray], z: np.ndarray) -> dict[str, np.ndarray]:
    """What each row adds to the numbers that are means over rows."""
    y, x, outputs = (torch.from_numpy(np.asarray(side, np.float64)) for side in (fashion["text"], fashion["image"], z))
    around = search_union(x, outputs, 20, (unit_rows(x) * unit_rows(outputs)).sum(dim=1))
    expectation = diagnostics.mixing_expectation(len(y), 20)
    return {
        "m_z": (binary_entropy(around.around_outputs.share) / expectation).numpy(),
        "m_x": (binary_entropy(around.around_targets.share) / expectation).numpy(),
        "recall_at_1": around.retrieval.recalls(1).numpy(),
        "recall_at_10": around.retrieval.recalls(10).numpy(),
    }


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_initialisation_with_a_random_mixing(fashion: dict[str, np.ndarray]) -> None:
    """The published rotation is another draw. What neighbourhoods read then moves by chance, row by row: by four
    standard errors of the difference between two draws of ours at most; and A_r by 1 %."""
    drawn = [initialised(fashion, "haar", seed) for seed in (0, 1)]
    first, second = (by_row(fashion, z) for z in drawn)
    diagonal = initialised(fashion, "haar", complement="diagonal")
    for z in (*drawn, diagonal):
        report = diagnostics.alignment(fashion["text"], fashion["image"], z, exact_psi=True)
        check(report, {name: HAAR[name] for name in ("delta_mu", "phi", "psi", "paired_cosine")}, PRINTED)
        check(report, {"omega": HAAR["omega"]}, 0.01)
        assert report.a_r == pytest.approx(32.0, rel=0.01)
        for name, values in first.items():
            error = float((values - second[name]).std()) / len(values) ** 0.5
            assert error < 0.003, "two draws differ in few rows, so that this can fail"
            assert getattr(report, name) == pytest.approx(HAAR[name], abs=4 * error + PRINTED / 3), name


def listed_recall(listed: np.ndarray, cosines: np.ndarray, k: int) -> float:
    """Share of the listed [n, k] columns that are among the k best of all cosines; within a tie any order is right."""
    least = np.sort(cosines, axis=1)[:, -k, None] - TIE
    return float((np.take_along_axis(cosines, listed, axis=1) >= least).mean())


@pytest.mark.parametrize("side", ["text", "image"])
def test_recall_of_neighbours_is_one(fashion: dict[str, np.ndarray], side: str) -> None:
    """Against float64 products with every row; float16 alone, which proposes on GPUs, would miss some of them."""
    k, rows = 20, torch.from_numpy(fashion[side].astype(np.float64))
    units = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    for half in (False, True):
        assert listed_recall(nearest(rows, k, half=half).indices.numpy(), cosines, k) == 1
    chosen = choose_queries(4000, 500, 0)
    stream = Stream(open_rows(side, fashion[side]), None, torch.device("cpu"))
    for half in (False, True):
        found, _ = sampled_neighbours(stream, stream, stream, chosen, k, torch.ones(500).double(), half=half)
        assert listed_recall(found.indices.numpy(), cosines[chosen.numpy()], k) == 1
    rough = cosines.astype(np.float16)
    assert 0.9 < listed_recall(np.argsort(-rough, axis=1, kind="stable")[:, :k], cosines, k) < 1


@pytest.mark.filterwarnings("ignore::aniso_ext.diagnostics.DiagnosticsWarning")
def test_sampled_queries_read_what_all_read(fashion: dict[str, np.ndarray]) -> None:
    """A quarter of the captions are copies; of 1 000 of the 4 000 queries every number is within four errors."""
    z = fashion["text"].astype(np.float64) - fashion["text_mean"] + fashion["image_mean"]
    sides = fashion["text"], fashion["image"], z
    full = diagnostics.alignment(*sides, n_random_pairs=100)
    part = diagnostics.alignment(*sides, n_random_pairs=100, max_queries=1000, bootstrap=40)
    assert set(part.query_errors) == {"omega", "omega_tied", "m_z", "m_x", "recall_at_1", "recall_at_10"}
    for name, error in part.query_errors.items():
        assert 0 < error < 0.02 and abs(getattr(part, name) - getattr(full, name)) < 4 * error, name


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
