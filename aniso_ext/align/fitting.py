"""Fitting the frame: subspace, radius maps, complement scale and calibration mean, streamed (METHOD 2 and 4)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aniso_ext.align.mixing import mixing_matrix
from aniso_ext.align.moments import SideMoments, full_moments
from aniso_ext.align.rows import Rows
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame
from aniso_ext.stats import RadiusSketch

RADIUS_EPS = 1e-12
RIDGE = 1e-4
RATIO_LIMITS = (0.25, 4.0)
SLOPE_LIMIT = 16.0
"""Steepest slope of a radius map, in units of the block's overall ratio of target to source radii."""
NEGLIGIBLE_STD = 1e-6
"""Share of the overall deviation below which the complement counts as constant: what is left when variances cancel."""


@dataclass(frozen=True)
class FrameOptions:
    """What :func:`fit_frame` may be told; the names are those of AnisoAlign."""

    rank: int | float
    mixing: str
    complement: str
    knots: int
    seed: int
    center: bool = False
    slope_limit: float | None = SLOPE_LIMIT
    device: torch.device | str | None = None


@dataclass(frozen=True)
class Subspace:
    """Top eigenvectors of S_J, before mixing, and the shares of energy they hold."""

    basis: torch.Tensor
    energies: torch.Tensor
    shares: dict[str, float]


def check_rank(rank: Any) -> None:
    """Refuse a rank that is neither an even integer of at least 2 nor an energy share in (0, 1]."""
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise InputError(f"rank as an energy share must be above 0 and at most 1, got {rank}")
        return
    try:
        value = -1 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        value = -1
    if value < 2 or value % 2:
        raise InputError(f"rank must be an even integer of at least 2 or an energy share like 0.9, got {rank!r}")


def resolve_rank(rank: int | float, energies: torch.Tensor) -> int:
    """R: the rank itself, or the smallest even number of eigenvalues (falling, [D]) that hold the energy share."""
    width = len(energies)
    if not isinstance(rank, float):
        if rank > width:
            raise InputError(
                f"rank {rank} is above the width {width} of the embeddings: choose at most {width - width % 2}"
            )
        return int(rank)
    reached = energies.cumsum(0) >= rank * energies.sum() * (1 - 1e-12)
    needed = int(reached.nonzero()[0]) + 1
    resolved = needed + needed % 2
    if resolved > width:
        raise InputError(
            f"an energy share of {rank} needs {needed} of {width} directions, and R is even: lower the share"
        )
    return resolved


def fit_subspace(source: SideMoments, target: SideMoments, rank: int | float) -> Subspace:
    """Top-R eigenvectors of S_J = S_source + S_target, each with its largest coordinate positive (METHOD D1, D2)."""
    joint = source.covariance + target.covariance
    values, vectors = torch.linalg.eigh(joint)
    energies, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if float(energies[0]) <= 0:
        raise InputError("all rows of each side are equal: there is no subspace to fit")
    resolved = resolve_rank(rank, energies)
    basis = vectors[:, :resolved]
    largest = basis.abs().argmax(dim=0)
    basis = basis * basis[largest, torch.arange(resolved)].sign()

    def share(moments: SideMoments) -> float:
        inside = float((basis * (moments.covariance @ basis)).sum())
        return inside / moments.trace if moments.trace > 0 else 0.0

    shares = {
        "coverage": float(energies[:resolved].sum() / energies.sum()),
        "coverage_source": share(source),
        "coverage_target": share(target),
        "ridge": RIDGE * float(joint.trace()) / len(joint),
    }
    return Subspace(basis, energies[:resolved], shares)


def complement_std(moments: SideMoments, basis: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each ambient coordinate of the part of the rows outside the basis, [D]."""
    product = moments.covariance @ basis
    inner = basis.T @ product
    variance = moments.covariance.diagonal() - 2 * (basis * product).sum(1) + ((basis @ inner) * basis).sum(1)
    return variance.clamp_min(0).sqrt()


def complement_scale(source: SideMoments, target: SideMoments, basis: torch.Tensor, complement: str) -> torch.Tensor:
    """s_V as [1], or the diagonal of D_V as [D] (METHOD D10); 1 where the source does not vary."""
    source_std, target_std = complement_std(source, basis), complement_std(target, basis)
    floor = NEGLIGIBLE_STD * source.trace**0.5
    if complement == "scalar":
        source_std, target_std = source_std.norm(keepdim=True), target_std.norm(keepdim=True)
    varies = source_std > floor
    ratio = torch.where(varies, target_std / torch.where(varies, source_std, 1), 1)
    return ratio.clamp(*RATIO_LIMITS) if complement == "diagonal_projected" else ratio


def radius_knots(
    rows: Rows, shift: torch.Tensor, basis: torch.Tensor, knots: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """K quantiles of the block radii of the rows plus ``shift``, [M, K], streamed, products on ``device`` (D9)."""
    place = torch.device("cpu" if device is None else device)
    shift, basis = shift.to(place), basis.to(place)
    sketch = RadiusSketch(basis.shape[1] // 2)
    for batch in rows.exact_batches(place):
        coordinates = (batch + shift) @ basis
        squared = coordinates[:, 0::2] ** 2 + coordinates[:, 1::2] ** 2
        sketch.update((squared + RADIUS_EPS).sqrt().cpu().numpy())
    return torch.from_numpy(rows.merged(sketch).knots(knots))


def limit_slope(source_knots: torch.Tensor, target_knots: torch.Tensor, limit: float) -> torch.Tensor:
    """Target knots [M, K] of the map closest in level to T_k whose slope is at most ``limit`` times the block's ratio.

    Copies among the source rows put an atom into F_source, where T_k = F_target^-1 o F_source jumps: a radius that is
    right to one rounding error would land anywhere in the jump. The mean of the largest map below T_k and the smallest
    one above it that keep the slope crosses an isolated jump at its middle and equals T_k where that is not steep.
    """
    overall = target_knots.mean(dim=1, keepdim=True) / source_knots.mean(dim=1, keepdim=True)
    spread = (target_knots[:, -1:] - target_knots[:, :1]) / (source_knots[:, -1:] - source_knots[:, :1])
    slope = limit * spread.clamp(min=overall, max=16 * overall)
    # The map starts at (0, 0), below the first knot too (METHOD D9).
    source_points = torch.nn.functional.pad(source_knots, (1, 0))
    excess = torch.nn.functional.pad(target_knots, (1, 0)) - slope * source_points
    below = excess.cummin(dim=1).values
    above = excess.flip(1).cummax(dim=1).values.flip(1)
    limited = (slope * source_points + (below + above) / 2)[:, 1:]
    # Where nothing is steep the knots stay as they are, to the last bit; rounding must not undo the order.
    return torch.where(below[:, 1:] == above[:, 1:], target_knots, limited).cummax(dim=1).values


def mix(
    target: Rows, origin: torch.Tensor, subspace: Subspace, options: FrameOptions
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mixed basis [D, R] and the summary of a learned mixing, which takes one more pass over the target."""
    mixing = mixing_matrix(options.mixing, subspace.energies, options.seed)
    summary: dict[str, Any] = {}
    if options.mixing == "phase_stable":
        from aniso_ext.align.phase_stable import learn_mixing, target_coordinates

        coordinates = target_coordinates(target, origin, subspace.basis, seed=options.seed)
        mixing, summary = learn_mixing(coordinates, mixing, seed=options.seed)
    return (subspace.basis @ mixing).contiguous(), summary


def fit_frame(source: Rows, target: Rows, options: FrameOptions) -> tuple[Frame, dict[str, Any]]:
    """An uncalibrated frame in float64 and the numbers of the fit; two passes over each side."""
    source_moments, target_moments, summary = full_moments(source, target, options.device)
    subspace = fit_subspace(source_moments, target_moments, options.rank)
    origin = target_moments.mean if options.center else torch.zeros_like(target_moments.mean)
    basis, mixing_summary = mix(target, origin, subspace, options)
    basis = target.agreed(basis)
    shift = target_moments.mean - source_moments.mean - origin
    source_knots = radius_knots(source, shift, basis, options.knots, options.device)
    target_knots = radius_knots(target, -origin, basis, options.knots, options.device)
    if options.slope_limit is not None:
        target_knots = limit_slope(source_knots, target_knots, options.slope_limit)
    frame = Frame(
        source_mean=source_moments.mean,
        target_mean=target_moments.mean,
        basis=basis,
        radius_source_knots=source_knots,
        radius_target_knots=target_knots,
        complement_scale=complement_scale(source_moments, target_moments, basis, options.complement),
        complement=options.complement,
        center=options.center,
    )
    summary |= {"rank": frame.rank, **subspace.shares, **mixing_summary}
    if options.complement == "scalar":
        summary["complement_scale"] = float(frame.complement_scale)
    else:
        summary["complement_scale_smallest"] = float(frame.complement_scale.min())
        summary["complement_scale_largest"] = float(frame.complement_scale.max())
    return frame.validate(), summary


def calibrate(
    frame: Frame,
    source: Rows,
    correct: Callable[[torch.Tensor, Frame], torch.Tensor],
    *,
    iterations: int,
    measure: bool = True,
) -> tuple[Frame, dict[str, Any]]:
    """Add m_hat, the mean of e' over the rows (METHOD D17), with optional fixed-point steps on |mean(e) - m_t|.

    A step m_hat <- m_hat + mean(e) - m_t makes up for what the second normalisation moves. One pass for the mean, one
    for each step, and one more to ``measure`` the error that is left.
    """

    def mean(frame: Frame) -> torch.Tensor:
        return source.mean(lambda batch: correct(batch, frame))

    output_mean = mean(frame.with_output_mean(None))
    errors = [float((output_mean - frame.target_mean).norm())]
    for step in range(iterations + int(measure)):
        offset = mean(frame.with_output_mean(output_mean)) - frame.target_mean
        errors.append(float(offset.norm()))
        if step < iterations:
            output_mean = output_mean + offset
    record = {"calibration_error_before": errors[0], "calibration_error_after": errors[-1]}
    return frame.with_output_mean(output_mean), record if measure else {}
