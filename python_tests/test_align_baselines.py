"""Each baseline of METHOD section 5 against its formula, written out in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import aniso_ext as aniso
from aniso_ext.errors import InputError

WIDTH = 12


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH))
    return unit(mixed + 2 * rng.standard_normal(WIDTH))


SOURCE, TARGET = draw(500, 3), draw(410, 4)
M_S, M_T = SOURCE.mean(0), TARGET.mean(0)
S_S, S_T = np.cov(SOURCE.T, bias=True), np.cov(TARGET.T, bias=True)


def fitted(method: str, **options: object) -> aniso.align.Aligner:
    return aniso.make_aligner(method, **options).fit(SOURCE, TARGET)


def test_identity_is_bit_exact() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        rows = SOURCE.astype(dtype)
        assert np.array_equal(fitted("identity").transform(rows), rows)


def test_mean_shift() -> None:
    assert np.abs(fitted("mean_shift").transform(SOURCE) - unit(SOURCE - M_S + M_T)).max() <= 1e-14


def test_c3_without_noise_is_its_centring() -> None:
    paper, code = fitted("c3_paper", noise_std=0.0), fitted("c3_code", noise_std=0.0)
    assert np.abs(paper.transform(SOURCE) - unit(SOURCE - M_S + M_T)).max() <= 1e-14
    assert np.abs(code.transform(SOURCE) - unit(SOURCE - M_S)).max() <= 1e-14


def test_c3_noise_is_white_with_the_given_deviation() -> None:
    # Undo the normalisation: along the row (z . a)(a . n) is lost, so compare z with its noiseless direction instead.
    # For small s the part of z orthogonal to the direction u of a = y - m_s + m_t is s n_perp / |a| + O(s^2).
    std = 1e-5
    clean = SOURCE - M_S + M_T
    length = np.linalg.norm(clean, axis=1, keepdims=True)
    z = fitted("c3_paper", noise_std=std).transform(SOURCE)
    direction = clean / length
    noise = (z - (z * direction).sum(1, keepdims=True) * direction) * length / std
    samples = noise.size * (WIDTH - 1) / WIDTH
    variance = (noise**2).sum() / samples
    assert abs(variance - 1) <= 5 * (2 / samples) ** 0.5
    assert abs(noise.sum() / samples) <= 5 / samples**0.5
    # Rows are independent of each other: neighbours' correlation is of order 1/sqrt(samples).
    assert abs((noise[1:] * noise[:-1]).sum() / samples) <= 5 / samples**0.5


def test_equal_rows_get_equal_noise_in_any_dtype() -> None:
    rows = SOURCE[:4].astype(np.float16)
    single, double = (fitted("c3_paper").transform(rows.astype(dtype)) for dtype in (np.float32, np.float64))
    assert np.abs(single - double).max() <= 8 * 2.0**-24
    again = fitted("c3_paper").transform(np.concatenate([SOURCE[9:10], SOURCE[:5], SOURCE[9:10]]))
    assert np.array_equal(again[0], again[-1])


def test_unicorn_leaves_the_sphere() -> None:
    assert np.abs(fitted("unicorn").transform(SOURCE) - (SOURCE - M_S)).max() <= 1e-15
    corpus = SOURCE[:100]
    centred = fitted("unicorn").transform(corpus, calibration="corpus")
    assert np.abs(centred - (corpus - corpus.mean(0))).max() <= 1e-15


def test_realign_step_by_step() -> None:
    anchored = SOURCE - M_S
    scaled = M_T + np.sqrt(np.trace(S_T) / np.trace(S_S)) * anchored
    normalised = unit(scaled)
    centroid = unit(normalised - normalised.mean(0) + M_T)
    aligner = fitted("realign")
    assert np.abs(aligner.transform(SOURCE) - centroid).max() <= 1e-14
    assert np.abs(aligner.transform(SOURCE, calibration=None) - normalised).max() <= 1e-14
    assert aligner.summary_["trace_scale"] == pytest.approx(np.sqrt(np.trace(S_T) / np.trace(S_S)), rel=1e-12)


def test_gaussian_monge_pushes_the_covariance_exactly() -> None:
    aligner = fitted("gaussian_monge", normalize=False)
    transport = aligner.transport_.numpy()
    # T comes from two square roots and two inverse roots: error of order cond(S_s) * eps.
    tolerance = 100 * np.linalg.cond(S_S) * 2.0**-52
    assert np.abs(transport @ S_S @ transport - S_T).max() <= tolerance * np.abs(S_T).max()
    assert np.abs(transport - transport.T).max() == 0
    assert np.linalg.eigvalsh(transport).min() > 0
    moved = aligner.transform(SOURCE)
    assert np.abs(moved.mean(0) - M_T).max() <= 1e-13
    assert np.abs(np.cov(moved.T, bias=True) - S_T).max() <= tolerance * np.abs(S_T).max()
    assert np.abs(fitted("gaussian_monge").transform(SOURCE) - unit(moved)).max() <= 1e-14


def test_gaussian_monge_with_a_flat_source_direction() -> None:
    direction = np.eye(WIDTH)[3]
    flat = SOURCE - np.outer(SOURCE @ direction, direction)
    with pytest.warns(UserWarning, match="not unit vectors"):
        aligner = aniso.make_aligner("gaussian_monge", normalize=False).fit(flat, TARGET)
    assert aligner.summary_["source_rank"] == WIDTH - 1
    transport = aligner.transport_.numpy()
    assert np.abs(transport @ direction).max() <= 1e-12
    # Within the directions that vary it is the transport between the covariances restricted to them.
    kept = np.delete(np.arange(WIDTH), 3)
    inner = transport[np.ix_(kept, kept)]
    source_inner, target_inner = np.cov(flat.T, bias=True)[np.ix_(kept, kept)], S_T[np.ix_(kept, kept)]
    assert np.abs(inner @ source_inner @ inner - target_inner).max() <= 1e-10


def test_per_dimension_std_matches_every_column() -> None:
    moved = fitted("per_dim_std", normalize=False).transform(SOURCE)
    assert np.abs(moved.mean(0) - M_T).max() <= 1e-14
    assert np.abs(moved.std(0) - TARGET.std(0)).max() <= 1e-13
    assert np.abs(fitted("per_dim_std").transform(SOURCE) - unit(moved)).max() <= 1e-14
    constant = SOURCE.copy()
    constant[:, 0] = 0
    with pytest.warns(UserWarning, match="not unit vectors"):
        assert float(aniso.make_aligner("per_dim_std").fit(constant, TARGET).scale_[0]) == 1


def test_permuted_gives_kept_target_rows_evenly() -> None:
    aligner = fitted("permuted", kept_rows=20)
    kept = aligner.target_rows_.numpy()
    assert all((TARGET.astype(np.float32) == row).all(1).any() for row in kept)
    assert len(np.unique(kept, axis=0)) == 20
    rows = draw(8000, 7)
    drawn = aligner.transform(rows.astype(np.float32))
    counts = np.array([(drawn == row).all(1).sum() for row in kept])
    assert counts.sum() == len(rows)
    # 20 cells of a multinomial with mean 400: chi-square has 19 degrees of freedom, deviation sqrt(38).
    assert ((counts - 400) ** 2 / 400).sum() <= 19 + 6 * 38**0.5
    assert aniso.make_aligner("permuted").fit(SOURCE, TARGET).target_rows_.shape == (410, WIDTH)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("c3_paper", {"noise_std": -0.1}, "noise_std must be finite and not negative, got -0.1"),
        ("c3_code", {"noise_std": float("nan")}, "noise_std must be finite"),
        ("c3_code", {"noise_std": "0.1"}, "noise_std must be a number"),
        ("c3_paper", {"seed": -1}, "seed must be an integer from 0"),
        ("permuted", {"kept_rows": 0}, "kept_rows must be a positive integer, got 0"),
        ("permuted", {"seed": 1.5}, "seed must be an integer from 0"),
        ("gaussian_monge", {"normalize": 1}, "normalize must be True or False"),
        ("per_dim_std", {"normalize": None}, "normalize must be True or False"),
    ],
)
def test_impossible_options_are_refused_at_fit(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(method, **options)
