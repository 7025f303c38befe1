"""The loss of Stage II on a pair of unpaired batches, in memory that does not grow with all it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from aniso_ext.align.refiner.bounds import Bounds
from aniso_ext.align.refiner.losses import (
    PolarUpdate,
    bounded_update,
    complement_directions,
    complement_objective,
    phase_consistency,
    polar_update,
    sliced_wasserstein,
)
from aniso_ext.align.refiner.network import Refiner
from aniso_ext.align.refiner.options import RefinementOptions
from aniso_ext.ops import Frame, encode

if TYPE_CHECKING:
    from aniso_ext.align.prior import PhasePrior

CHUNK_ROWS = 4096
"""Rows of a larger batch whose losses are computed at a time: enough for a GPU to be busy with them."""


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of n rows; None for objectives that are switched off.

    ``directions`` [D, P] of V; ``scale`` [n, 1] and ``noise`` [n, M] of the prior's objective.
    """

    directions: torch.Tensor | None
    scale: torch.Tensor | None
    noise: torch.Tensor | None


class Objective:
    """The loss of Stage II: weighted sum of L_II, L_Phi and the V-side objective on a pair of unpaired batches.

    None of them reads the rebuilt row (METHOD D15), so a step needs ``encode`` and the polar form of the update;
    ``decode`` comes in when rows are transformed.

    The losses of more than ``chunk_rows`` rows are computed some rows at a time, together with their gradient to the
    deltas, which is all that is kept of them. The V-side distance sorts all rows: it is taken from their coordinates
    first, and its gradient to these is handed to the chunks. The refiner goes by the same chunks.

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

    def __call__(
        self, refiner: Refiner, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a mean over rows, and its parts by name; ``concentration`` is the mean |E e^{i theta^}| (D16)."""
        source, target = batch
        draws = self.draw(len(source), generator)
        if len(source) <= self.chunk_rows:
            return self.at_once(refiner, source, target, draws)
        state = self._state(source)
        chunks = _Chunks(self, refiner.bounds, state, target, draws)
        deltas = refiner(state, chunk_rows=self.chunk_rows)
        del state  # what the chunks need of it they have
        return chunks.loss(deltas)

    def at_once(
        self, refiner: Refiner, source: torch.Tensor, target: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its parts, of all rows together."""
        state = self._state(source)
        deltas = refiner(state).float()
        terms: dict[str, torch.Tensor] = {}
        # distances are differences of nearly equal numbers: products in bfloat16 would leave nothing of them
        with torch.autocast(state.device.type, enabled=False):
            update = bounded_update(state, deltas, self._basis, refiner.bounds, literal=self.literal)
            if self.options.consistency_weight:
                terms["consistency"] = self.consistency(update)
            if draws.directions is not None:
                penalty = self.options.complement_penalty
                terms["complement"] = complement_objective(
                    update, target.float(), draws.directions, self.trace, penalty=penalty
                )
        if draws.scale is not None and draws.noise is not None:
            terms["score"] = self.score(update, draws.scale, draws.noise)
        total = deltas.sum() * 0 + self.weighted(terms)
        return total, {**terms, "concentration": _units(update).mean(dim=0).abs().mean()}

    @torch.no_grad()
    def _state(self, source: torch.Tensor) -> torch.Tensor:
        return encode(source.float(), self.frame, backend=self.backend)

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """All that is random in the loss of a batch."""
        directions = scale = noise = None
        if self.options.complement_weight and not self.literal and self.trace > 0:
            directions = complement_directions(self._basis, self.options.projections, generator)
        if self.options.score_weight:
            scale, noise = self.prior.draw(rows, generator)
        return Draws(directions, scale, noise)

    def weighted(self, terms: dict[str, torch.Tensor]) -> Any:
        """Sum of the terms under their weights; 0 of none."""
        return sum(getattr(self.options, f"{name}_weight") * value for name, value in terms.items())

    def score(self, update: PolarUpdate, scale: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """L_II per block."""
        return self.prior.row_losses(update.theta, update.log_radius, scale, noise).mean() / self.prior.phases

    def consistency(self, update: PolarUpdate) -> torch.Tensor:
        """L_Phi."""
        return phase_consistency(update.turn, update.radius0, self._adjacency, literal=self.literal)


class _Chunks:
    """One evaluation of an objective, some rows at a time."""

    def __init__(
        self, objective: Objective, bounds: Bounds, state: torch.Tensor, target: torch.Tensor, draws: Draws
    ) -> None:
        self.objective, self.bounds, self.draws = objective, bounds, draws
        self.rows, self.rank = len(state), objective.frame.rank
        self.polar = state[:, : 3 * self.rank // 2].clone()
        self.parts: dict[str, torch.Tensor] = {}
        self.start = self.goal = None
        if draws.directions is not None:
            with torch.autocast(state.device.type, enabled=False):
                self.start = state[:, 3 * self.rank // 2 :] @ draws.directions
                self.goal = torch.cat([target[piece].float() @ draws.directions for piece in self._pieces()])

    def loss(self, deltas: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As of the objective, of deltas [n, 2M + D]."""
        wanted = torch.is_grad_enabled() and deltas.requires_grad
        total: torch.Tensor = _WithGradient.apply(deltas, self, wanted)
        return total, self.parts

    def evaluate(self, deltas: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss and, if wanted, its gradient, in the dtype of the deltas; fills ``parts``."""
        gradient = torch.zeros_like(deltas) if wanted else None
        terms = self._polar(deltas, gradient) | self._complement(deltas, gradient)
        total = deltas.new_zeros((), dtype=torch.float32) + self.objective.weighted(terms)
        self.parts |= terms
        return total, gradient

    def _polar(self, deltas: torch.Tensor, gradient: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Terms of phases and radii, means over all rows."""
        sums: dict[str, torch.Tensor] = {}
        for piece in self._pieces():
            with torch.set_grad_enabled(gradient is not None):
                angles = deltas[piece, : self.rank].float().requires_grad_(gradient is not None)
                update, terms = self._polar_piece(angles, piece)
                terms = {name: value * (len(angles) / self.rows) for name, value in terms.items()}
                if gradient is not None and terms:
                    (gradient[piece, : self.rank],) = torch.autograd.grad(self.objective.weighted(terms), angles)
            _add(sums, terms | {"units": _units(update).sum(dim=0)})
        self.parts["concentration"] = (sums.pop("units") / self.rows).abs().mean()
        return sums

    def _polar_piece(self, angles: torch.Tensor, piece: slice) -> tuple[PolarUpdate, dict[str, torch.Tensor]]:
        objective, draws = self.objective, self.draws
        terms: dict[str, torch.Tensor] = {}
        with torch.autocast(angles.device.type, enabled=False):
            update = polar_update(self.polar[piece], angles, self.bounds)
            if objective.options.consistency_weight:
                terms["consistency"] = objective.consistency(update)
        if draws.scale is not None and draws.noise is not None:
            terms["score"] = objective.score(update, draws.scale[piece], draws.noise[piece])
        return update, terms

    def _complement(self, deltas: torch.Tensor, gradient: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The V-side objective of all rows: the distance of their coordinates, then the gradient to what makes them."""
        directions, start, goal = self.draws.directions, self.start, self.goal
        if directions is None or start is None or goal is None:
            return {}
        options, trace = self.objective.options, self.objective.trace
        with torch.autocast(deltas.device.type, enabled=False):
            dv = (deltas[piece, self.rank :] for piece in self._pieces())
            moved = start + torch.cat([self._moves(rows) @ directions for rows in dv])
            with torch.set_grad_enabled(gradient is not None):
                moved.requires_grad_(gradient is not None)
                distance = (len(directions) - self.rank) * sliced_wasserstein(moved, goal) / trace
                pull = None if gradient is None else torch.autograd.grad(distance, moved)[0]
            value = distance.detach()
            for piece in self._pieces():
                with torch.set_grad_enabled(gradient is not None):
                    leaf = deltas[piece, self.rank :].float().requires_grad_(gradient is not None)
                    moves = self._moves(leaf)
                    energy = moves.square().sum() * (options.complement_penalty / (self.rows * trace))
                    if gradient is not None and pull is not None:
                        part = energy + ((moves @ directions) * pull[piece]).sum()
                        (gradient[piece, self.rank :],) = torch.autograd.grad(options.complement_weight * part, leaf)
                value = value + energy.detach()
        return {"complement": value}

    def _moves(self, dv: torch.Tensor) -> torch.Tensor:
        """a_v tanh dv of some rows; the literal form, which projects dv first, has no such objective."""
        return self.bounds.a_v * dv.float().tanh()

    def _pieces(self) -> Iterator[slice]:
        size = self.objective.chunk_rows
        return (slice(first, min(first + size, self.rows)) for first in range(0, self.rows, size))


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, deltas: torch.Tensor, chunks: _Chunks, wanted: bool) -> torch.Tensor:
        total, ctx.gradient = chunks.evaluate(deltas.detach(), wanted)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it is as large as the deltas
        return gradient.mul_(grad), None, None


def _add(sums: dict[str, torch.Tensor], terms: dict[str, torch.Tensor]) -> None:
    for name, value in terms.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _units(update: PolarUpdate) -> torch.Tensor:
    """e^{i theta^}, [n, M], a constant."""
    return torch.polar(torch.ones_like(update.theta0), update.theta.detach())
