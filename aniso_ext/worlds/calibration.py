"""Solve for the population whose measured constants are the wanted ones, or say which inequality forbids it.

Measured means: on ``pairs`` rows. Sampling inflates the participation ratio's denominator, ``||S_x - S_y||_F`` and the
spread of the log spectra, and it turns the leading eigenvectors. Each effect is predicted here and taken off the
population's constant; with ``pairs=None`` the population itself has the constants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aniso_ext.errors import InputError
from aniso_ext.worlds.population import (
    Population,
    Shape,
    Summary,
    build,
    cos2_for_overlap,
    log_correlation,
    spectrum_bias,
    subspace_leak,
    summarise,
)
from aniso_ext.worlds.spherical import PairedMoments, bend_for, bisect, correlation_for, paired_moments

_ROUNDS = 4
_SWEEPS = 60
_LARGEST_STRONG_SHARE = 0.88


@dataclass(frozen=True)
class Wanted:
    """The constants, resolved: every field a number, ``pairs`` None for the population itself."""

    width: int
    q: int
    c_lambda: float
    o_q: float
    g_mu: float
    g_sigma: float
    d_center: float
    a_r: float
    d_eff_ratio: float
    mean_norm: float
    bulk_pairing: float
    pairs: int | None

    @property
    def trace(self) -> float:
        return 1.0 - self.mean_norm**2

    @property
    def top_residual(self) -> float:
        return self.a_r * self.d_center / self.width


@dataclass(frozen=True)
class Corrections:
    """What sampling does, as far as the solver must know it; the defaults are the population's."""

    spectrum_bias: float = 0.0
    difference_noise: float = 0.0
    norm_noise: float = 0.0
    radius_kurtosis: float = 1.0
    radius_product: float = 1.0
    top_inflation: float = 1.0


@dataclass(frozen=True)
class Solution:
    """A population, and the laws of the strong coordinate that give it."""

    population: Population
    summary: Summary
    bend_x: float
    bend_y: float
    strong_correlation: float
    moments: PairedMoments


def solve(wanted: Wanted) -> Solution:
    """The population of a world.

    Raises:
        InputError: no member of the family has the constants; the message names the inequality.
    """
    check_constants(wanted)
    failures: list[InputError] = []
    for shared, drop in _attempts(wanted):
        try:
            return _solve_with(wanted, shared, drop)
        except InputError as error:
            failures.append(error)
    raise failures[0]


def check_constants(wanted: Wanted) -> None:
    """Necessary conditions that need no solving."""
    ratio, top, width = wanted.d_eff_ratio, wanted.a_r, wanted.width
    if not 1.0 < top < width:
        raise InputError(
            f"a_r = {top:g} must lie in (1, width = {width}): lambda_max is between the mean and the trace"
        )
    widest = 1.0 / (top**2 / width + (width - top) ** 2 / (width * (width - 1.0)))
    if not 1.0 / top < ratio < widest:
        raise InputError(
            f"d_eff_ratio = {ratio:g} violates 1/A_r <= d_eff/D <= 1/(A_r²/D + (D - A_r)²/(D(D - 1))), here "
            f"[{1 / top:.4f}, {widest:.4f}] for a_r = {top:g} at width {width}: change a_r (smaller for a small "
            "width) or d_eff_ratio"
        )
    lowest = max(1.0, 2.0 * wanted.q + 1.0 - width) / wanted.q
    if not lowest <= wanted.o_q <= 1.0:
        raise InputError(
            f"o_q = {wanted.o_q:g} violates max(1, 2q - D + 1)/q <= O_q <= 1, here [{lowest:.4f}, 1] for "
            f"q = {wanted.q} at width {width}: one direction is always shared, and two q-dimensional subspaces of a "
            "small space must meet"
        )
    if wanted.mean_norm < 0.5 * wanted.g_mu or wanted.mean_norm >= 1.0:
        raise InputError(
            f"mean_norm = {wanted.mean_norm:g} violates g_mu/2 <= mean_norm < 1 with g_mu = {wanted.g_mu:g}: two means "
            "of that norm cannot be that far apart, or leave no variance"
        )
    if wanted.d_center >= 2.0 * wanted.trace:
        raise InputError(
            f"d_center = {wanted.d_center:g} violates D_center <= tr S_x + tr S_y = 2(1 - mean_norm²) = "
            f"{2 * wanted.trace:.4f}, the value for independent pairs of unit vectors (mean_norm = "
            f"{wanted.mean_norm:g}, at least g_mu/2): lower d_center, g_mu or mean_norm"
        )


def _attempts(wanted: Wanted) -> list[tuple[int, float]]:
    """Numbers of shared directions and cliff heights worth trying, the likeliest first."""
    least = max(0, 2 * wanted.q + 1 - wanted.width)
    most = min(wanted.q - 2, max(least, int(wanted.q * wanted.o_q) - 1))
    middle = (least + most) // 2
    attempts = [(middle, 4.0), (middle, 8.0), ((middle + most) // 2, 4.0), (most, 4.0), (least, 4.0), (most, 8.0)]
    return list(dict.fromkeys(attempts))


def _solve_with(wanted: Wanted, shared: int, drop: float) -> Solution:
    strong = wanted.trace - 0.5 * (wanted.d_center - wanted.top_residual)
    rest = wanted.trace - strong
    shape = Shape(
        width=wanted.width,
        shared=shared,
        planes=wanted.q - 1 - shared,
        trace=wanted.trace,
        strong_x=strong,
        strong_y=strong,
        strong_cross=strong - 0.5 * wanted.top_residual,
        head=min(4.0 * rest / wanted.width, 0.3 * rest / wanted.q),
        boost=2.0,
        cos2=min(1.0, max(0.0, (wanted.q * wanted.o_q - 1 - shared) / (wanted.q - 1 - shared))),
        cliff=0.65,
        split=0.15,
        drop=drop,
        pairing=wanted.bulk_pairing,
    )
    corrections = Corrections()
    if wanted.pairs is not None:
        cross = wanted.trace - 0.5 * wanted.d_center
        corrections = Corrections(difference_noise=2.0 * (wanted.trace**2 - cross**2) / wanted.pairs)
    for step in range(_ROUNDS):
        population_wanted = replace(wanted, a_r=wanted.a_r / corrections.top_inflation)
        shape = _sweep(population_wanted, shape, corrections)
        _refuse_unreached(population_wanted, shape, corrections)
        solution = _strong_laws(population_wanted, shape)
        if step + 1 < _ROUNDS:
            corrections = _corrections(wanted, solution)
    return solution


def _sweep(wanted: Wanted, shape: Shape, corrections: Corrections) -> Shape:
    """Solve one constant at a time, in turn, until nothing moves."""
    shape = replace(shape, pairing=wanted.bulk_pairing * corrections.radius_product)
    samples = None if wanted.pairs is None else wanted.pairs / corrections.radius_kurtosis
    for _ in range(_SWEEPS):
        before = shape
        shape = _fit_traces(wanted, shape)
        shape = replace(shape, cos2=min(1.0, max(0.0, cos2_for_overlap(build(shape), wanted.o_q, samples))))
        shape = _fit_spectra(wanted, shape, corrections)
        shape = _fit_difference(wanted, shape, corrections)
        shape = _fit_participation(wanted, shape)
        moved = max(
            abs(before.head / shape.head - 1.0),
            abs(before.boost / shape.boost - 1.0),
            abs(before.split - shape.split),
            abs(before.cos2 - shape.cos2),
            abs(before.strong_x / shape.strong_x - 1.0),
        )
        if moved < 1e-5:
            break
    return shape


def _fit_traces(wanted: Wanted, shape: Shape) -> Shape:
    """D_center and A_r: the strong direction takes the pairing that the others leave."""
    cross = summarise(build(shape)).cross_trace if shape.pairing else 0.0
    total = 2.0 * wanted.trace - wanted.d_center + wanted.top_residual - 2.0 * cross
    if total <= wanted.top_residual:
        raise InputError(
            f"bulk_pairing = {wanted.bulk_pairing:g} violates tr S_xy = 1 - mean_norm² - D_center/2 = "
            f"{wanted.trace - 0.5 * wanted.d_center:.4f}: the bulk alone pairs {cross:.4f}; lower bulk_pairing "
            "or d_center"
        )
    mean, ceiling = 0.5 * total, _LARGEST_STRONG_SHARE * wanted.trace
    if mean > ceiling:
        least = 2.0 * (wanted.trace - ceiling) + wanted.top_residual
        raise InputError(
            f"d_center = {wanted.d_center:g} violates D_center >= {2 - 2 * _LARGEST_STRONG_SHARE:.2f}(1 - mean_norm²) "
            f"+ lambda_max(S_r) = {least:.4f}: pairs that close would leave nothing outside one direction; raise "
            "d_center or bulk_pairing, or lower a_r"
        )
    half = min(0.5 * (shape.strong_x - shape.strong_y), 0.4 * mean, ceiling - mean)
    return replace(shape, strong_x=mean + half, strong_y=mean - half, strong_cross=0.5 * (total - wanted.top_residual))


def _fit_spectra(wanted: Wanted, shape: Shape, corrections: Corrections) -> Shape:
    """C_lambda: the distance between the two cliffs."""
    target = min(1.0, wanted.c_lambda - corrections.spectrum_bias)

    def shortfall(split: float) -> float:
        population = build(replace(shape, split=split))
        return target - log_correlation(population.variances_x, population.variances_y)

    return replace(shape, split=bisect(shortfall, 0.0, 0.6, steps=22))


def _fit_difference(wanted: Wanted, shape: Shape, corrections: Corrections) -> Shape:
    """G_Sigma: the height of the plane heads; what they cannot carry goes into the two strong variances."""
    population = build(shape)
    summary = summarise(population)
    strong = (shape.strong_x - shape.strong_y) ** 2
    budget = wanted.g_sigma**2 * (summary.norm_x + corrections.norm_noise) - corrections.difference_noise
    feet_x, feet_y = population.bulk_x[population.feet], population.bulk_y[population.feet]
    turned = 2.0 * (1.0 - shape.cos2) * float(((shape.head - feet_x) * (shape.head - feet_y)).sum())
    left = budget - (summary.difference - strong - turned)
    foot = 0.5 * float(feet_x.mean() + feet_y.mean())
    scale = np.sqrt(max(left, 0.0) / turned) if turned > 0 else 4.0
    head = foot + (shape.head - foot) * float(np.clip(scale, 0.25, 4.0))
    heads = shape.planes + float((shape.boost ** (1.0 - np.arange(shape.shared) / max(1, shape.shared))).sum())
    head = min(head, _head_ceiling(wanted, shape), 0.85 * (shape.trace - shape.strong_x) / heads)
    shape = replace(shape, head=max(head, 0.1 * shape.head))
    carried = 2.0 * (1.0 - shape.cos2) * float(((shape.head - feet_x) * (shape.head - feet_y)).sum())
    half = 0.5 * np.sqrt(max(0.0, left - carried))
    mean = 0.5 * (shape.strong_x + shape.strong_y)
    half = (
        min(half, 0.4 * mean, _LARGEST_STRONG_SHARE * wanted.trace - mean)
        if half > 0.01 * wanted.g_sigma * mean
        else 0.0
    )
    return replace(shape, strong_x=mean + half, strong_y=mean - half)


def _head_ceiling(wanted: Wanted, shape: Shape) -> float:
    """The head at which flat shared directions use up tr S_r², at most 12 plateaus: more separates no better."""

    def excess(head: float) -> float:
        return summarise(build(replace(shape, head=head, boost=1.0))).residual_square - _residual_square(wanted)

    top = 0.85 * (shape.trace - shape.strong_x) / (shape.planes + shape.shared)
    plateau = build(replace(shape, boost=1.0)).bulk_x[0]
    return min(bisect(excess, 0.02 * top, top, steps=22), 12.0 * plateau)


def _residual_square(wanted: Wanted) -> float:
    """The population's tr S_r²: sampling adds about (tr S_r)²/n to it."""
    square = wanted.d_center**2 / (wanted.d_eff_ratio * wanted.width)
    return square if wanted.pairs is None else square - wanted.d_center**2 / wanted.pairs


def _fit_participation(wanted: Wanted, shape: Shape) -> Shape:
    """d_eff: how far the shared directions rise above the plane heads, as long as lambda_max stays the strong one."""
    if not shape.shared:
        return shape

    def shortfall(boost: float) -> float:
        return summarise(build(replace(shape, boost=boost))).residual_square - _residual_square(wanted)

    ceiling = 0.9 * wanted.top_residual / (2.0 * shape.head * (1.0 - shape.pairing))
    return replace(shape, boost=bisect(shortfall, 1.0, max(1.0, ceiling), steps=22))


def _refuse_unreached(wanted: Wanted, shape: Shape, corrections: Corrections) -> None:
    """Compare what the sweeps reached with what they were after; name the inequality that stands in the way."""
    population = build(shape)
    summary = summarise(population)
    at = "in the population" if wanted.pairs is None else f"on {wanted.pairs} pairs"
    if not _near(summary.residual_square, _residual_square(wanted), 0.01):
        reached = wanted.d_center**2 / summary.residual_square / wanted.width
        raise InputError(
            f"d_eff_ratio = {wanted.d_eff_ratio:g} cannot be reached with a_r = {wanted.a_r:g} and q = {wanted.q}: "
            f"(tr S_r)² = d_eff tr S_r² with every other eigenvalue below lambda_max gives {reached:.4f} at the "
            "nearest; move d_eff_ratio towards it, or change a_r, q or g_sigma"
        )
    norm = summary.norm_x + corrections.norm_noise
    difference = summary.difference + corrections.difference_noise
    if not _near(difference, wanted.g_sigma**2 * norm, 0.02):
        nearest, noise = np.sqrt(difference / norm), np.sqrt(corrections.difference_noise / norm)
        raise InputError(
            f"g_sigma = {wanted.g_sigma:g} violates G_Sigma² ||S_x||²_F = difference of the spectra + turned planes + "
            f"2((tr S_x)² - E(x~.y~)²)/n {at}: the nearest is {nearest:.4f}, of which sampling alone makes {noise:.4f}"
            "; move g_sigma towards it, or change pairs or d_center"
        )
    _refuse_blurred(wanted, population, corrections, at)
    reached = log_correlation(population.variances_x, population.variances_y) + corrections.spectrum_bias
    if abs(reached - wanted.c_lambda) > 0.01:
        raise InputError(
            f"c_lambda = {wanted.c_lambda:g} cannot be reached {at}: spectra with these traces and a shared head have "
            f"C_lambda = {reached:.3f} at the nearest; move c_lambda towards it or raise pairs"
        )


def _refuse_blurred(wanted: Wanted, population: Population, corrections: Corrections, at: str) -> None:
    """The top-q subspaces must stand out: by any gap in the population, by a visible one in a sample."""
    plateau = max(population.bulk_x[0], population.bulk_y[0])
    gap = population.shape.head - plateau
    visible = gap > 0.0
    if visible and wanted.pairs is not None:
        samples = wanted.pairs / corrections.radius_kurtosis
        sides = ((population.top_x, population.bulk_x), (population.top_y, population.bulk_y))
        visible = min(float(subspace_leak(top, bulk, samples)[0].mean()) for top, bulk in sides) > 0.85
    if not visible:
        raise InputError(
            f"o_q = {wanted.o_q:g}, g_sigma = {wanted.g_sigma:g} and d_eff_ratio = {wanted.d_eff_ratio:g} leave no "
            "visible eigengap: 2q(1 - O_q)(lambda_q - lambda_q+1)² <= G_Sigma² ||S_x||²_F and tr S_r² = (tr S_r)²/d_eff"
            f" leave lambda_q - lambda_q+1 = {gap:.3g} over a bulk at {plateau:.3g}, too little {at}; raise g_sigma, "
            "o_q or pairs, or lower d_eff_ratio"
        )


def _near(reached: float, target: float, tolerance: float) -> bool:
    return abs(reached - target) <= tolerance * abs(target)


def _strong_laws(wanted: Wanted, shape: Shape) -> Solution:
    """The bounded laws of the strong coordinate whose second moments are the strong variances and their covariance."""
    population = build(shape)
    along_x, along_y = (1.0 - wanted.mean_norm**2 - bulk[0] for bulk in (population.bulk_x, population.bulk_y))
    bend_x, bend_y = bend_for(shape.strong_x / along_x), bend_for(shape.strong_y / along_y)
    scale = float(np.sqrt(along_x * along_y))
    correlation = correlation_for(bend_x, bend_y, shape.strong_cross / scale)
    moments = paired_moments(bend_x, bend_y, correlation)
    if not _near(moments.product * scale, shape.strong_cross, 0.01):
        raise InputError(
            f"g_sigma = {wanted.g_sigma:g} violates (sqrt(l_x) - sqrt(l_y))² <= lambda_max(S_r) in the strong "
            f"direction (variances {shape.strong_x:.4f}, {shape.strong_y:.4f}; a_r asks for {wanted.top_residual:.4f}"
            "): lower g_sigma or raise a_r"
        )
    return Solution(population, summarise(population), bend_x, bend_y, correlation, moments)


def _corrections(wanted: Wanted, solution: Solution) -> Corrections:
    """Predict what ``pairs`` rows add to each constant (docs/simulator.md)."""
    shape, moments = solution.population.shape, solution.moments
    trace = wanted.trace
    unit_x, unit_y = shape.strong_x / trace, shape.strong_y / trace
    product = moments.rest_product / np.sqrt((1.0 - unit_x) * (1.0 - unit_y))
    if wanted.pairs is None:
        return Corrections(radius_product=product)
    self_moments = paired_moments(solution.bend_x, solution.bend_x, 1.0)
    kurtosis = self_moments.rest_squares / (1.0 - unit_x) ** 2
    x, y = solution.population.variances_x, solution.population.variances_y
    cross = shape.strong_cross + solution.summary.cross_trace
    inner = trace**2 * moments.squares + cross**2 - shape.strong_cross**2 + float(x[1:] @ y[1:])
    samples = wanted.pairs / kurtosis
    top, others = np.split(np.sort(solution.summary.residual)[::-1], [1])
    return Corrections(
        spectrum_bias=spectrum_bias(x, y, samples),
        difference_noise=(2.0 * (trace**2 - inner) - solution.summary.difference) / wanted.pairs,
        norm_noise=(trace**2 - solution.summary.norm_x) / wanted.pairs,
        radius_kurtosis=kurtosis,
        radius_product=product,
        top_inflation=1.0 + float((others / (top - others)).sum()) / wanted.pairs,
    )
