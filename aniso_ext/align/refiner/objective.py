"""The loss of Stage II on a pair of unpaired batches, and its gradient in less memory than autograd takes."""

from __future__ import annotations

from collections.abc import Callable
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
    sorted_distance,
)
from aniso_ext.align.refiner.network import Refiner
from aniso_ext.align.refiner.options import RefinementOptions
from aniso_ext.align.refiner.passes import Passes, product
from aniso_ext.align.refiner.polar import PolarLosses
from aniso_ext.ops import Frame, encode

if TYPE_CHECKING:
    from aniso_ext.align.prior import PhasePrior
    from aniso_ext.align.prior.frozen import FrozenScore

CHUNK_ROWS = 16_384
"""Rows of a matrix product of the refiner: more of them make it no faster."""
POLAR_ROWS = 8192
"""Rows whose phases and radii are differentiated at a time: the prior's network holds 2 KB of a row in each block."""
AUTOGRAD_ROWS = 4096
"""Rows that are left to autograd on the CPU: of more, what it keeps fills the memory of a small machine."""
HALF = (torch.float16, torch.bfloat16)
Batch = tuple[torch.Tensor, torch.Tensor]


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

    On the CPU, few rows are left to autograd. Otherwise the gradient is computed with the loss: that
    to the deltas by :class:`_Deltas`, in their place, that to the parameters by
    :class:`~aniso_ext.align.refiner.passes.Passes`. Under autocast products are in its dtype, and float16 rows are
    encoded as they are, as the refined map does it.

    Args:
        frame: of the device of the batches.
        prior: frozen, on that device.
        options: weights, projections.
        trace: tr S_t,V.
        literal: the printed form: 1/|E| in L_Phi (D14), nothing on V (D15), projection before tanh (D11).
        backend: of ``encode``.
        chunk_rows: rows of the refiner's products.
        polar_rows: rows of the losses of phases and radii at a time.
        written_out: whether gradients are computed with the loss or left to autograd, whatever device and rows are.
        compiled: whether torch.compile fuses L_II, L_Phi, norms and activations where autograd has no part in them.
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
        polar_rows: int = POLAR_ROWS,
        written_out: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.frame, self.prior, self.options, self.backend = frame, prior, options, backend
        self.trace, self.literal, self.written_out, self.compiled = trace, literal, written_out, compiled
        self.chunk_rows, self.polar_rows = chunk_rows, min(chunk_rows, polar_rows)
        self._adjacency = (prior.graph.amplitude > 0).to(device=frame.device, dtype=torch.float32)
        self._edges = float(self._adjacency.sum()) / 2
        self._basis = frame.basis.float()
        self._frozen: dict[torch.dtype, FrozenScore] = {}

    def __call__(
        self, refiner: Refiner, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a mean over rows, and its parts by name; ``concentration`` is the mean |E e^{i theta^}| (D16)."""
        source, target = batch
        if self._to_autograd(source):
            return self.at_once(refiner, source, target, self.draw(len(source), generator))
        if not torch.is_grad_enabled():
            return self._written_out(refiner, lambda: batch, generator, wanted=False)[:2]
        total, parts, gradients = self._written_out(refiner, lambda: batch, generator, wanted=True)
        return _Differentiated.apply(total, gradients, *refiner.parameters()), parts

    def with_gradients(
        self, refiner: Refiner, take: Callable[[], Batch], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor] | None]:
        """The loss, its parts, and its gradients to the parameters of the refiner in their order.

        None in place of the gradients leaves them to autograd. Those of weights are as narrow as autocast makes them.

        Args:
            take: makes the batch, which is given back as soon as it has been read.
        """
        batch = take()
        if self._to_autograd(batch[0]):
            return *self(refiner, batch, generator), None
        given = [batch]
        del batch
        return self._written_out(refiner, given.pop, generator, wanted=True)

    def at_once(
        self, refiner: Refiner, source: torch.Tensor, target: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its parts, of all rows together, for autograd."""
        with torch.no_grad():
            state = encode(source.float(), self.frame, backend=self.backend)
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

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """All that is random in the loss of a batch."""
        directions = scale = noise = None
        if self.options.complement_weight and not self.literal and self.trace > 0:
            with torch.autocast(self._basis.device.type, enabled=False):
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

    def polar_losses(self, bounds: Bounds, dtype: torch.dtype, rows: int) -> tuple[PolarLosses, dict[str, float]]:
        """L_II and L_Phi for a batch of that many rows, and the factors that make means of their sums."""
        if dtype not in self._frozen:
            self._frozen[dtype] = self.prior.frozen(dtype, compiled=self.compiled)
        options = self.options
        pairs = max(1.0, self._edges) if self.literal else 1.0
        shares = {"consistency": 1 / (rows * pairs), "score": 1 / (rows * self.prior.phases)}
        weights = {
            f"{name}_weight": getattr(options, f"{name}_weight") * share if getattr(options, f"{name}_weight") else None
            for name, share in shares.items()
        }
        losses = PolarLosses(
            self.prior, self._adjacency, bounds, frozen=self._frozen[dtype], compiled=self.compiled, **weights
        )
        return losses, shares

    def _to_autograd(self, source: torch.Tensor) -> bool:
        if self.written_out is not None:
            return not self.written_out
        return source.device.type == "cpu" and len(source) <= min(self.chunk_rows, AUTOGRAD_ROWS)

    def _written_out(
        self, refiner: Refiner, take: Callable[[], Batch], generator: torch.Generator, *, wanted: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        """The loss, its parts and, if wanted, the gradients of the parameters."""
        source, target = take()
        kind = source.device.type
        narrow = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if narrow else refiner.input_mean.dtype
        draws = self.draw(len(source), generator)
        with torch.autocast(kind, enabled=False):
            # a state in bfloat16 would double what autocast loses of the gradients
            rows = source if narrow and source.dtype == torch.float16 else source.float()
            with torch.no_grad():
                state = encode(rows, self.frame, backend=self.backend)
            del source, rows
            losses = _Deltas(self, refiner.bounds, dtype, state, target, draws)
            del target
            passes = Passes(refiner, dtype, self.chunk_rows, compiled=self.compiled)
            standardised = passes.standardised(state)
            del state  # what the losses need of it they have
            deltas, kept = passes.forward(standardised)
            total = losses.differentiate(deltas, wanted)
            return total, losses.parts, passes.backward(kept, deltas) if wanted else []


class _Deltas:
    """The losses of a batch as functions of the deltas [n, 2M + D]."""

    def __init__(
        self,
        objective: Objective,
        bounds: Bounds,
        dtype: torch.dtype,
        state: torch.Tensor,
        target: torch.Tensor,
        draws: Draws,
    ) -> None:
        self.objective, self.bounds, self.dtype, self.draws = objective, bounds, dtype, draws
        self.rows, self.rank = len(state), objective.frame.rank
        self.polar = state[:, : 3 * self.rank // 2].clone()
        self.parts: dict[str, torch.Tensor] = {}
        self.start = self.goal = None
        if draws.directions is not None:
            self.start = _along(state[:, 3 * self.rank // 2 :], draws.directions)
            self.goal = _along(target, draws.directions)

    @torch.no_grad()
    def differentiate(self, deltas: torch.Tensor, wanted: bool) -> torch.Tensor:
        """The loss; fills ``parts`` and, if wanted, puts the gradient in the place of the deltas."""
        terms = self._polar(deltas, wanted) | self._complement(deltas, wanted)
        self.parts |= terms
        return deltas.new_zeros((), dtype=torch.float32) + self.objective.weighted(terms)

    def _polar(self, deltas: torch.Tensor, wanted: bool) -> dict[str, torch.Tensor]:
        """Terms of phases and radii, means over all rows."""
        draws = self.draws
        losses, shares = self.objective.polar_losses(self.bounds, self.dtype, self.rows)
        sums: dict[str, torch.Tensor] = {}
        size = self.objective.polar_rows
        for piece in (slice(first, first + size) for first in range(0, self.rows, size)):
            noisy = None if draws.scale is None or draws.noise is None else (draws.scale[piece], draws.noise[piece])
            found = losses(self.polar[piece], deltas[piece, : self.rank], noisy, wanted)
            if found.gradient is not None:
                deltas[piece, : self.rank] = found.gradient
            for name in ("consistency", "score", "units"):
                value = getattr(found, name)
                if value is not None:
                    sums[name] = sums[name] + value if name in sums else value
        self.parts["concentration"] = (sums.pop("units") / self.rows).norm(dim=0).mean()
        return {name: value * shares[name] for name, value in sums.items()}

    def _complement(self, deltas: torch.Tensor, wanted: bool) -> dict[str, torch.Tensor]:
        """The V-side objective: with m = a_v tanh dv, its gradient is (1 - tanh^2 dv) a_v (pull W^T + 2 c m)."""
        directions, start, goal = self.draws.directions, self.start, self.goal
        moves = deltas[:, self.rank :]
        if directions is None or start is None or goal is None:
            if wanted:
                moves.zero_()
            return {}
        options, a_v = self.objective.options, self.bounds.a_v
        bent = moves.tanh()
        distance, pull = sorted_distance(start.add_(_along(bent, directions), alpha=a_v), goal)
        dimensions = (len(directions) - self.rank) / self.objective.trace
        energy = options.complement_penalty * a_v**2 / (self.rows * self.objective.trace)
        length = torch.linalg.vector_norm(bent, dtype=torch.float32)
        if wanted:
            weight = options.complement_weight * a_v
            pull *= weight * dimensions
            torch.mm(pull.to(moves.dtype), directions.T.to(moves.dtype), out=moves)
            moves.add_(bent, alpha=2 * options.complement_weight * energy)
            torch.ops.aten.tanh_backward.grad_input(moves, bent, grad_input=moves)
        return {"complement": dimensions * distance + energy * length.square()}


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients to the parameters are there."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, gradients: list[torch.Tensor], *parameters: Any) -> torch.Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(gradient * grad for gradient in ctx.gradients)


def _along(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Coordinates [n, P], float32, of rows along directions [D, P], which narrow rows meet as a sum of two pieces."""
    if rows.dtype not in HALF:
        return rows.float() @ directions
    high = directions.to(rows.dtype)
    low = (directions - high).to(rows.dtype)
    return product(rows, high, torch.float32).add_(product(rows, low, torch.float32))


def _units(update: PolarUpdate) -> torch.Tensor:
    """e^{i theta^}, [n, M], a constant."""
    return torch.polar(torch.ones_like(update.theta0), update.theta.detach())
