"""Does a transform keep the geometry of its source: instance bound and pairwise correlation (METHOD section 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from aniso_ext.diagnostics.rows import pieces
from aniso_ext.diagnostics.spectra import pearson

if TYPE_CHECKING:
    from aniso_ext.diagnostics.streams import Matrix

PAIRS_AT_A_TIME = 2**16


def phi_bound(source_mean: torch.Tensor, output_mean: torch.Tensor) -> float:
    """Largest mean y.z of unit rows with these means: m_y.m_z + sqrt((1 - |m_y|^2)(1 - |m_z|^2)) (METHOD fact (a)).

    Both are [D]. Cauchy-Schwarz on the centred rows, whose mean squared lengths are 1 - |m|^2.

    Example:
        >>> mean = torch.tensor([0.6, 0.0], dtype=torch.float64)
        >>> round(phi_bound(mean, mean), 12), round(phi_bound(mean, -mean), 12)
        (1.0, 0.28)
    """
    return float(phi_bounds(source_mean, output_mean))


def phi_bounds(source_means: torch.Tensor, output_means: torch.Tensor) -> torch.Tensor:
    """:func:`phi_bound` of many means [..., D] at once."""
    spread = torch.ones_like(source_means[..., 0])
    for means in (source_means, output_means):
        spread = spread * (1 - means.square().sum(dim=-1)).clamp_min(0)
    return (source_means * output_means).sum(dim=-1) + spread.sqrt()


def random_pairs(count: int, pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``pairs`` independent uniform ordered pairs i != j of ``count`` rows."""
    generator = np.random.default_rng(seed)
    first = generator.integers(count, size=pairs)
    second = (first + generator.integers(1, count, size=pairs)) % count
    return torch.from_numpy(first), torch.from_numpy(second)


def sampled_psi(source: Matrix, transformed: Matrix, pairs: int, seed: int) -> float:
    """Pearson correlation of y_i.y_j and z_i.z_j over random pairs; products in float32, correlation in float64.

    Its standard error is about (1 - psi^2) / sqrt(pairs).
    """
    chosen = random_pairs(source.shape[0], pairs, seed)
    return pearson(*(_products(*_gathered(rows, *chosen)) for rows in (source, transformed)))


def _gathered(
    rows: Matrix, first: torch.Tensor, second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in memory with the places of both partners there; of rows that pass by only those that are partners."""
    if isinstance(rows, torch.Tensor):
        return rows, first, second
    used, places = torch.cat((first, second)).unique(return_inverse=True)
    return rows.take(used), places[: first.numel()], places[first.numel() :]


def _products(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if rows.device.type == "cpu":
        partners = second[first.argsort(stable=True)].split(first.bincount(minlength=rows.shape[0]).tolist())
        return _partner_products(rows, partners)
    return _pair_products(rows, first.to(rows.device), second.to(rows.device))


def _partner_products(rows: torch.Tensor, partners: Sequence[torch.Tensor]) -> torch.Tensor:
    """Row i with each of its partners, all i in turn: one small gathered product a row stays in cache."""
    single = rows.float()
    return torch.cat([torch.mv(single[others], row) for row, others in zip(single, partners, strict=True)]).double()


def _pair_products(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """rows[first] . rows[second]: on a GPU the many small products would cost more than their gathering."""
    parts = zip(first.split(PAIRS_AT_A_TIME), second.split(PAIRS_AT_A_TIME), strict=True)
    return torch.cat([(rows[a].float() * rows[b].float()).sum(dim=1) for a, b in parts]).double()


@dataclass(frozen=True)
class AllPairs:
    """Means over all pairs i != j of a_ij = y_i.y_j, b_ij = z_i.z_j and their products, and what each row adds to them.

    sum_ij (y_i.y_j)(z_i.z_j) = ||Y^T Z||_F^2 and sum_ij y_i.y_j = ||sum_i y_i||^2; the diagonal is taken off. No
    pair is formed: O(n D^2) time, O(D^2) memory, float64.
    """

    cross: torch.Tensor
    source: torch.Tensor
    transformed: torch.Tensor
    source_sum: torch.Tensor
    transformed_sum: torch.Tensor
    count: int

    @classmethod
    def of(cls, source: Matrix, transformed: Matrix) -> AllPairs:
        width = source.shape[1]
        cross, a, b = (torch.zeros(width, width, dtype=torch.float64, device=source.device) for _ in range(3))
        sums = [torch.zeros(width, dtype=torch.float64, device=source.device) for _ in range(2)]
        for y, z in pieces(source, transformed):
            cross.addmm_(y.T, z)
            a.addmm_(y.T, y)
            b.addmm_(z.T, z)
            sums[0] += y.sum(dim=0)
            sums[1] += z.sum(dim=0)
        return cls(cross, a, b, sums[0], sums[1], source.shape[0])

    def projections(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """[n, 5] for rows y, z [n, D]: means over j != i of a_ij b_ij, a_ij^2, b_ij^2, a_ij and b_ij."""
        y_squares, z_squares = y.square().sum(dim=1), z.square().sum(dim=1)
        totals = (
            ((y @ self.cross) * z).sum(dim=1) - y_squares * z_squares,
            ((y @ self.source) * y).sum(dim=1) - y_squares.square(),
            ((z @ self.transformed) * z).sum(dim=1) - z_squares.square(),
            y @ self.source_sum - y_squares,
            z @ self.transformed_sum - z_squares,
        )
        return torch.stack(totals, dim=1) / (self.count - 1)


def pair_correlation(means: torch.Tensor) -> torch.Tensor:
    """Correlation from the five means [..., 5] of :class:`AllPairs`; NaN where one side is constant."""
    cross, a_squares, b_squares, a, b = means.unbind(dim=-1)
    variances = (a_squares - a.square()).clamp_min(0) * (b_squares - b.square()).clamp_min(0)
    return torch.where(variances > 0, (cross - a * b) / variances.sqrt(), math.nan)


def exact_psi(source: Matrix, transformed: Matrix) -> float:
    """The same correlation over all pairs i != j, without sampling."""
    pairs = AllPairs.of(source, transformed)
    squares = [torch.zeros((), dtype=torch.float64, device=source.device) for _ in range(5)]
    for y, z in pieces(source, transformed):
        a, b = y.square().sum(dim=1), z.square().sum(dim=1)
        for total, diagonal in zip(squares, (a @ b, a @ a, b @ b, a.sum(), b.sum()), strict=True):
            total += diagonal
    totals = (
        pairs.cross.square().sum(),
        pairs.source.square().sum(),
        pairs.transformed.square().sum(),
        pairs.source_sum.square().sum(),
        pairs.transformed_sum.square().sum(),
    )
    means = (torch.stack(totals) - torch.stack(squares)) / (pairs.count * (pairs.count - 1))
    return float(pair_correlation(means))
