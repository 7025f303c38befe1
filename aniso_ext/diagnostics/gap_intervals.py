"""The moments behind a gap report, their spectra, and how far its numbers would move with other pairs.

A function f of the covariance S = mean s s^T of centred rows moves by <K, ss^T - S> for each of them, K its gradient:

    C_lambda   d lambda_a = u_a^T dS u_a
    O_q, eta   dP = sum of (u_a^T dS u_b) / (lambda_a - lambda_b) (u_a u_b^T + u_b u_a^T), a in the subspace, b outside
    |S|_F      d|S|_F^2 = 2 <S, dS>

so that each pair contributes one quadratic form of its rows a number. Near-equal eigenvalues rotate by no more than a
quarter turn: 1/gap becomes gap / (gap^2 + lambda_a lambda_b / n), whose last term is the variance of u_a^T dS u_b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aniso_ext.diagnostics import spectra
from aniso_ext.diagnostics.intervals import Interval, defined, length_interval, percentile_interval, resampled_means
from aniso_ext.diagnostics.rows import Rows
from aniso_ext.stats import Moments
from aniso_ext.stats.device_moments import DeviceMoments

if TYPE_CHECKING:
    from aniso_ext.diagnostics.gap import GapReport

Eigenpairs = tuple[torch.Tensor, torch.Tensor]
CONTRIBUTIONS = (
    *("residual", "distance", "energy", "square", "leading", "spread", "reached"),
    *("turn_frame", "turn_q", "logs", "difference", "size", "noise"),
)


@dataclass(frozen=True)
class GapMoments:
    """Means [D] and covariances [D, D] of y, x and r, m_x - m_y, E|x - y|, E|r| and E r/|r| [D], on one device."""

    source_mean: torch.Tensor
    target_mean: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    residual: torch.Tensor
    shift: torch.Tensor
    distance: float
    residual_norm: float
    lean: torch.Tensor

    @classmethod
    def of(cls, ys: Rows, xs: Rows, device: torch.device) -> GapMoments:
        """Two passes: the moments of y, x and x - y (whose covariance is S_r) with E|x - y|, then E|r|."""
        sums = [Moments(ys.width) if device.type == "cpu" else DeviceMoments(ys.width, device) for _ in range(3)]
        distance, norm = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        for y, x in _pairs(ys, xs, device):
            for sides, rows in zip(sums, (y, x, x - y), strict=True):
                if isinstance(sides, Moments):
                    sides.update(rows.numpy())
                else:
                    sides.update(rows)
            distance += (x - y).norm(dim=1).sum()
        moments = [part if isinstance(part, Moments) else part.moments() for part in sums]
        means = [torch.from_numpy(part.mean).to(device) for part in moments]
        lean = torch.zeros(ys.width, dtype=torch.float64, device=device)
        for y, x in _pairs(ys, xs, device):
            residual = x - y - means[2]
            lengths = residual.norm(dim=1)
            norm += lengths.sum()
            lean += (residual / torch.where(lengths > 0, lengths, 1).unsqueeze(1)).sum(dim=0)
        covariances = [torch.from_numpy(part.covariance).to(device) for part in moments]
        return cls(
            means[0],
            means[1],
            covariances[0],
            covariances[1],
            covariances[2],
            means[1] - means[0],
            float(distance) / ys.count,
            float(norm) / ys.count,
            lean / ys.count,
        )


@dataclass(frozen=True)
class Decomposition:
    """Eigenpairs of S_y, S_x, S_r and, unless a basis was given, of S_x + S_y; the basis [D, R] of eta_u."""

    source: Eigenpairs
    target: Eigenpairs
    residual: Eigenpairs
    joint: Eigenpairs | None
    basis: torch.Tensor

    @classmethod
    def of(cls, moments: GapMoments, basis: torch.Tensor | None, rank: int) -> Decomposition:
        source, target, residual = map(spectra.eigenpairs, (moments.source, moments.target, moments.residual))
        if basis is not None:
            return cls(source, target, residual, None, basis)
        joint = spectra.eigenpairs(moments.source + moments.target)
        return cls(source, target, residual, joint, joint[1][:, :rank])


def _pairs(ys: Rows, xs: Rows, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(ys.batches(device=device), xs.batches(device=device), strict=True)


@dataclass(frozen=True)
class _Gradients:
    """Matrices K [D, D] of the quadratic forms; the first three are lists of (of x, of y)."""

    turn_frame: tuple[torch.Tensor, torch.Tensor] | None
    turn_q: tuple[torch.Tensor, torch.Tensor]
    logs: tuple[torch.Tensor, torch.Tensor]
    difference: torch.Tensor

    @classmethod
    def of(cls, moments: GapMoments, found: Decomposition, rows: int, q: int, used: int) -> _Gradients:
        source_q, target_q = (side[1][:, :q] for side in (found.source, found.target))
        of_target = _turn(found.target, source_q @ source_q.T / q, q, rows)
        of_source = _turn(found.source, target_q @ target_q.T / q, q, rows)
        frame = None
        if found.joint is not None:
            turn = _turn(found.joint, moments.residual, found.basis.shape[1], rows)
            frame = turn, turn
        logs = _log_gradients(found.target, found.source, used)
        return cls(frame, (of_target, of_source), logs, moments.target - moments.source)


def _turn(pairs: Eigenpairs, weight: torch.Tensor, size: int, rows: int) -> torch.Tensor:
    """K [D, D] of tr(P W) for the projector P on the ``size`` leading eigenvectors and a symmetric W [D, D]."""
    values, vectors = pairs
    inner, outer = values[:size, None], values[None, size:]
    gaps = inner - outer
    scale = gaps.square() + inner * outer / rows
    factors = torch.where(scale > 0, gaps / scale, 0)
    coupling = vectors[:, :size].T @ weight @ vectors[:, size:] * factors
    return 2 * vectors[:, :size] @ coupling @ vectors[:, size:].T


def _log_gradients(target: Eigenpairs, source: Eigenpairs, used: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K [D, D] of C_lambda for both sides."""
    logs = [pairs[0][:used].log() for pairs in (target, source)]
    a, b = (log - log.mean() for log in logs)
    scale = a.norm() * b.norm()
    correlation = a @ b / scale
    slopes = b / scale - correlation * a / a.square().sum(), a / scale - correlation * b / b.square().sum()
    of_target, of_source = (
        (vectors[:, :used] * (slope / values[:used])) @ vectors[:, :used].T
        for (values, vectors), slope in zip((target, source), slopes, strict=True)
    )
    return of_target, of_source


def gap_intervals(
    report: GapReport,
    sides: tuple[Rows, Rows],
    moments: GapMoments,
    found: Decomposition,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Intervals of every number that depends on the pairs, from one more pass over the rows ``sides`` = (y, x)."""
    gradients = _Gradients.of(moments, found, report.n, report.q, report.c_lambda_count)
    parts = _contributions(sides, moments, found, gradients)
    means, drawn = resampled_means(parts, report.n, resamples=resamples, seed=seed)
    count = len(CONTRIBUTIONS)
    mean = dict(zip(CONTRIBUTIONS, means[:count], strict=True))
    of = dict(zip(CONTRIBUTIONS, drawn[:, :count].unbind(dim=1), strict=True))
    moved = {name: of[name] - mean[name] for name in CONTRIBUTIONS}
    width, size = report.width, float(moments.target.square().sum())
    squares = report.g_sigma_abs**2 + 2 * moved["difference"]
    noise = float(mean["noise"] - report.g_sigma_abs**2) / report.n
    dimension = of["energy"].square() / (2 * of["spread"] - mean["spread"])
    return defined(
        report,
        {
            "g_mu": length_interval(drawn[:, count:].square().sum(dim=1), report.g_mu**2),
            "g_sigma": length_interval(squares / (size + 2 * moved["size"]), report.g_sigma**2, noise / size),
            "g_sigma_abs": length_interval(squares, report.g_sigma_abs**2, noise),
            "c_lambda": percentile_interval(report.c_lambda + moved["logs"], -1.0, 1.0),
            "o_q": percentile_interval(report.o_q + moved["turn_q"], 0.0, 1.0),
            "d_center": percentile_interval(of["energy"], 0.0),
            "residual_norm": percentile_interval(of["residual"], 0.0),
            "r_res": percentile_interval(of["energy"] / of["square"], 0.0, 1.0),
            "r_res_distance": percentile_interval(of["residual"] / of["distance"], 0.0),
            "a_r": percentile_interval(width * of["leading"] / of["energy"], 1.0, width),
            "d_eff": percentile_interval(dimension, 1.0, width),
            "d_eff_ratio": percentile_interval(dimension / width, 1.0 / width, 1.0),
            "eta_u": percentile_interval((of["reached"] + of["turn_frame"]) / of["energy"], 0.0, 1.0),
        },
    )


def _contributions(
    sides: tuple[Rows, Rows], moments: GapMoments, found: Decomposition, gradients: _Gradients
) -> Iterator[torch.Tensor]:
    """Pieces of [n, m]: the columns of ``CONTRIBUTIONS``, then x - y."""
    device = moments.source.device
    # four digits of a contribution are more than an interval needs, and float32 products take half the time on a CPU
    working = torch.float32 if device.type == "cpu" else torch.float64

    def form(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        narrow = rows.to(working)
        return ((narrow @ matrix.to(working)) * narrow).sum(dim=1).double()

    leading = found.residual[1][:, 0]
    for y, x in _pairs(*sides, device):
        difference = x - y
        residual = difference - moments.shift
        target, source = x - moments.target_mean, y - moments.source_mean
        energy = residual.square().sum(dim=1)
        pairs = [gradients.turn_q, gradients.logs]
        turn_q, logs = (form(target, of_target) + form(source, of_source) for of_target, of_source in pairs)
        turn_frame = torch.zeros_like(energy)
        if gradients.turn_frame is not None:
            turn_frame = form(target, gradients.turn_frame[0]) + form(source, gradients.turn_frame[1])
        columns = {
            "residual": energy.sqrt() - residual @ moments.lean,
            "distance": difference.norm(dim=1),
            "energy": energy,
            "square": difference.square().sum(dim=1),
            "leading": (residual @ leading).square(),
            "spread": form(residual, moments.residual),
            "reached": (residual @ found.basis).square().sum(dim=1),
            "turn_frame": turn_frame,
            "turn_q": turn_q,
            "logs": logs,
            "difference": form(target, gradients.difference) - form(source, gradients.difference),
            "size": form(target, moments.target),
            "noise": target.square().sum(dim=1).square()
            + source.square().sum(dim=1).square()
            - 2 * (target * source).sum(dim=1).square(),
        }
        yield torch.cat((torch.stack([columns[name] for name in CONTRIBUTIONS], dim=1), difference), dim=1)
