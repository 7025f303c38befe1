"""Second moments and what their spectra say; everything in float64."""

from __future__ import annotations

import math

import torch

RELATIVE_ZERO = 1e-14


def second_moment(rows: torch.Tensor) -> torch.Tensor:
    """(1/n) sum_i r_i r_i^T, uncentred, [D, D] for rows [n, D]."""
    return rows.T @ rows / rows.shape[0]


def covariance(rows: torch.Tensor) -> torch.Tensor:
    """Population covariance [D, D] of rows [n, D]."""
    return second_moment(rows - rows.mean(dim=0))


def eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """Eigenvalues [D] of a positive semidefinite matrix, largest first, rounding below zero set to zero."""
    return torch.linalg.eigvalsh(matrix).flip(0).clamp_min(0)


def eigenpairs(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [D], largest first, and the eigenvectors [D, D] in the same order as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def anisotropy(spectrum: torch.Tensor) -> float:
    """A_r = lambda_max / (tr / D) of a descending spectrum [D]; NaN when there is no energy."""
    total = float(spectrum.sum())
    return float(spectrum[0]) * spectrum.numel() / total if total > 0 else math.nan


def effective_dimension(spectrum: torch.Tensor) -> float:
    """d_eff = (tr S)^2 / tr(S^2) of a spectrum [D]; NaN when there is no energy."""
    total = float(spectrum.sum())
    return total**2 / float(spectrum.square().sum()) if total > 0 else math.nan


def isotropic_anisotropy(rows: int, width: int) -> float:
    """What A_r reads on ``rows`` isotropic residuals: the Marchenko-Pastur edge (1 + sqrt(D/n))^2."""
    return (1 + math.sqrt(width / rows)) ** 2


def isotropic_dimension_ratio(rows: int, width: int) -> float:
    """What d_eff/D reads on ``rows`` isotropic residuals: 1/(1 + D/n), from the Marchenko-Pastur moments."""
    return 1 / (1 + width / rows)


def usable_eigenvalues(first: torch.Tensor, second: torch.Tensor, rows: int) -> int:
    """How many leading eigenvalues of two spectra carry a finite logarithm: at most n - 1, none at rounding level."""
    positive = (first > RELATIVE_ZERO * first[0]) & (second > RELATIVE_ZERO * second[0])
    return min(rows - 1, int(positive.sum()))


def log_spectrum_correlation(first: torch.Tensor, second: torch.Tensor, count: int) -> float:
    """C_lambda: Pearson correlation of the logarithms of the ``count`` leading eigenvalues of two spectra."""
    if count < 2:
        return math.nan
    return pearson(first[:count].log(), second[:count].log())


def pearson(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson correlation of two vectors; NaN when one of them is constant."""
    a, b = first - first.mean(), second - second.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else math.nan


def subspace_overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """O_q = (1/q) ||U^T V||_F^2 of two orthonormal bases [D, q]: 1 when they span the same, q/D when unrelated."""
    return float((first.T @ second).square().sum()) / first.shape[1]
