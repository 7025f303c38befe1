"""The learned mixing against its definition and on a planted rotation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aniso_ext.align.fitting import FrameOptions, fit_frame
from aniso_ext.align.mixing import mixing_matrix
from aniso_ext.align.phase_stable import learn_mixing, phase_stability
from aniso_ext.align.rows import open_rows
from aniso_ext.errors import InputError


def planted(rows: int, seed: int) -> np.ndarray:
    """[n, 8]: four blocks; the phases of two are locked, one is concentrated, one is uniform."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-np.pi, np.pi, (rows, 4))
    theta[:, 1] = theta[:, 0] + 1 + rng.vonmises(0, 6, rows)
    theta[:, 2] = rng.vonmises(2, 3, rows)
    radius = np.exp(rng.normal(0, 0.2, (rows, 4)))
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1).reshape(rows, 8)


def rotation(seed: int) -> np.ndarray:
    return mixing_matrix("haar", torch.ones(8), seed).numpy()


def stability(coordinates: np.ndarray) -> float:
    """J with the whole sample, spelled out: |m|^2 and |C|^2 less the variance of each over two halves."""
    value = 0.0
    phases = np.arctan2(coordinates[:, 1::2], coordinates[:, 0::2])
    halves = [np.exp(1j * phases[start::2]) for start in (0, 1)]
    means = [half.mean(0) for half in halves]
    couplings = [
        np.mean(half[:, :, None] * half[:, None].conj(), axis=0) - np.outer(mean, mean.conj())
        for half, mean in zip(halves, means, strict=True)
    ]
    off = 1 - np.eye(phases.shape[1])
    for one, two, weight in ((*means, 1.0), (*couplings, off)):
        value += float((weight * (np.abs((one + two) / 2) ** 2 - np.abs(one - two) ** 2 / 4)).sum())
    return value


def test_stability_is_what_the_definition_says() -> None:
    coordinates = planted(501, seed=0) @ rotation(1)
    coordinates = coordinates[:500]
    assert float(phase_stability(torch.from_numpy(coordinates))) == pytest.approx(stability(coordinates), rel=1e-12)


def test_stability_is_unbiased_where_the_plain_sum_is_not() -> None:
    # 300 samples of 64 uniform rows: squares alone would average (4 + 12)/64 = 0.25, their products average zero.
    # A product of halves has deviation at most 1/32 a term, 16 terms, 300 samples.
    rng = np.random.default_rng(0)
    values = [float(phase_stability(torch.from_numpy(rng.normal(size=(64, 8))))) for _ in range(300)]
    assert abs(np.mean(values)) < 5 * 4 / 32 / np.sqrt(300)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_rotation_is_matched_from_any_start(seed: int) -> None:
    """Learned blocks are at least as stable on fresh rows as the planted ones, which a random start is far from.

    The planted blocks are a lower bound of the maximum, not the maximum: spreading the concentrated block's mean over
    several blocks gains more in the first sum than it costs in the second.
    """
    hidden = rotation(5)
    coordinates = torch.from_numpy(planted(8000, seed=1) @ hidden.T)
    mixing, summary = learn_mixing(coordinates, mixing_matrix("haar", torch.ones(8), seed), seed=0)
    assert (mixing.T @ mixing - torch.eye(8)).abs().max() < 1e-12
    fresh = planted(8000, seed=2)
    best, start, learned = (
        stability(fresh @ part) for part in (np.eye(8), hidden.T @ rotation(seed), hidden.T @ mixing.numpy())
    )
    assert start < 0.7 * best < best < learned
    assert summary["mixing_stability_after"] > summary["mixing_stability_before"]


def test_what_is_learned_is_a_function_of_rows_start_and_seed() -> None:
    coordinates = torch.from_numpy(planted(500, seed=1))
    start = mixing_matrix("haar", torch.ones(8), 0)
    first, second = (learn_mixing(coordinates, start, seed=3)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_fitted_frame_is_more_stable_than_the_haar_one_it_starts_from() -> None:
    hidden = np.linalg.qr(np.random.default_rng(8).normal(size=(12, 12)))[0]
    filler = np.random.default_rng(9).normal(scale=0.05, size=(6000, 4))
    target = np.concatenate([planted(6000, seed=3), filler], axis=1) @ hidden
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    source = target[::-1] + 0.02 * np.random.default_rng(1).normal(size=target.shape)
    source /= np.linalg.norm(source, axis=1, keepdims=True)
    found = {}
    for mixing in ("haar", "phase_stable"):
        options = FrameOptions(8, mixing, "scalar", 64, 0)
        frame, summary = fit_frame(open_rows(source, "source"), open_rows(target, "target"), options)
        found[mixing] = stability(target @ frame.basis.numpy())
        assert ("mixing_steps" in summary) == (mixing == "phase_stable")
    # the frame was checked to be orthonormal to 1e-8 when it was made
    assert found["phase_stable"] > 1.5 * found["haar"]


def test_too_few_rows_are_named() -> None:
    with pytest.raises(InputError, match="needs at least 100 target rows, got 40"):
        learn_mixing(torch.randn(40, 8), torch.eye(8), seed=0)
    with pytest.raises(InputError, match=r"coordinates must be \[n, R\]"):
        phase_stability(torch.randn(3, 8))
