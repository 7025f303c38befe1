"""Does a transform keep the geometry of its source: instance bound and pairwise correlation (METHOD section 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from aniso_ext.diagnostics.spectra import pearson


def phi_bound(source_mean: torch.Tensor, output_mean: torch.Tensor) -> float:
    """Largest mean y.z of unit rows with these means: m_y.m_z + sqrt((1 - |m_y|^2)(1 - |m_z|^2)) (METHOD fact (a)).

    Both are [D]. Cauchy-Schwarz on the centred rows, whose mean squared lengths are 1 - |m|^2.

    Example:
        >>> mean = torch.tensor([0.6, 0.0], dtype=torch.float64)
        >>> round(phi_bound(mean, mean), 12), round(phi_bound(mean, -mean), 12)
        (1.0, 0.28)
    """
    spread = max(0.0, 1 - float(source_mean @ source_mean)) * max(0.0, 1 - float(output_mean @ output_mean))
    return float(source_mean @ output_mean) + math.sqrt(spread)


def random_pairs(count: int, pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``pairs`` independent uniform ordered pairs i != j of ``count`` rows."""
    generator = np.random.default_rng(seed)
    first = generator.integers(count, size=pairs)
    second = (first + generator.integers(1, count, size=pairs)) % count
    return torch.from_numpy(first), torch.from_numpy(second)


def sampled_psi(source: torch.Tensor, transformed: torch.Tensor, pairs: int, seed: int) -> float:
    """Pearson correlation of y_i.y_j and z_i.z_j over random pairs; products in float32, correlation in float64.

    Its standard error is about (1 - psi^2) / sqrt(pairs).
    """
    first, second = random_pairs(source.shape[0], pairs, seed)
    partners = second[first.argsort(stable=True)].split(first.bincount(minlength=source.shape[0]).tolist())
    return pearson(_partner_products(source, partners), _partner_products(transformed, partners))


def _partner_products(rows: torch.Tensor, partners: Sequence[torch.Tensor]) -> torch.Tensor:
    """Row i with each of its partners, all i in turn: one small gathered product a row stays in cache."""
    single = rows.float()
    return torch.cat([torch.mv(single[others], row) for row, others in zip(single, partners, strict=True)]).double()


def exact_psi(source: torch.Tensor, transformed: torch.Tensor) -> float:
    """The same correlation over all pairs i != j, float64, without forming them: O(n D^2) time, O(D^2) memory.

    sum_ij (y_i.y_j)(z_i.z_j) = ||Y^T Z||_F^2 and sum_ij y_i.y_j = ||sum_i y_i||^2; the diagonal is taken off.
    """
    count = source.shape[0]
    pairs = count * (count - 1)
    source_squares, transformed_squares = source.square().sum(dim=1), transformed.square().sum(dim=1)

    def mean_product(a: torch.Tensor, b: torch.Tensor, a_squares: torch.Tensor, b_squares: torch.Tensor) -> float:
        return (float((a.T @ b).square().sum()) - float(a_squares @ b_squares)) / pairs

    def mean(rows: torch.Tensor, squares: torch.Tensor) -> float:
        return (float(rows.sum(dim=0).square().sum()) - float(squares.sum())) / pairs

    source_mean, transformed_mean = mean(source, source_squares), mean(transformed, transformed_squares)
    cross = mean_product(source, transformed, source_squares, transformed_squares) - source_mean * transformed_mean
    source_variance = mean_product(source, source, source_squares, source_squares) - source_mean**2
    transformed_variance = (
        mean_product(transformed, transformed, transformed_squares, transformed_squares) - transformed_mean**2
    )
    scale = math.sqrt(max(0.0, source_variance) * max(0.0, transformed_variance))
    return cross / scale if scale > 0 else math.nan
