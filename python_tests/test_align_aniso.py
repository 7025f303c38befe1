"""AnisoAlign: each fitted constant against its definition in NumPy, and transform against the seven saved arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.numpy import load_file

import aniso_ext as aniso
from aniso_ext.align.fitting import limit_slope
from aniso_ext.align.mixing import mixing_matrix
from aniso_ext.errors import InputError

WIDTH = 40


def unit_rows(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spectrum = np.geomspace(1, 0.02, WIDTH)
    rows = (rng.standard_normal((count, WIDTH)) * spectrum) @ np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return oracle.unit(rows + 1.2 * rng.standard_normal(WIDTH) / WIDTH**0.5)


SOURCE, TARGET = unit_rows(3000, 1), unit_rows(2500, 2)


def fit(**options: object) -> aniso.AnisoAlign:
    return aniso.AnisoAlign(**{"rank": 12, "refine": False, "knots": 128, **options}).fit(SOURCE, TARGET)


def saved_arrays(aligner: aniso.AnisoAlign, folder: Path) -> dict[str, np.ndarray]:
    return load_file(aligner.save_pretrained(folder) / "model.safetensors")


def worst_angle(result: np.ndarray, expected: np.ndarray) -> float:
    """Largest 1 - cos between rows, from the difference of unit rows so that it does not cancel."""
    gap = oracle.unit(np.asarray(result, dtype=np.float64)) - oracle.unit(expected)
    return float((gap**2).sum(axis=1).max() / 2)


# Recomputation from the artefact


@pytest.mark.parametrize("complement", ["scalar", "diagonal", "diagonal_projected"])
@pytest.mark.parametrize("calibration", ["fitted", None])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_transform_is_recomputed_from_the_saved_arrays(
    complement: str, calibration: str | None, center: bool, backend: str, tmp_path: Path
) -> None:
    aligner = fit(complement=complement, calibration=calibration, center=center, backend=backend)
    arrays = saved_arrays(aligner, tmp_path)
    assert all(value.dtype == np.float64 for value in arrays.values())
    rows = unit_rows(700, 3)
    expected = oracle.correct(rows, arrays, complement, center)
    assert np.abs(aligner.transform(rows) - expected).max() <= 1e-9
    single = rows.astype(np.float32)
    assert worst_angle(aligner.transform(single), oracle.correct(single, arrays, complement, center)) <= 1e-10
    assert aniso.load_aligner(tmp_path).frame_.fingerprint() == aligner.frame_.fingerprint()


@pytest.mark.parametrize("mixing", ["balanced", "haar"])
def test_transform_is_recomputed_on_real_embeddings(mixing: str, real_data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = np.load(real_data / "fashion44k" / "image.npy", mmap_mode="r", allow_pickle=False)
    text = np.load(real_data / "fashion44k" / "text.npy", mmap_mode="r", allow_pickle=False)
    chosen = np.sort(rng.choice(len(image), 6600, replace=False))
    target, source = image[chosen[:6000]], rng.permutation(text[chosen[:6000]])
    aligner = aniso.AnisoAlign(rank=128, refine=False, mixing=mixing).fit(source, target)
    arrays = saved_arrays(aligner, tmp_path)
    rows = text[chosen[6000:]].astype(np.float64)
    expected = oracle.correct(rows, arrays, "scalar")
    assert np.abs(aligner.transform(rows) - expected).max() <= 1e-9
    # float16 rows are exact in float32
    assert worst_angle(aligner.transform(rows.astype(np.float32)), expected) <= 1e-10
    # steep pieces of fitted radius maps must not enlarge the rounding of half-precision coordinates
    half = torch.from_numpy(rows).bfloat16()
    stand_ins = aligner.transform(half)
    assert stand_ins.dtype == torch.bfloat16
    exact = oracle.correct(half.double().numpy(), arrays, "scalar")
    assert worst_angle(stand_ins.double().numpy(), exact) <= 2e-5
    # and what comes out is what the method is for: the mean of held-out stand-ins is near the target's
    before = np.linalg.norm(rows.mean(0) - aligner.frame_.target_mean.numpy())
    after = np.linalg.norm(expected.mean(0) - aligner.frame_.target_mean.numpy())
    assert after < 0.25 * before


def test_the_artefact_holds_the_seven_arrays_and_says_what_they_are(tmp_path: Path) -> None:
    arrays = saved_arrays(fit(), tmp_path)
    assert {name: value.shape for name, value in arrays.items()} == {
        "source_mean": (WIDTH,),
        "target_mean": (WIDTH,),
        "basis": (WIDTH, 12),
        "radius_source_knots": (6, 128),
        "radius_target_knots": (6, 128),
        "complement_scale": (1,),
        "output_mean": (WIDTH,),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["method"], config["width"], config["format_version"]) == ("anisoalign", WIDTH, 2)
    assert config["options"]["rank"] == 12
    assert config["corpora"]["source"]["rows"] == 3000
    assert config["encoder"] is None
    assert "backend" not in config["options"]
    fit().save_pretrained(tmp_path, encoder="ViT-B-32")
    assert json.loads((tmp_path / "config.json").read_text())["encoder"] == "ViT-B-32"


# The fitted constants


@pytest.mark.parametrize("mixing", ["balanced", "haar", "pca_adjacent"])
def test_basis_spans_the_top_eigenvectors_of_the_joint_covariance(mixing: str) -> None:
    joint = np.cov(SOURCE.T, bias=True) + np.cov(TARGET.T, bias=True)
    values, vectors = np.linalg.eigh(joint)
    top = vectors[:, ::-1][:, :12]
    aligner = fit(mixing=mixing)
    basis = aligner.frame_.basis.numpy()
    assert np.abs(basis.T @ basis - np.eye(12)).max() <= 1e-13
    # Projector error is of order eps |S| / gap between the eigenvalues 12 and 13.
    gap = values[::-1][11] - values[::-1][12]
    assert np.abs(basis @ basis.T - top @ top.T).max() <= 100 * 2.0**-52 * values[-1] / gap
    assert aligner.summary_["coverage"] == pytest.approx(values[::-1][:12].sum() / values.sum(), rel=1e-12)
    covered = np.trace(basis.T @ np.cov(SOURCE.T, bias=True) @ basis) / np.trace(np.cov(SOURCE.T, bias=True))
    assert aligner.summary_["coverage_source"] == pytest.approx(covered, rel=1e-12)
    assert aligner.summary_["ridge"] == pytest.approx(1e-4 * values.sum() / WIDTH, rel=1e-12)


def test_adjacent_columns_are_the_eigenvectors_in_order() -> None:
    basis = fit(mixing="pca_adjacent").frame_.basis.numpy()
    joint = np.cov(SOURCE.T, bias=True) + np.cov(TARGET.T, bias=True)
    energies = np.diag(basis.T @ joint @ basis)
    assert np.all(np.diff(energies) < 0)
    assert np.abs(basis.T @ joint @ basis - np.diag(energies)).max() <= 1e-14
    assert np.all(basis[np.abs(basis).argmax(0), np.arange(12)] > 0)


def test_balanced_pairs_strong_with_weak() -> None:
    adjacent, balanced = (fit(mixing=mixing).frame_.basis.numpy() for mixing in ("pca_adjacent", "balanced"))
    assert np.array_equal(balanced, adjacent[:, [0, 11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6]])


def test_haar_mixing_is_orthogonal_uniform_and_seeded() -> None:
    energies = torch.arange(16.0).flip(0)
    draws = torch.stack([mixing_matrix("haar", energies, seed) for seed in range(400)])
    identity = torch.eye(16, dtype=torch.float64)
    assert float((draws.mT @ draws - identity).abs().max()) <= 1e-14
    assert torch.equal(mixing_matrix("haar", energies, 3), draws[3])
    # Uniform: entries have mean 0 and variance 1/16. Without the sign fix the diagonal of QR's Q would be one-sided.
    deviation = (1 / 16 / 400) ** 0.5
    assert float(draws.mean(dim=0).abs().max()) <= 5 * deviation
    assert abs(float((draws**2).mean(dim=0).diagonal().mean()) - 1 / 16) <= 5 * (2 / 16**2 / 400 / 16) ** 0.5


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_rank_as_an_energy_share_is_the_smallest_even_one(share: float) -> None:
    values = np.linalg.eigvalsh(np.cov(SOURCE.T, bias=True) + np.cov(TARGET.T, bias=True))[::-1]
    aligner = fit(rank=share)
    rank = aligner.frame_.rank
    assert rank % 2 == 0
    assert aligner.summary_["coverage"] >= share - 1e-12
    assert values[: rank - 2].sum() / values.sum() < share


def test_knots_are_radius_quantiles_of_target_and_recentred_source() -> None:
    frame = fit().frame_
    basis = frame.basis.numpy()
    recentred = SOURCE - SOURCE.mean(0) + TARGET.mean(0)
    levels = np.sin(np.pi * np.arange(128) / (2 * 127)) ** 2
    for knots, rows in ((frame.radius_source_knots, recentred), (frame.radius_target_knots, TARGET)):
        coordinates = rows @ basis
        radii = np.hypot(coordinates[:, 0::2], coordinates[:, 1::2])
        expected = np.quantile(radii, levels, axis=0).T
        # the sketch's stated relative error
        assert np.abs(knots.numpy() / expected - 1).max() <= 2.0**-11 + 2.0**-23 + 1e-9


def test_radius_maps_jump_nowhere() -> None:
    # Half of the source rows are copies of one row: F_source has an atom, and T would jump across half of the target.
    source = np.concatenate([SOURCE[:1000], np.repeat(SOURCE[:1], 1000, axis=0)])
    aligner = aniso.AnisoAlign(rank=12, refine=False).fit(source, TARGET)
    frame, literal = aligner.frame_, aniso.AnisoAlign(rank=12, refine=False, literal=True).fit(source, TARGET).frame_
    s, t = frame.radius_source_knots.numpy(), frame.radius_target_knots.numpy()
    jumping = literal.radius_target_knots.numpy()
    assert np.array_equal(s, literal.radius_source_knots.numpy())
    ratio = np.maximum(np.ptp(jumping, axis=1) / np.ptp(s, axis=1), jumping.mean(1) / s.mean(1))
    assert (np.diff(jumping) / np.diff(s) / ratio[:, None]).max() > 1e4
    assert (np.diff(t) / np.diff(s) / ratio[:, None]).max() <= 16 * (1 + 1e-6)
    assert (t[:, 0] / s[:, 0] / ratio).max() <= 16 * (1 + 1e-9)
    assert np.all(np.diff(t) >= 0)
    # The copies land in the middle of the jump, and the map is what it was where it was not steep.
    radius = np.hypot(*((source[1500] - source.mean(0) + TARGET.mean(0)) @ frame.basis.numpy()).reshape(6, 2).T)
    for block in range(6):
        at_atom = np.abs(s[block] / radius[block] - 1) < 1e-3
        middle = (jumping[block, at_atom].min() + jumping[block, at_atom].max()) / 2
        assert np.interp(radius[block], s[block], t[block]) == pytest.approx(middle, rel=0.05)
    assert (t == jumping).mean() > 0.3
    assert worst_angle(aligner.transform(source.astype(np.float32)), aligner.transform(source)) <= 1e-10


def test_gentle_radius_maps_are_left_alone() -> None:
    source_knots = torch.linspace(0.1, 1.0, 50, dtype=torch.float64).repeat(3, 1)
    target_knots = source_knots**2
    assert torch.equal(limit_slope(source_knots, target_knots, 16.0), target_knots)


def test_complement_scales_follow_their_definitions() -> None:
    frame = fit().frame_
    outside = np.eye(WIDTH) - frame.basis.numpy() @ frame.basis.numpy().T
    source, target = ((rows - rows.mean(0)) @ outside for rows in (SOURCE, TARGET))
    scalar = np.sqrt((target**2).sum() / len(TARGET) / ((source**2).sum() / len(SOURCE)))
    assert float(frame.complement_scale) == pytest.approx(scalar, rel=1e-10)
    diagonal = target.std(0) / source.std(0)
    assert np.abs(fit(complement="diagonal").frame_.complement_scale.numpy() / diagonal - 1).max() <= 1e-9
    clamped = fit(complement="diagonal_projected").frame_.complement_scale.numpy()
    assert np.abs(clamped - diagonal.clip(0.25, 4)).max() <= 1e-9


def test_projected_ratios_are_clamped() -> None:
    rng = np.random.default_rng(4)
    source = oracle.unit(rng.standard_normal((2000, 6)) * [1, 0.8, 0.01, 0.2, 0.1, 0.1])
    target = oracle.unit(rng.standard_normal((2000, 6)) * [1, 0.8, 0.1, 0.01, 0.1, 0.2])
    frame = aniso.AnisoAlign(rank=2, refine=False, complement="diagonal_projected").fit(source, target).frame_
    outside = np.eye(6) - frame.basis.numpy() @ frame.basis.numpy().T
    ratio = ((target - target.mean(0)) @ outside).std(0) / ((source - source.mean(0)) @ outside).std(0)
    assert (ratio.max() > 8, ratio.min() < 0.125) == (True, True)
    assert np.abs(frame.complement_scale.numpy() - ratio.clip(0.25, 4)).max() <= 1e-9


def test_full_rank_leaves_an_empty_complement() -> None:
    aligner = fit(rank=WIDTH)
    assert float(aligner.frame_.complement_scale) == 1
    assert np.isfinite(aligner.transform(SOURCE)).all()
    assert aligner.summary_["coverage"] == pytest.approx(1, abs=1e-12)


# Calibration


def test_output_mean_is_the_mean_before_calibration() -> None:
    aligner = fit()
    bare = aligner.transform(SOURCE, calibration=None)
    assert np.abs(aligner.frame_.output_mean.numpy() - bare.mean(0)).max() <= 1e-13
    target_mean = TARGET.mean(0)
    assert np.abs(aligner.transform(SOURCE) - oracle.unit(bare - bare.mean(0) + target_mean)).max() <= 1e-13
    record = aligner.summary_
    assert record["calibration_error_before"] == pytest.approx(np.linalg.norm(bare.mean(0) - target_mean), abs=1e-12)
    after = np.linalg.norm(aligner.transform(SOURCE).mean(0) - target_mean)
    assert record["calibration_error_after"] == pytest.approx(after, abs=1e-12)


def test_fixed_point_steps_contract_the_error() -> None:
    errors = [fit(calibration_steps=steps).summary_["calibration_error_after"] for steps in (0, 1, 3)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.1 * errors[1]
    aligner = fit(calibration_steps=3)
    assert np.linalg.norm(aligner.transform(SOURCE).mean(0) - TARGET.mean(0)) == pytest.approx(errors[2], abs=1e-12)


def test_corpus_calibration_keeps_no_mean() -> None:
    aligner = fit(calibration="corpus")
    assert aligner.frame_.output_mean is None
    corpus = unit_rows(500, 9)
    bare = aligner.transform(corpus, calibration=None)
    assert np.abs(aligner.transform(corpus) - oracle.unit(bare - bare.mean(0) + TARGET.mean(0))).max() <= 1e-13
    with pytest.raises(InputError, match="holds no output_mean: transform with calibration='corpus'"):
        aligner.transform(corpus, calibration="fitted")
    # A recalibrated copy must not calibrate again, batch by batch.
    twin = aligner.calibrate_on(corpus)
    assert twin.get_params()["calibration"] == "fitted"
    pieces = np.concatenate([twin.transform(corpus[:1]), twin.transform(corpus[1:])])
    assert np.abs(pieces - aligner.transform(corpus)).max() <= 1e-13


def test_literal_is_the_printed_form() -> None:
    literal = fit(literal=True, calibration_steps=3)
    spelled_out = fit(complement="diagonal", calibration="corpus", slope_limit=None)
    assert literal.frame_.complement == "diagonal"
    assert literal.frame_.fingerprint() == spelled_out.frame_.fingerprint()
    assert np.array_equal(literal.transform(SOURCE), spelled_out.transform(SOURCE))
    twin = literal.calibrate_on(SOURCE)
    assert np.abs(twin.transform(SOURCE[:5]) - literal.transform(SOURCE)[:5]).max() <= 1e-13


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 1}, "refine must be True or False, got 1"),
        ({"refinement": {"a_theta": 0.2}}, "refinement must be a RefinementOptions or None, got"),
        ({"prior_training": 100}, "prior_training must be a TrainingOptions or None, got 100"),
        ({"mixing": "random"}, "mixing must be one of haar, balanced, pca_adjacent, phase_stable, got 'random'"),
        ({"center": 1}, "center must be True or False, got 1"),
        ({"slope_limit": 0.5}, "slope_limit must be at least 1, or None for no limit, got 0.5"),
        ({"rank": 7}, "rank must be an even integer of at least 2 or an energy share like 0.9, got 7"),
        ({"rank": 0}, "rank must be an even integer"),
        ({"rank": True}, "rank must be an even integer"),
        ({"rank": 1.5}, "rank as an energy share must be above 0 and at most 1, got 1.5"),
        ({"rank": 42}, "rank 42 is above the width 40 of the embeddings: choose at most 40"),
        ({"complement": "full"}, "complement must be one of scalar, diagonal, diagonal_projected, got 'full'"),
        ({"calibration": "auto"}, "calibration must be 'fitted', 'corpus' or None, got 'auto'"),
        ({"calibration_steps": -1}, "calibration_steps must be an integer from 0 to 100, got -1"),
        ({"knots": 1}, "knots must be an integer from 2 to 32767, got 1"),
        ({"seed": 0.5}, "seed must be an integer from 0"),
        ({"literal": "yes"}, "literal must be True or False, got 'yes'"),
    ],
)
def test_impossible_options_are_refused_at_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(**options)


def test_a_rank_that_the_rows_do_not_span_is_refused() -> None:
    with pytest.raises(InputError, match="6 source and 5 target rows vary in at most 9 directions, the rank is 12"):
        aniso.AnisoAlign(rank=12, refine=False).fit(SOURCE[:6], TARGET[:5])


def test_rows_that_do_not_vary_have_no_subspace() -> None:
    constant = np.repeat(SOURCE[:1], 10, axis=0)
    with pytest.raises(InputError, match="all rows of each side are equal"):
        aniso.AnisoAlign(rank=4, refine=False).fit(constant, constant)
