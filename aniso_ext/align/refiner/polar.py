"""L_II and L_Phi of phases and radii together with their gradient to the deltas, without autograd.

The formulas are those of :mod:`aniso_ext.align.refiner.losses` and of the prior's objective. What reads a phase is
periodic, so that none is wrapped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from aniso_ext.align.prior.prior import STANDARDISED_LIMIT
from aniso_ext.align.refiner.bounds import Bounds
from aniso_ext.align.refiner.losses import WEIGHT_FLOOR

if TYPE_CHECKING:
    from aniso_ext.align.prior import PhasePrior
    from aniso_ext.align.prior.frozen import FrozenScore

Tensors = tuple[torch.Tensor, ...]
_TURN = 2 * math.pi


@dataclass(frozen=True)
class PolarSums:
    """Of some rows: sums of the losses, of cos and sin theta^ [M], and the gradient to dtheta and drho [n, 2M]."""

    consistency: torch.Tensor | None
    score: torch.Tensor | None
    units: torch.Tensor
    gradient: torch.Tensor | None


class PolarLosses:
    """Both losses as functions of states and deltas.

    Args:
        prior: frozen.
        adjacency: [M, M] of the edges.
        bounds: of the update.
        consistency_weight, score_weight: factors of the sums over rows in the gradient; None switches a loss off.
        frozen: the prior's network.
        compiled: whether torch.compile fuses the elementwise parts.
    """

    def __init__(
        self,
        prior: PhasePrior,
        adjacency: torch.Tensor,
        bounds: Bounds,
        *,
        consistency_weight: float | None,
        score_weight: float | None,
        frozen: FrozenScore,
        compiled: bool = False,
    ) -> None:
        self.bounds, self.adjacency, self.frozen = bounds, adjacency, frozen
        self.consistency_weight, self.score_weight = consistency_weight, score_weight
        self.matrix, self.offset = prior.graph.matrices(adjacency)
        self.tau, self.spread = prior.graph.step, prior.network.spread
        self.mean, self.std = prior.log_radius_mean.float(), prior.log_radius_std.float()
        self._update, self._consistency, self._noisy, self._error, self._back = _parts(compiled)

    def __call__(
        self, polar: torch.Tensor, angles: torch.Tensor, draws: tuple[torch.Tensor, torch.Tensor] | None, wanted: bool
    ) -> PolarSums:
        """Of some rows.

        Args:
            polar: [n, 3M], first columns of the state.
            angles: [n, 2M], first columns of the deltas.
            draws: scale [n, 1] and noise [n, M] of the prior's objective.
            wanted: whether the gradient is.
        """
        theta, log_radius, turn, slopes, units = self._update(polar, angles, self.bounds.a_theta, self.bounds.a_rho)
        consistency = noisy = to_turn = to_radius = None
        if self.consistency_weight is not None:
            consistency, pull = self._consistency(turn, polar, self.adjacency)
            to_turn = self.consistency_weight * pull
        if draws is not None and self.score_weight is not None:
            noisy, to_theta, to_radius = self._noisy_loss(theta, log_radius, draws, wanted)
            if to_theta is not None:
                to_turn = to_theta if to_turn is None else to_turn.add_(to_theta)
        gradient = None
        if wanted:
            blocks = turn.shape[1]
            gradient = torch.zeros_like(slopes)
            if to_turn is not None:
                gradient[:, :blocks] = to_turn
            if to_radius is not None:
                gradient[:, blocks:] = to_radius
            gradient *= slopes
        return PolarSums(consistency, noisy, units, gradient)

    def _noisy_loss(self, theta: torch.Tensor, log_radius: torch.Tensor, draws: Any, wanted: bool) -> Any:
        """The prior's objective, summed, and its gradients to theta^ and log rho^ under its weight."""
        scale, noise = draws
        cos, sin, pull = _direction(theta, self.matrix, self.offset)
        phi, slope, inside, inputs = self._noisy(
            theta, cos, sin, pull, log_radius, scale, noise, self.mean, self.std, self.tau
        )
        condition = self.frozen.condition(scale)
        uv, kept = self.frozen.forward(inputs.to(self.frozen.dtype), condition)
        total, to_uv, direct = self._error(uv, phi, scale, noise, self.spread, self.score_weight)
        if not wanted:
            return total, None, None
        to_inputs = self.frozen.backward(to_uv.to(uv.dtype), condition, kept)
        to_phi, around, to_radius = self._back(to_inputs, direct, phi, cos, sin, inside, self.tau)
        to_cos, to_sin = (around @ self.matrix.T).chunk(2, dim=1)
        return total, torch.addcmul(to_phi * slope, cos, to_sin).addcmul_(sin, to_cos, value=-1), to_radius


@functools.cache
def _parts(compiled: bool) -> tuple[Callable[..., Tensors], ...]:
    parts = (_update, _consistency, _noisy, _error, _back)
    return tuple(torch.compile(part, dynamic=False) for part in parts) if compiled else parts


def _direction(theta: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> Tensors:
    cos, sin = theta.cos(), theta.sin()
    return cos, sin, torch.addmm(offset, torch.cat((cos, sin), dim=1), matrix)


def _update(polar: torch.Tensor, angles: torch.Tensor, a_theta: float, a_rho: float) -> Tensors:
    """theta^, log rho^, the turn, the slopes of turn and stretch in the deltas, and the sums of cos and sin theta^."""
    sin, cos, log_radius = polar.float().chunk(3, dim=1)
    turn, stretch = angles.float().tanh().chunk(2, dim=1)
    slopes = torch.cat((a_theta * (1 - turn * turn), a_rho * (1 - stretch * stretch)), dim=1)
    turn = a_theta * turn
    theta = torch.atan2(sin, cos) + turn
    units = torch.stack((theta.cos().sum(dim=0), theta.sin().sum(dim=0)))
    return theta, log_radius + a_rho * stretch, turn, slopes, units


def _consistency(turn: torch.Tensor, polar: torch.Tensor, edges: torch.Tensor) -> Tensors:
    """L_Phi without the 1/|E| of the printed form, summed over the rows, and its gradient to the turns.

    With h = rho (1 - cos d), g = rho sin d and edges A, a row costs (2 h.(A rho) - h.(A h) - g.(A g))/(rho.(A rho));
    dh/dd = g, dg/dd = rho - h.
    """
    radius = polar.float().chunk(3, dim=1)[2].exp()
    heavy, sine = radius * (2 * (turn / 2).sin() ** 2), radius * turn.sin()
    reached, of_heavy, of_sine = radius @ edges, heavy @ edges, sine @ edges
    total = (radius * reached).sum(dim=1, keepdim=True).clamp_min(WEIGHT_FLOOR)
    spread = (2 * heavy * reached - heavy * of_heavy - sine * of_sine).sum(dim=1, keepdim=True)
    slope = 2 * (sine * (reached - of_heavy) - (radius - heavy) * of_sine) / total
    return (spread / total).sum(), slope


def _noisy(
    theta: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pull: torch.Tensor,
    log_radius: torch.Tensor,
    scale: torch.Tensor,
    noise: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    tau: float,
) -> Tensors:
    """Noisy phases, the slope of the drifted phase in its own, that of the radii's input, the network's inputs."""
    real, imag = pull.chunk(2, dim=1)
    phi = theta - tau * (sin * real - cos * imag) + scale * noise
    slope = 1 - tau * (cos * real + sin * imag)
    radii = (log_radius - mean) / std
    clamped = radii.clamp(-STANDARDISED_LIMIT, STANDARDISED_LIMIT)
    inside = (radii == clamped) / std
    return phi, slope, inside, torch.cat((phi.sin(), phi.cos(), clamped), dim=1)


def _error(
    uv: torch.Tensor, phi: torch.Tensor, scale: torch.Tensor, noise: torch.Tensor, spread: torch.Tensor, weight: float
) -> Tensors:
    """The summed objective, its gradient to (u, v), and that to phi through the sines outside of the network."""
    u, v = uv.float().chunk(2, dim=1)
    cos, sin = phi.cos(), phi.sin()
    size = torch.rsqrt(scale * scale + spread * spread)
    error = scale * ((v * cos - u * sin) * size - wrapped_score(scale * noise, scale))
    grad = 2 * weight * scale * size * error
    return (error * error).sum(), torch.cat((-grad * sin, grad * cos), dim=1), -grad * (v * sin + u * cos)


def wrapped_score(shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """:func:`aniso_ext.align.prior.wrapped_normal.score` at any distance, as images enter it relative to the nearest.

    -(d + 2 pi (w - w')/(1 + w + w'))/s^2, d in [-pi, pi], w = exp(-2 pi (pi + d)/s^2), w' = exp(-2 pi (pi - d)/s^2).
    """
    nearest = shift - _TURN * torch.round(shift / _TURN)
    squared = scale * scale
    rate = _TURN / squared
    above, below = (-(math.pi + nearest) * rate).exp(), (-(math.pi - nearest) * rate).exp()
    return -(nearest + _TURN * (above - below) / (1 + above + below)) / squared


def _back(
    to_inputs: torch.Tensor,
    direct: torch.Tensor,
    phi: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inside: torch.Tensor,
    tau: float,
) -> Tensors:
    """Gradients to phi, to the two sums that the drift is made of, and to log rho^."""
    to_sin, to_cos, to_radii = to_inputs.float().chunk(3, dim=1)
    to_phi = direct + to_sin * phi.cos() - to_cos * phi.sin()
    drift = tau * to_phi
    return to_phi, torch.cat((-drift * sin, drift * cos), dim=1), to_radii * inside
