"""The objectives of Stage II that are not the prior's: phase consistency, eq. (9), and that of the complement (D15)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aniso_ext.align.refiner.bounds import Bounds
from aniso_ext.errors import InputError

WEIGHT_FLOOR = 1e-30


@dataclass(frozen=True)
class PolarUpdate:
    """A bounded update of the phases and radii of n rows, with gradients to the deltas (METHOD section 4).

    ``theta0`` [n, M] is a constant of the data, so that theta^ = theta0 + turn needs no derivative of atan2; ``turn`` =
    a_theta tanh(dtheta) and ``log_radius`` = log rho0 + a_rho tanh(drho) are [n, M], ``radius0`` = rho0 is [n, M].
    """

    theta0: torch.Tensor
    turn: torch.Tensor
    radius0: torch.Tensor
    log_radius: torch.Tensor

    @property
    def theta(self) -> torch.Tensor:
        """theta^ [n, M]; not wrapped, as everything that reads it is periodic."""
        return self.theta0 + self.turn


@dataclass(frozen=True)
class Update(PolarUpdate):
    """The update of whole rows: ``v0`` and ``move`` are [n, D], with v^ = v0 + move in V.

    What ``move`` has outside V, before the projection of the default order, is invisible to directions in V.
    """

    v0: torch.Tensor
    move: torch.Tensor


def polar_update(polar: torch.Tensor, deltas: torch.Tensor, bounds: Bounds) -> PolarUpdate:
    """The update of phases and radii: ``polar`` [n, 3M] and ``deltas`` [n, 2M], first columns of state and deltas."""
    sin, cos, log_radius = polar.detach().chunk(3, dim=1)
    turn, stretch = deltas.chunk(2, dim=1)
    return PolarUpdate(
        theta0=torch.atan2(sin, cos),
        turn=bounds.a_theta * turn.tanh(),
        radius0=log_radius.exp(),
        log_radius=log_radius + bounds.a_rho * stretch.tanh(),
    )


def bounded_update(
    state: torch.Tensor, deltas: torch.Tensor, basis: torch.Tensor, bounds: Bounds, *, literal: bool = False
) -> Update:
    """The update that :func:`aniso_ext.ops.decode` rebuilds, before it is rebuilt.

    Args:
        state: [n, 3M + D], output of :func:`aniso_ext.ops.encode`; a constant here.
        deltas: [n, 2M + D], output of the refiner.
        basis: Q, [D, R].
        bounds: a_theta, a_rho and a_v.
        literal: (I - QQ^T) before the tanh, as printed (METHOD D11).
    """
    width, rank = basis.shape
    polar, v0 = state.detach().split((3 * rank // 2, width), dim=1)
    angles, move = deltas.split((rank, width), dim=1)
    if literal:
        move = move - move @ basis @ basis.T
    return Update(**vars(polar_update(polar, angles, bounds)), v0=v0, move=bounds.a_v * move.tanh())


def phase_consistency(
    turn: torch.Tensor, radius: torch.Tensor, adjacency: torch.Tensor, *, literal: bool = False
) -> torch.Tensor:
    """L_Phi, paper eq. (9): the weighted mean over edges of 1 - cos of the change of a phase difference, over the rows.

    sum_(k,l) w_kl (1 - cos(d_k - d_l)) over the edges, with turns d = theta^ - theta0 and w_kl = rho0_k rho0_l over
    their sum. With s = 1 - cos d, 1 - cos(d_k - d_l) = s_k + s_l - s_k s_l - sin d_k sin d_l: three products with the
    adjacency matrix, and nothing close to 1 is subtracted from 1.

    Args:
        turn: theta^ - theta0, [n, M]; the gradient goes there.
        radius: rho0, [n, M], constants.
        adjacency: [M, M] of 0 and 1, symmetric, zero diagonal. Without edges the loss is 0.
        literal: the printed 1/|E| in front of the normalised weights (METHOD D14); |E| counts a pair once.
    """
    edges = adjacency.to(turn.dtype)
    excess = 2 * (turn / 2).sin() ** 2
    heavy, sine = radius * excess, radius * turn.sin()
    reached = radius @ edges
    total = (radius * reached).sum(dim=1)
    spread = (2 * heavy * reached - heavy * (heavy @ edges) - sine * (sine @ edges)).sum(dim=1)
    loss = (spread / total.clamp_min(WEIGHT_FLOOR)).mean()
    return loss / (edges.sum() / 2).clamp_min(1) if literal else loss


def complement_directions(basis: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` random unit directions of V, [D, count]: uniform on its sphere.

    Args:
        basis: Q, [D, R], R < D.
        count: directions to draw.
        generator: on the device of ``basis``.
    """
    gaussian = torch.randn((len(basis), count), generator=generator, dtype=basis.dtype, device=basis.device)
    inside = gaussian - basis @ (basis.T @ gaussian)
    return inside / inside.norm(dim=0, keepdim=True)


def sliced_wasserstein(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared 2-Wasserstein distance of two samples along each direction, mean over the directions.

    Of n values each, sorted, it is the mean squared difference.

    Args:
        source: coordinates of n rows along P directions, [n, P].
        target: those of as many other rows, [n, P].

    Raises:
        InputError: the samples differ in size.
    """
    if source.shape != target.shape:
        shapes = f"{list(source.shape)} and {list(target.shape)}"
        raise InputError(f"sliced Wasserstein needs samples of one size, got {shapes}")
    return (source.sort(dim=0).values - target.sort(dim=0).values).square().mean()


def sorted_distance(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`sliced_wasserstein` of samples [n, P], and its gradient to ``source`` [n, P]."""
    values, order = source.T.contiguous().sort(dim=1)
    gaps = values.sub_(target.T.contiguous().sort(dim=1).values)
    distance = gaps.square().mean()
    return distance, torch.empty_like(gaps).scatter_(1, order, gaps.mul_(2 / gaps.numel())).T


def complement_objective(
    update: Update, target: torch.Tensor, directions: torch.Tensor, trace: float, *, penalty: float = 0.1
) -> torch.Tensor:
    """The V-side objective (METHOD D15): ((D - R) SW2^2(v^, v of the target) + penalty |a_v tanh dv|^2) / tr S_t,V.

    D - R times the mean over directions of V makes the first term a squared length, as the second one is: an offset m
    between the two costs |m|^2. Both are shares of the target's variance in V. Each process of several sorts the rows
    that it has: the distance is then that of smaller samples.

    Args:
        update: of n rows.
        target: n rows of the target, [n, D].
        directions: unit directions of V, [D, P], of :func:`complement_directions`.
        trace: tr S_t,V.
        penalty: weight of the second term.
    """
    dimensions = update.v0.shape[1] - 2 * update.turn.shape[1]
    moved = (update.v0 + update.move) @ directions
    distance = dimensions * sliced_wasserstein(moved, target @ directions)
    return (distance + penalty * update.move.square().sum(dim=1).mean()) / trace
