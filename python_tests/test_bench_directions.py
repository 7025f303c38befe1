"""The analysis of the ladder's directions on rows whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from ladder_directions import PARTS, Pair, class_means, polar, spectrum, swap_parts
from ladder_readers import KEPT, RIDGE, LinearReader, Moments, Problem, unit

WIDTH, RANK = 10, 4


def rows(count: int, seed: int) -> torch.Tensor:
    return unit(torch.from_numpy(np.random.default_rng(seed).standard_normal((count, WIDTH))))


def basis() -> torch.Tensor:
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(9).standard_normal((WIDTH, RANK)))[0])


def test_parts_that_are_exchanged_are_the_others_and_the_rest_stays() -> None:
    own, other = rows(50, 0), rows(50, 1)
    assert torch.allclose(swap_parts(own, other, basis(), ()), own, atol=1e-14)
    assert torch.allclose(swap_parts(own, other, basis(), (0, 1, 2, 3)), other, atol=1e-14)
    for taken in PARTS.values():
        found = polar(swap_parts(own, other, basis(), taken), basis())
        sides = polar(own, basis()), polar(other, basis())
        radii, length = (sides[part in taken][part] for part in (0, 3))
        size = (radii.square().sum(dim=1, keepdim=True) + length.square()).sqrt()  # rows are made unit again
        expected = (radii / size, sides[1 in taken][1], sides[2 in taken][2], length / size)
        for got, wanted in zip(found, expected, strict=True):
            assert torch.allclose(got, wanted, atol=1e-13)


def test_the_spectrum_of_a_planted_error_is_what_was_planted() -> None:
    """Images vary along the axes; the stand-in is b x in each of them and has an offset that is its class's."""
    random = np.random.default_rng(3)
    count, slopes = 400, np.linspace(0.5, 2, WIDTH)
    scale = np.linspace(3, 1, WIDTH)
    image = np.linalg.qr(random.standard_normal((count, WIDTH + 1)))[0]
    image -= image.mean(axis=0)
    image = np.linalg.qr(image)[0][:, :WIDTH] * count**0.5 * scale  # exactly uncorrelated, variances scale^2
    standin = image / slopes
    found = spectrum(
        Pair(torch.from_numpy(standin), torch.from_numpy(image), basis()),
        torch.zeros(count, dtype=torch.int64),
        tuple((i, i + 1) for i in range(WIDTH)),
    )
    for row, slope, size in zip(found, slopes, scale, strict=True):
        np.testing.assert_allclose(row["target_energy"], size**2, rtol=1e-10)
        np.testing.assert_allclose(row["error_energy"], size**2 * (1 - 1 / slope) ** 2, rtol=1e-9, atol=1e-20)
        np.testing.assert_allclose([row["slope"], row["correlation"]], [slope, 1], rtol=1e-10)
    offset = torch.from_numpy(np.repeat([[1.0], [-1.0]], count // 2, axis=0) * np.ones(WIDTH))
    classes = torch.tensor([0, 1]).repeat_interleave(count // 2)
    shifted = spectrum(Pair(torch.from_numpy(image) + offset, torch.from_numpy(image), basis()), classes)
    assert abs(shifted[0]["between_share"] - 1) < 1e-12


def test_error_between_and_within_classes_adds_up() -> None:
    error, classes = rows(60, 4) - rows(60, 5), torch.arange(60) % 7
    means = class_means(error, classes)
    expected = np.stack([error.numpy()[classes.numpy() == each].mean(axis=0) for each in range(7)])[classes]
    np.testing.assert_allclose(means.numpy(), expected, atol=1e-15)
    total = means.square().sum() + (error - means).square().sum()
    np.testing.assert_allclose(total.item(), error.square().sum().item(), rtol=1e-13)


def test_noise_in_the_linear_reader_is_that_of_noisy_copies() -> None:
    """Copies at +- sqrt(D) times the columns of F have the covariance F F^T: least squares on them is the reader."""
    random = np.random.default_rng(6)
    kept, count, answers = KEPT, 40, 6
    own = rows(kept + count, 7)
    labels = torch.from_numpy(random.integers(0, 3, (kept + count, 1)))
    words = torch.from_numpy((random.random((kept + count, 3)) < 0.5).astype(np.float32))
    words[:, 0] = 1  # a title without a word that counts has no score
    problem = Problem(
        "planted", own, own, own[:5], labels, labels[:5], words, words[:5], (3,), torch.ones(3), labels[:, 0]
    )  # fmt: skip
    factor = random.standard_normal((WIDTH, WIDTH)) * 0.1
    noise = factor @ factor.T + RIDGE * np.eye(WIDTH)
    found = LinearReader(problem, Moments.of(problem, own)).weights(torch.from_numpy(factor @ factor.T))
    root = np.linalg.cholesky(noise) * WIDTH**0.5
    given = own[kept:].numpy()
    copies = np.concatenate([given + sign * column for column in root.T for sign in (1, -1)])
    targets = np.tile(problem.answers()[kept:].numpy().astype(np.float64), (2 * WIDTH, 1))
    design = np.column_stack([copies, np.ones(len(copies))])
    expected = np.linalg.lstsq(design, targets, rcond=None)[0][:WIDTH]
    assert found.shape == (WIDTH, answers)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
    perfect = problem.score(problem.answers()[:5], labels[:5], words[:5])
    assert perfect == (1.0, 1.0)
