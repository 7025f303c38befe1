"""Phases drawn from the learned prior, and how they compare with the target's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from aniso_ext.align.prior.prior import PhasePrior
from aniso_ext.align.prior.wrapped_normal import LARGEST_SCALE, SMALLEST_SCALE, wrap
from aniso_ext.errors import InputError
from aniso_ext.stats import PhaseMoments

LEVELS = 40
MIXING_STEPS = 100
MIXING_STEP = (0.3, 0.01)
"""First and last Langevin step at the largest noise: long ones mix, short ones take their own bias away."""
CHUNK_ROWS = 8192


def sample_phases(
    prior: PhasePrior,
    log_rho: torch.Tensor,
    generator: torch.Generator,
    *,
    levels: int = LEVELS,
) -> torch.Tensor:
    """Draw clean phases given log radii.

    Uniform phases are mixed by Langevin steps at s = 1.5, carried down a geometric schedule to s = 0.03 by the
    probability flow dx = -score(x, s) d(s^2)/2 (Heun's second-order steps), denoised by x <- x + s^2 score(x, s), and
    taken back through the drift map. A function of the generator's state.

    Args:
        prior: fitted.
        log_rho: [n, M] log radii to condition on, on the device of the prior; target ones, or another corpus's.
        generator: on the same device.
        levels: noise levels of the schedule, at least 2.

    Returns:
        theta [n, M] in [-pi, pi), dtype and device of ``log_rho``.

    Raises:
        InputError: the shape of ``log_rho`` or the number of levels does not fit.
    """
    if log_rho.dim() != 2 or log_rho.shape[1] != prior.phases or not log_rho.is_floating_point():
        raise InputError(f"log_rho must be floating [n, {prior.phases}], got {log_rho.dtype} {list(log_rho.shape)}")
    if levels < 2:
        raise InputError(f"levels must be at least 2, got {levels}")
    if len(log_rho) == 0:
        return torch.empty_like(log_rho)
    with torch.no_grad():
        return torch.cat([_sample(prior, chunk, generator, levels) for chunk in log_rho.split(CHUNK_ROWS)])


def _sample(prior: PhasePrior, log_rho: torch.Tensor, generator: torch.Generator, levels: int) -> torch.Tensor:
    def noise() -> torch.Tensor:
        return torch.randn(log_rho.shape, generator=generator, device=log_rho.device, dtype=log_rho.dtype)

    uniform = torch.rand(log_rho.shape, generator=generator, device=log_rho.device, dtype=log_rho.dtype)
    phi = (2 * uniform - 1) * math.pi
    for step in np.geomspace(*MIXING_STEP, MIXING_STEPS).tolist():
        phi = phi + step * prior.score(phi, log_rho, LARGEST_SCALE) + math.sqrt(2 * step) * noise()
    for upper, lower in pairwise(np.geomspace(LARGEST_SCALE, SMALLEST_SCALE, levels).tolist()):
        step = (upper**2 - lower**2) / 2
        slope = prior.score(phi, log_rho, upper)
        phi = phi + step * (slope + prior.score(phi + step * slope, log_rho, lower)) / 2
    phi = phi + SMALLEST_SCALE**2 * prior.score(phi, log_rho, SMALLEST_SCALE)
    return prior.graph.inverse_mean_map(wrap(phi))


@dataclass(frozen=True)
class PhaseComparison:
    """How far two sets of phases differ in E e^{i theta_k} and E e^{i (theta_k - theta_l)}, k < l.

    Attributes:
        resultant_rms, resultant_max: of |difference| over the M marginals.
        coupling_rms, coupling_max: of |difference| over the M(M - 1)/2 pairs; 0 for one block.
        resultant_noise, coupling_noise: the rms that two samples of these sizes from one density show:
            E|difference|^2 = (1 - |m|^2)(1/n + 1/n').
    """

    resultant_rms: float
    resultant_max: float
    coupling_rms: float
    coupling_max: float
    resultant_noise: float
    coupling_noise: float


def compare_phases(samples: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> PhaseComparison:
    """Compare drawn phases [n, M] with target phases [n', M].

    Example:
        >>> import torch
        >>> theta = torch.linspace(-3, 3, 50).repeat(2, 1).T
        >>> compare_phases(theta, theta).coupling_max
        0.0
    """
    drawn, wanted = _moments(samples), _moments(target)
    if drawn.blocks != wanted.blocks:
        raise InputError(f"samples have {drawn.blocks} phases and the target {wanted.blocks}")
    pairs = np.triu_indices(wanted.blocks, k=1)
    rates = 1 / drawn.count + 1 / wanted.count
    resultant = _difference(drawn.first, wanted.first, rates)
    coupling = _difference(drawn.second[pairs], wanted.second[pairs], rates)
    return PhaseComparison(
        resultant_rms=resultant[0],
        resultant_max=resultant[1],
        coupling_rms=coupling[0],
        coupling_max=coupling[1],
        resultant_noise=resultant[2],
        coupling_noise=coupling[2],
    )


def _moments(phases: torch.Tensor | np.ndarray) -> PhaseMoments:
    array = phases.detach().double().cpu().numpy() if isinstance(phases, torch.Tensor) else np.asarray(phases)
    if array.ndim != 2 or len(array) == 0:
        raise InputError(f"phases must be [n, M] with at least one row, got shape {list(array.shape)}")
    return PhaseMoments(array.shape[1]).update(array)


def _difference(drawn: np.ndarray, wanted: np.ndarray, rates: float) -> tuple[float, float, float]:
    if not len(wanted):
        return 0.0, 0.0, 0.0
    size = np.abs(drawn - wanted)
    noise = np.clip(1 - np.abs(wanted) ** 2, 0, None) * rates
    return float(np.sqrt((size**2).mean())), float(size.max()), float(np.sqrt(noise.mean()))
