"""The unpaired residual and the noise in its shape, against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aniso_ext.align import make_aligner
from aniso_ext.align.residual import noise_factor, unpaired_residual
from aniso_ext.errors import InputError
from aniso_ext.mllm import Correction
from aniso_ext.mllm.arms import choose_arms


def test_the_residual_of_isolated_rows_is_that_of_their_pairs() -> None:
    """Unit rows at right angles, each with two targets near it, so that the nearest ones are known."""
    width, random = 24, np.random.default_rng(0)
    standins = np.linalg.qr(random.standard_normal((width, width)))[0]
    moves = 0.05 * random.standard_normal((width, 2, width)) * np.linspace(1, 3, width)
    targets = (standins[:, None] + moves).reshape(-1, width)
    centred = moves.reshape(-1, width) - moves.reshape(-1, width).mean(axis=0)
    expected = centred.T @ centred / len(centred)
    shuffled = torch.from_numpy(random.permutation(targets))
    found = unpaired_residual(torch.from_numpy(standins), shuffled, neighbours=2)
    # differences of numbers near 1: one rounding each, so an error of about 1e-16 in products of about .1
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-15)


def test_fewer_rows_are_drawn_by_the_seed() -> None:
    random = np.random.default_rng(1)
    standins, target = (torch.from_numpy(random.standard_normal((300, 6))) for _ in range(2))
    first, again, other = (unpaired_residual(standins, target, rows=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_noise_has_the_shape_of_the_residual_and_the_energy_of_its_level() -> None:
    random = np.random.default_rng(2)
    width, level, rows = 5, 0.03, 200_000
    root = random.standard_normal((width, 3))  # a covariance without full rank has a factor as well
    covariance = torch.from_numpy(root @ root.T)
    factor = noise_factor(covariance)
    wanted = covariance * (width / covariance.trace())
    np.testing.assert_allclose((factor @ factor.T).numpy(), wanted.numpy(), rtol=0, atol=1e-13)
    torch.manual_seed(0)
    pole = torch.zeros(1, width, dtype=torch.float64)
    pole[0, 0] = 1e6  # so far out that a unit row is, to first order, the noise over its length
    noisy = Correction(noise_std=level * 1e6, noise_factor=factor)(pole.expand(rows, -1))
    tangent = noisy[:, 1:] / noisy[:, :1]
    found = tangent.T @ tangent / rows
    # second moments of n normal rows have a standard error of sqrt(s_ii s_jj + s_ij^2) / sqrt(n): five of them, and
    # what the noise along the pole does to the length, of the order of level^2
    scale = level**2 * wanted[1:, 1:].diagonal().max().item()
    assert float((found - level**2 * wanted[1:, 1:]).abs().max()) < scale * (5 * 2**0.5 / rows**0.5 + 30 * level**2)


def test_levels_of_residual_noise_are_reported_as_one() -> None:
    arms = choose_arms(["identity", "anisoalign", "c3_paper"], noise="residual")
    assert [arm.name for arm in arms if arm.method != "anisoalign"] == ["identity", "c3_paper"]
    levels = [arm for arm in arms if arm.method == "anisoalign"]
    assert {arm.tuned for arm in levels} == {"anisoalign-residual"}
    assert {arm.aligner for arm in levels} == {"anisoalign"}
    assert all(arm.noise_shape == "residual" and arm.noise_std > 0 for arm in levels)


def test_the_factor_is_part_of_the_fingerprint() -> None:
    plain, shaped = Correction.noise(0.1), Correction(noise_std=0.1, noise_factor=torch.eye(3))
    other = Correction(noise_std=0.1, noise_factor=torch.eye(3).flip(0))
    assert len({plain.fingerprint, shaped.fingerprint, other.fingerprint}) == 3
    assert shaped.fresh().fingerprint == shaped.fingerprint


def test_a_correction_estimates_the_shape_from_files_and_arrays_alike(tmp_path: Path) -> None:
    """The source turned and shortened about a shared mean; mean_shift leaves the turn, whose residual NumPy knows."""
    random = np.random.default_rng(3)
    target = random.normal(size=(400, 6)) * np.linspace(2, 0.5, 6) + 3
    source = target @ np.linalg.qr(random.normal(size=(6, 6)))[0] * 0.5
    sides = {"source": unit_rows(source), "target": unit_rows(target)}
    for name, rows in sides.items():
        np.save(tmp_path / f"{name}.npy", rows.astype(np.float32))
    files = {name: tmp_path / f"{name}.npy" for name in sides}
    found = [
        Correction.from_aligner("mean_shift", **given, noise_std=0.1, noise_shape="residual").noise_factor
        for given in (files, {name: np.load(path) for name, path in files.items()})
    ]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])

    shifted = unit_rows(sides["source"] - sides["source"].mean(axis=0) + sides["target"].mean(axis=0))
    nearest = np.argsort(-shifted @ sides["target"].T, axis=1)[:, :5]
    differences = (sides["target"][nearest] - shifted[:, None]).reshape(-1, 6)
    covariance = np.cov(differences.T, bias=True)
    made = (found[0] @ found[0].T).numpy()
    # float32 rows: 6e-8 in each difference of .1 and more, and a neighbour or two may tie
    np.testing.assert_allclose(made, covariance * 6 / np.trace(covariance), atol=1e-3)


def test_a_shape_says_what_it_needs() -> None:
    rows = unit_rows(np.eye(8, dtype=np.float32)[np.arange(40) % 8] + 0.1)
    with pytest.raises(InputError, match="one of isotropic, residual, got 'round'"):
        Correction.from_aligner("identity", source=rows, target=rows, noise_std=0.1, noise_shape="round")
    fitted = make_aligner("mean_shift").fit(rows, rows)
    with pytest.raises(InputError, match="from source and target embeddings: pass both"):
        Correction.from_aligner(fitted, noise_std=0.1, noise_shape="residual")
    with pytest.raises(InputError, match="leave noise_factor out"):
        Correction.from_aligner(
            fitted, source=rows, target=rows, noise_std=0.1, noise_factor=torch.eye(8), noise_shape="residual"
        )
    assert Correction.from_aligner(fitted, noise_shape="residual").noise_factor is None


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_bad_input_is_named() -> None:
    rows = torch.eye(3)
    with pytest.raises(InputError, match=r"\[3, 3\] and \[2, 2\]"):
        unpaired_residual(rows, torch.eye(2))
    with pytest.raises(InputError, match="from 1 to the 3 rows of the target, got 4"):
        unpaired_residual(rows, rows, neighbours=4)
    with pytest.raises(InputError, match="rows to look up"):
        unpaired_residual(rows[:0], rows, neighbours=1)
    with pytest.raises(InputError, match="trace is 0"):
        noise_factor(torch.zeros(3, 3))
    with pytest.raises(InputError, match=r"noise_factor must be \[D, D\], got \[2, 3\]"):
        Correction(noise_std=0.1, noise_factor=torch.zeros(2, 3))
