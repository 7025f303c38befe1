"""The loss of Stage II on a pair of unpaired batches, in memory that does not grow with all it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from aniso_ext.align.refiner.losses import (
    Update,
    bounded_update,
    complement_directions,
    complement_distance,
    phase_consistency,
)
from aniso_ext.align.refiner.network import Refiner
from aniso_ext.align.refiner.options import RefinementOptions
from aniso_ext.ops import Frame, encode

if TYPE_CHECKING:
    from aniso_ext.align.prior import PhasePrior

CHUNK_ROWS = 2048
"""Rows of a larger batch whose losses are computed at a time."""


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of n rows, and what does not depend on the refiner.

    ``directions`` [D, P] of V and ``goal`` [n, P], the target's coordinates along them; ``scale`` [n, 1] and ``noise``
    [n, M] of the prior's objective. None for objectives that are switched off.
    """

    directions: torch.Tensor | None
    goal: torch.Tensor | None
    scale: torch.Tensor | None
    noise: torch.Tensor | None


class Objective:
    """The loss of Stage II: weighted sum of L_II, L_Phi and the V-side objective on a pair of unpaired batches.

    None of them reads the rebuilt row (METHOD D15), so a step needs ``encode`` and the polar form of the update;
    ``decode`` comes in when rows are transformed.

    The losses of more than ``chunk_rows`` rows are computed some rows at a time, together with their gradient to the
    deltas, so that this gradient is all that is kept of them. The V-side distance sorts all rows: it is taken from their
    coordinates first, and its gradient to these is handed to the chunks.

    Args:
        frame: of the device of the batches.
        prior: frozen, on that device.
        options: weights, projections.
        trace: tr S_t,V.
        literal: the printed form: 1/|E| in L_Phi (D14), nothing on V (D15), projection before tanh (D11).
        backend: of ``encode``.
        chunk_rows: rows at a time.
    """

    def __init__(
        self,
        frame: Frame,
        prior: PhasePrior,
        options: RefinementOptions,
        *,
        trace: float,
        literal: bool,
        backend: str,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self.frame, self.prior, self.options, self.backend = frame, prior, options, backend
        self.trace, self.literal, self.chunk_rows = trace, literal, chunk_rows
        self._adjacency = (prior.graph.amplitude > 0).to(device=frame.device, dtype=torch.float32)
        self._basis = frame.basis.float()
        self.dimensions = frame.width - frame.rank

    def __call__(
        self, refiner: Refiner, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a mean over rows, and its parts by name; ``concentration`` is the mean |E e^{i theta^}| (D16)."""
        source, target = batch
        with torch.no_grad():
            state = encode(source.float(), self.frame, backend=self.backend)
        draws = self._draw(target, generator)
        deltas = refiner(state)
        if len(state) > self.chunk_rows:
            return _Chunks(self, refiner, state, draws).loss(deltas)
        deltas = deltas.float()
        # distances are differences of nearly equal numbers: products in bfloat16 would leave nothing of them
        with torch.autocast(state.device.type, enabled=False):
            update = self.update(refiner, state, deltas)
            terms = self.consistency(update) | self._complement(update, draws)
        terms |= self.score(update, draws.scale, draws.noise)
        total = deltas.sum() * 0 + self.weighted(terms)
        return total, {**terms, "concentration": _units(update).mean(dim=0).abs().mean()}

    def _draw(self, target: torch.Tensor, generator: torch.Generator) -> Draws:
        directions = goal = scale = noise = None
        if self.options.complement_weight and not self.literal and self.trace > 0:
            directions = complement_directions(self._basis, self.options.projections, generator)
            with torch.autocast(target.device.type, enabled=False):
                goal = torch.cat([rows.float() @ directions for rows in target.split(self.chunk_rows)])
        if self.options.score_weight:
            scale, noise = self.prior.draw(len(target), generator)
        return Draws(directions, goal, scale, noise)

    def update(self, refiner: Refiner, state: torch.Tensor, deltas: torch.Tensor) -> Update:
        """The bounded update of some rows."""
        return bounded_update(state, deltas, self._basis, refiner.bounds, literal=self.literal)

    def weighted(self, terms: dict[str, torch.Tensor]) -> Any:
        """Sum of the terms under their weights; 0 of none."""
        return sum(getattr(self.options, f"{name}_weight") * value for name, value in terms.items())

    def score(
        self, update: Update, scale: torch.Tensor | None, noise: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """L_II per block."""
        if scale is None or noise is None:
            return {}
        rows = self.prior.row_losses(update.theta, update.log_radius, scale, noise)
        return {"score": rows.mean() / self.prior.phases}

    def consistency(self, update: Update) -> dict[str, torch.Tensor]:
        """L_Phi."""
        if not self.options.consistency_weight:
            return {}
        loss = phase_consistency(update.turn, update.radius0, self._adjacency, literal=self.literal)
        return {"consistency": loss}

    def _complement(self, update: Update, draws: Draws) -> dict[str, torch.Tensor]:
        if draws.directions is None or draws.goal is None:
            return {}
        distance = complement_distance(update.complement(draws.directions), draws.goal, self.dimensions)
        return {"complement": (distance + self.options.complement_penalty * update.move_energy) / self.trace}


class _Chunks:
    """One evaluation of an objective, some rows at a time."""

    def __init__(self, objective: Objective, refiner: Refiner, state: torch.Tensor, draws: Draws) -> None:
        self.objective, self.refiner, self.state, self.draws = objective, refiner, state, draws
        self.pieces = [
            slice(first, min(first + objective.chunk_rows, len(state)))
            for first in range(0, len(state), objective.chunk_rows)
        ]
        self.parts: dict[str, torch.Tensor] = {}

    def loss(self, deltas: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As of the objective, of deltas [n, 2M + D]."""
        wanted = torch.is_grad_enabled() and deltas.requires_grad
        total: torch.Tensor = _WithGradient.apply(deltas, self, wanted)  # type: ignore[no-untyped-call]
        return total, self.parts

    def evaluate(self, deltas: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss and, if wanted, its gradient, in the dtype of the deltas; fills ``parts``."""
        gradient = torch.empty_like(deltas) if wanted else None
        pull, distance = self._distance(deltas, wanted)
        totals = {} if distance is None else {"complement": distance}
        direction: Any = 0
        for piece in self.pieces:
            with torch.set_grad_enabled(wanted):
                leaf = deltas[piece].float().requires_grad_(wanted)
                update, terms, pulled = self._piece(leaf, piece, pull)
                share = len(leaf) / len(deltas)
                terms = {name: share * value for name, value in terms.items()}
                if gradient is not None:
                    (gradient[piece],) = torch.autograd.grad(self.objective.weighted(terms) + pulled, leaf)
            for name, value in terms.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
            direction = direction + _units(update).sum(dim=0)
        self.parts = {**totals, "concentration": direction.div(len(deltas)).abs().mean()}
        return deltas.new_zeros((), dtype=torch.float32) + self.objective.weighted(totals), gradient

    def _piece(
        self, deltas: torch.Tensor, piece: slice, pull: torch.Tensor | None
    ) -> tuple[Update, dict[str, torch.Tensor], torch.Tensor | float]:
        """Update and terms of some rows, and a term of the gradient that the distance has there."""
        objective, draws = self.objective, self.draws
        pulled: torch.Tensor | float = 0.0
        with torch.autocast(deltas.device.type, enabled=False):
            update = objective.update(self.refiner, self.state[piece], deltas)
            terms = objective.consistency(update)
            if draws.directions is not None:
                penalty = objective.options.complement_penalty / objective.trace
                terms["complement"] = penalty * update.move_energy
                if pull is not None:
                    pulled = (update.complement(draws.directions) * pull[piece]).sum()
        terms |= objective.score(update, _part(draws.scale, piece), _part(draws.noise, piece))
        return update, terms, pulled

    def _distance(self, deltas: torch.Tensor, wanted: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradient of the weighted V-side distance to the coordinates of v^, and the distance."""
        objective, draws = self.objective, self.draws
        if draws.directions is None or draws.goal is None:
            return None, None
        with torch.autocast(deltas.device.type, enabled=False):
            updates = (objective.update(self.refiner, self.state[at], deltas[at].float()) for at in self.pieces)
            moved = torch.cat([update.complement(draws.directions) for update in updates]).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                distance = complement_distance(moved, draws.goal, objective.dimensions) / objective.trace
                weighted = objective.weighted({"complement": distance})
        return torch.autograd.grad(weighted, moved)[0] if wanted else None, distance.detach()


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, deltas: torch.Tensor, chunks: _Chunks, wanted: bool) -> torch.Tensor:
        total, gradient = chunks.evaluate(deltas.detach(), wanted)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def _part(value: torch.Tensor | None, piece: slice) -> torch.Tensor | None:
    return None if value is None else value[piece]


def _units(update: Update) -> torch.Tensor:
    """e^{i theta^}, [n, M], a constant."""
    return torch.polar(torch.ones_like(update.theta0), update.theta.detach())
