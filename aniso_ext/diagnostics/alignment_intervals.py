"""What the numbers of an alignment report are made of, row by row, and how far they would move with other pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aniso_ext.diagnostics import spectra
from aniso_ext.diagnostics.consistency import AllPairs, pair_correlation, phi_bounds
from aniso_ext.diagnostics.intervals import (
    Interval,
    defined,
    length_interval,
    percentile_interval,
    resampled_means,
    widened,
)
from aniso_ext.diagnostics.neighbours import Nearest
from aniso_ext.diagnostics.rows import BATCH_ROWS, pieces
from aniso_ext.diagnostics.searches import RECALL_DEPTH, Owed, Union, mixing_owed, overlap_owed

if TYPE_CHECKING:
    from aniso_ext.diagnostics.alignment import AlignmentReport
    from aniso_ext.diagnostics.streams import Matrix

UNIT_TOLERANCE = 1e-2
ENERGIES = 4
PRODUCTS = 5


@dataclass(frozen=True)
class Settings:
    """How the numbers are taken.

    Neighbours, random pairs of psi (None: all pairs, exact), seed, resamples behind the intervals (0: none), whether
    candidates for neighbours are found in float16, and the number of pairs whose neighbours are searched (None: all).
    """

    k: int = 20
    psi_pairs: int | None = 1_000_000
    seed: int = 0
    bootstrap: int = 0
    half: bool = False
    queries: int | None = None


@dataclass(frozen=True)
class PairSums:
    """Means [D], moments [D, D] of x - z, products y_i.z_i and cosines of x_i and z_i [n]; odd norms of each side."""

    source_mean: torch.Tensor
    target_mean: torch.Tensor
    output_mean: torch.Tensor
    second_moment: torch.Tensor
    covariance: torch.Tensor
    products: torch.Tensor
    cosines: torch.Tensor
    zero: dict[str, int]
    stray: dict[str, int]

    @classmethod
    def of(cls, y: Matrix, x: Matrix, z: Matrix) -> PairSums:
        count, width = x.shape
        sums = torch.zeros(3, width, dtype=torch.float64, device=x.device)
        moments = torch.zeros(2, width, width, dtype=torch.float64, device=x.device)
        names = ("source", "target", "transformed")
        zero, stray = (torch.zeros(3, dtype=torch.int64, device=x.device) for _ in range(2))
        products, cosines = [], []
        for sides in pieces(y, x, z):
            sums += torch.stack([side.sum(dim=0) for side in sides])
            residual = sides[1] - sides[2]
            moments[0].addmm_(residual.T, residual)
            norms = torch.stack([side.norm(dim=1) for side in sides])
            zero += (norms == 0).sum(dim=1)
            stray += (((norms - 1).abs() > UNIT_TOLERANCE) & (norms > 0)).sum(dim=1)
            lengths = torch.where(norms > 0, norms, 1)
            products.append((sides[0] * sides[2]).sum(dim=1))
            cosines.append((sides[1] / lengths[1, :, None] * (sides[2] / lengths[2, :, None])).sum(dim=1))
        means = sums / count
        for target, output in pieces(x, z):
            residual = target - output - (means[1] - means[2])
            moments[1].addmm_(residual.T, residual)
        return cls(
            means[0],
            means[1],
            means[2],
            moments[0] / count,
            moments[1] / count,
            torch.cat(products),
            torch.cat(cosines),
            dict(zip(names, zero.tolist(), strict=True)),
            dict(zip(names, stray.tolist(), strict=True)),
        )


def alignment_intervals(
    report: AlignmentReport,
    sides: tuple[Matrix, Matrix, Matrix],
    pairs: PairSums,
    found: tuple[Nearest, Union],
    settings: Settings,
    queries: torch.Tensor | None,
) -> dict[str, Interval]:
    """Intervals of every number that depends on the pairs, for rows ``sides`` = (y, x, z) and what was found there.

    ``queries`` are the pairs whose neighbours were searched, None for all.
    """
    near = _near(found, report.mixing_expectation)
    shares = {"phi": pairs.products, "paired_cosine": pairs.cosines}
    if queries is None:
        shares |= {name: one.influence() if isinstance(one, Owed) else one for name, one in near.items()}
    parts = _contributions(sides, pairs, torch.stack(list(shares.values()), dim=1))
    means, drawn = resampled_means(parts, report.n, resamples=settings.bootstrap, seed=settings.seed)
    sizes = (len(shares), PRODUCTS, ENERGIES, report.width, report.width, report.width)
    products = means.split(sizes)[1]
    values, drawn_products, energies, m_y, m_x, m_z = drawn.split(sizes, dim=1)
    columns = dict(zip(shares, values.unbind(dim=1), strict=True))
    if queries is not None:
        columns |= _of_queries(near, queries, report.n, settings)
    intervals = {name: percentile_interval(column, *_range(name, pairs)) for name, column in columns.items()}
    return defined(
        report,
        {
            **intervals,
            "psi": _psi_interval(report.psi, products, drawn_products, settings.psi_pairs),
            "a_r": percentile_interval(report.width * energies[:, 0] / energies[:, 1], 1.0, report.width),
            "a_r_centred": percentile_interval(report.width * energies[:, 2] / energies[:, 3], 1.0, report.width),
            "delta_mu": length_interval((m_z - m_x).square().sum(dim=1), report.delta_mu**2),
            "phi_bound": percentile_interval(phi_bounds(m_y, m_x)),
            "phi_bound_output": percentile_interval(phi_bounds(m_y, m_z)),
        },
    )


def _near(found: tuple[Nearest, Union], expectation: float) -> dict[str, Owed | torch.Tensor]:
    """The numbers that are means over neighbourhoods: what they owe to pairs, or values [q] that depend on no other."""
    source_neighbours, around = found
    return {
        "omega": overlap_owed(source_neighbours, around.outputs),
        "omega_tied": source_neighbours.tied.double(),
        "m_z": mixing_owed(around.around_outputs, expectation),
        "m_x": mixing_owed(around.around_targets, expectation),
        "recall_at_1": around.retrieval.recalls(1),
        "recall_at_10": around.retrieval.recalls(RECALL_DEPTH),
    }


def query_errors(found: tuple[Nearest, Union], expectation: float, count: int) -> dict[str, float]:
    """Standard errors of means over sampled queries as estimates of those over all ``count`` pairs.

    sqrt((1 - q/n) s^2 / q), as of any uniform sample without replacement.
    """
    errors = {}
    for name, one in _near(found, expectation).items():
        values = one.own if isinstance(one, Owed) else one
        error = math.sqrt(float(values.var()) * (1 - values.numel() / count) / values.numel())
        if math.isfinite(error):
            errors[name] = error
    return errors


def _of_queries(
    near: dict[str, Owed | torch.Tensor], queries: torch.Tensor, count: int, settings: Settings
) -> dict[str, torch.Tensor]:
    """Resampled means [resamples] of what sampled queries found.

    With V the variance of the values and I that of the influences of all pairs, the mean over q of n pairs has the
    variance (1 - q/n) V / q, of the sample, and I / n, of the pairs. Redrawing the queries gives V / q; what they
    deviate is therefore stretched by sqrt(1 - q/n + q/n I / V).
    """
    values = {name: one.own if isinstance(one, Owed) else one for name, one in near.items()}
    parts = iter(torch.stack(list(values.values()), dim=1).split(BATCH_ROWS))
    means, drawn = resampled_means(parts, queries.numel(), resamples=settings.bootstrap, seed=settings.seed)
    share = queries.numel() / count
    for column, one in enumerate(near.values()):
        variance = float(one.own.var(correction=0)) if isinstance(one, Owed) else 0.0
        if isinstance(one, Owed) and variance > 0:
            stretch = math.sqrt(1 - share + share * one.influence_variance(queries, count) / variance)
            drawn[:, column] = means[column] + stretch * (drawn[:, column] - means[column])
    return dict(zip(values, drawn.unbind(dim=1), strict=True))


def _range(name: str, pairs: PairSums) -> tuple[float, float]:
    """Bounds of what a number can be; phi has none where rows are not unit vectors."""
    if name == "phi":
        return (-math.inf, math.inf) if any(pairs.stray.values()) else (-1.0, 1.0)
    if name in ("m_z", "m_x"):
        return 0.0, math.inf
    return (-1.0, 1.0) if name == "paired_cosine" else (0.0, 1.0)


def _contributions(
    sides: tuple[Matrix, Matrix, Matrix], pairs: PairSums, table: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Pieces of [n, m]: the table, the projections of psi, energies of x - z in its leading direction, and the rows."""
    y, x, z = sides
    all_pairs = AllPairs.of(y, z)
    leading, leading_centred = (
        spectra.eigenpairs(moment)[1][:, 0] for moment in (pairs.second_moment, pairs.covariance)
    )
    shift = pairs.target_mean - pairs.output_mean
    for source, target, output, known in pieces(y, x, z, table):
        residual = target - output
        centred = residual - shift
        energies = (
            (residual @ leading).square(),
            residual.square().sum(dim=1),
            (centred @ leading_centred).square(),
            centred.square().sum(dim=1),
        )
        products = all_pairs.projections(source, output)
        yield torch.cat((known, products, torch.stack(energies, dim=1), source, target, output), dim=1)


def _psi_interval(value: float, means: torch.Tensor, drawn: torch.Tensor, sampled: int | None) -> Interval:
    """Psi is a function of five U-statistics of order 2, which move by twice the means of their projections."""
    interval = percentile_interval(pair_correlation(2 * drawn - means), -1.0, 1.0)
    if sampled is None:
        return interval
    offset = value - float(pair_correlation(means))
    moved = Interval(interval.low + offset, interval.high + offset)
    wide = widened(moved, value, (1 - value**2) / math.sqrt(sampled))
    return Interval(max(-1.0, wide.low), min(1.0, wide.high))
