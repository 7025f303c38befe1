"""The gap before any transform: means, spectra, subspaces and the residual of held-out pairs (METHOD section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from aniso_ext.diagnostics import spectra
from aniso_ext.diagnostics.gap_intervals import Decomposition, GapMoments, gap_intervals
from aniso_ext.diagnostics.intervals import Interval
from aniso_ext.diagnostics.report import Report, Table, checked_bootstrap, emit, report_table
from aniso_ext.diagnostics.rows import choose_device, open_paired
from aniso_ext.errors import InputError

ORTHONORMALITY_TOLERANCE = 1e-2
ROWS_PER_DIMENSION = 4


@dataclass(frozen=True)
class EnergyPoint:
    """E(K): the share of the residual energy in its ``rank`` leading directions, beside the isotropic share K/D."""

    rank: int
    energy: float
    isotropic: float


@dataclass(frozen=True)
class OverlapPoint:
    """O_q: overlap of the ``q`` leading directions of source and target, beside q/D of unrelated ones."""

    q: int
    overlap: float
    baseline: float


@dataclass(frozen=True)
class GapReport(Report):
    """Numbers of METHOD section 1 on ``n`` held-out pairs of ``width`` D; see :func:`gap` for the definitions."""

    n: int
    width: int
    g_mu: float
    g_sigma: float
    g_sigma_abs: float
    c_lambda: float
    c_lambda_count: int
    q: int
    o_q: float
    o_q_baseline: float
    d_center: float
    residual_norm: float
    r_res: float
    r_res_distance: float
    a_r: float
    a_r_isotropic: float
    d_eff: float
    d_eff_ratio: float
    d_eff_ratio_isotropic: float
    eta_u: float
    eta_u_rank: int
    eta_u_baseline: float
    energy: tuple[EnergyPoint, ...]
    source_spectrum: tuple[float, ...]
    target_spectrum: tuple[float, ...]
    residual_spectrum: tuple[float, ...]
    overlap: tuple[OverlapPoint, ...] = ()
    intervals: dict[str, Interval] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def _table(self) -> Table:
        lines = [
            ("G_mu", self.g_mu, "distance of the two means"),
            ("G_Sigma", self.g_sigma, f"relative distance of the covariances (absolute {self.g_sigma_abs:.3g})"),
            ("C_lambda", self.c_lambda, f"correlation of {self.c_lambda_count} log eigenvalues"),
            (f"O_{self.q}", self.o_q, f"overlap of the leading subspaces (unrelated: {self.o_q_baseline:.3f})"),
            ("D_center", self.d_center, "E||r||^2, energy of the residual once the means agree"),
            ("E||r||", self.residual_norm, "its mean length"),
            ("R_res", self.r_res, f"share of E||x - y||^2 (of E||x - y||: {self.r_res_distance:.3f})"),
            ("A_r", self.a_r, f"anisotropy of the residual (isotropic at n: {self.a_r_isotropic:.2f})"),
            ("d_eff/D", self.d_eff_ratio, f"effective dimension (isotropic at n: {self.d_eff_ratio_isotropic:.3f})"),
            ("eta_U", self.eta_u, f"residual within the rank-{self.eta_u_rank} frame (K/D: {self.eta_u_baseline:.3f})"),
        ]
        names = (
            *("g_mu", "g_sigma", "c_lambda", "o_q", "d_center"),
            *("residual_norm", "r_res", "a_r", "d_eff_ratio", "eta_u"),
        )
        shown = [(*line, self.intervals.get(name)) for line, name in zip(lines, names, strict=True)]
        shown += [(f"E({point.rank})", point.energy, f"K/D {point.isotropic:.3f}", None) for point in self.energy]
        return report_table(f"gap of {self.n} pairs, width {self.width}", shown, self.warnings)


def gap(
    source: Any,
    target: Any,
    *,
    q: int | None = None,
    rank: int | None = None,
    basis: Any = None,
    energy_ranks: Sequence[int] | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> GapReport:
    """Measure the modality gap on held-out pairs (METHOD section 1).

    With x_i in ``target``, y_i in ``source``, centred covariances S_x, S_y, and r_i = (x_i - m_x) - (y_i - m_y)::

        g_mu = ||m_x - m_y||            g_sigma = ||S_x - S_y||_F / ||S_x||_F
        c_lambda = corr(log eig S_x, log eig S_y)      o_q = ||U_x,q^T U_y,q||_F^2 / q
        d_center = E||r||^2             r_res = E||r||^2 / E||x - y||^2
        a_r = lambda_max(S_r) D / tr S_r               d_eff_ratio = (tr S_r)^2 / tr(S_r^2) / D
        eta_u = tr(P_U S_r) / tr S_r

    All pairs are read, twice (three times for intervals), in batches: memory is a few [D, D] matrices whatever N is,
    and every sum is float64.

    Args:
        source, target: [N, D] arrays or tensors (float16 to float64, bfloat16), opened embedding sets, or paths;
            row i of both belongs to pair i.
        q: size of the compared subspaces; 128, or D/4 if that is less.
        rank: rank of the frame behind ``eta_u``, spanned by the leading eigenvectors of S_x + S_y; default as ``q``.
        basis: [D, R] orthonormal basis (of a fitted frame) for ``eta_u`` instead.
        energy_ranks: the K of the energy curve; powers of two up to D, and D itself.
        bootstrap: number of resamples behind ``report.intervals``, which then has a 95 % :class:`Interval` for every
            number that depends on the pairs (200 is plenty): of what each pair adds to it in first order, by
            perturbation theory for eigenvalues and subspaces. Those of g_mu, g_sigma and g_sigma_abs are corrected for
            what noise adds to a length, and so may lie below the number itself.
        seed: of the resampling.
        device: "cpu" or "cuda"; None is the device of CUDA inputs, else a GPU if there is one, else the CPU.

    Raises:
        InputError: rows, widths, dtypes or options do not fit, fewer than 3 pairs, or a non-finite row.

    Warns:
        DiagnosticsWarning: too few rows for the width; the texts are also in ``report.warnings``.

    Source: METHOD section 1, table "what diagnostics measures".

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> y = rng.normal(size=(400, 8))
        >>> report = gap(y, y + 0.5)
        >>> round(report.g_mu, 3), round(report.r_res, 3)
        (1.414, 0.0)
    """
    resamples = checked_bootstrap(bootstrap)
    ys, xs = open_paired(minimum=3, source=source, target=target)
    place = choose_device(device, source, target)
    width = ys.width
    default = min(128, max(1, width // 4))
    q = _within("q", default if q is None else q, width)
    ranks = _energy_ranks(energy_ranks, width)
    frame_basis = None if basis is None else _checked_basis(basis, width)
    frame_rank = _within("rank", default if rank is None else rank, width)

    moments = GapMoments.of(ys, xs, place)
    found = Decomposition.of(moments, None if frame_basis is None else frame_basis.to(place), frame_rank)
    source_spectrum, target_spectrum, residual_spectrum = found.source[0], found.target[0], found.residual[0]
    source, target, residual, frame_basis = moments.source, moments.target, moments.residual, found.basis

    energy = float(residual_spectrum.sum())
    g_mu = float(moments.shift.norm())
    g_sigma_abs = float((target - source).norm())
    used = spectra.usable_eigenvalues(target_spectrum, source_spectrum, ys.count)
    shares = residual_spectrum.cumsum(0) / energy
    reached = float((frame_basis * (residual @ frame_basis)).sum())
    warnings = _warnings(ys.count, width, used)
    emit(warnings)
    report = GapReport(
        n=ys.count,
        width=width,
        g_mu=g_mu,
        g_sigma=_ratio(g_sigma_abs, float(target.norm())),
        g_sigma_abs=g_sigma_abs,
        c_lambda=spectra.log_spectrum_correlation(target_spectrum, source_spectrum, used),
        c_lambda_count=used,
        q=q,
        o_q=spectra.subspace_overlap(found.target[1][:, :q], found.source[1][:, :q]),
        o_q_baseline=q / width,
        d_center=energy,
        residual_norm=moments.residual_norm,
        r_res=_ratio(energy, energy + g_mu**2),
        r_res_distance=_ratio(moments.residual_norm, moments.distance),
        a_r=spectra.anisotropy(residual_spectrum),
        a_r_isotropic=spectra.isotropic_anisotropy(ys.count, width),
        d_eff=spectra.effective_dimension(residual_spectrum),
        d_eff_ratio=spectra.effective_dimension(residual_spectrum) / width,
        d_eff_ratio_isotropic=spectra.isotropic_dimension_ratio(ys.count, width),
        eta_u=_ratio(reached, energy),
        eta_u_rank=frame_basis.shape[1],
        eta_u_baseline=frame_basis.shape[1] / width,
        energy=tuple(EnergyPoint(rank, float(shares[rank - 1]), rank / width) for rank in ranks),
        source_spectrum=tuple(source_spectrum.tolist()),
        target_spectrum=tuple(target_spectrum.tolist()),
        residual_spectrum=tuple(residual_spectrum.tolist()),
        overlap=_overlaps(found, q),
        warnings=warnings,
    )
    if resamples == 0:
        return report
    intervals = gap_intervals(report, (ys, xs), moments, found, resamples=resamples, seed=seed)
    return replace(report, intervals=intervals)


def _overlaps(found: Decomposition, q: int) -> tuple[OverlapPoint, ...]:
    """O at powers of two up to D and at q: the squares of one product, summed over its leading corners."""
    width = found.basis.shape[0]
    corners = (found.target[1].T @ found.source[1]).square().cumsum(0).cumsum(1)
    sizes = sorted({2**power for power in range(width.bit_length()) if 2**power <= width} | {q})
    return tuple(OverlapPoint(size, float(corners[size - 1, size - 1]) / size, size / width) for size in sizes)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _within(name: str, value: int, width: int) -> int:
    if not 1 <= value <= width:
        raise InputError(f"{name} must be between 1 and the width {width}, got {value}")
    return int(value)


def _energy_ranks(ranks: Sequence[int] | None, width: int) -> tuple[int, ...]:
    if ranks is None:
        return (*(2**power for power in range(width.bit_length()) if 2**power < width), width)
    return tuple(_within("energy_ranks", rank, width) for rank in ranks)


def _checked_basis(basis: Any, width: int) -> torch.Tensor:
    matrix = torch.as_tensor(basis if isinstance(basis, torch.Tensor) else np.asarray(basis)).detach().cpu().double()
    if matrix.dim() != 2 or matrix.shape[0] != width or not 1 <= matrix.shape[1] <= width:
        raise InputError(f"basis must be [D, R] with D = {width} and R <= D, got shape {list(matrix.shape)}")
    error = float((matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=torch.float64)).abs().max())
    if not error <= ORTHONORMALITY_TOLERANCE:
        raise InputError(f"basis is not orthonormal: |Q^T Q - I| reaches {error:.2e}; pass the basis of a fitted frame")
    return matrix


def _warnings(count: int, width: int, used: int) -> tuple[str, ...]:
    found = []
    if used < width:
        found.append(
            f"only {used} of {width} eigenvalues of the covariances are usable: c_lambda compares those, and subspaces "
            "beyond that rank are arbitrary"
        )
    if count < ROWS_PER_DIMENSION * width:
        found.append(
            f"{count} pairs are few for width {width}: an isotropic residual would read a_r = "
            f"{spectra.isotropic_anisotropy(count, width):.2f} and d_eff/D = "
            f"{spectra.isotropic_dimension_ratio(count, width):.2f} instead of 1"
        )
    return tuple(found)
