"""How far the refiner can move a row: the bounds, what was realised of them, and what follows for similarities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from aniso_ext.align.rows import Rows
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame
from aniso_ext.stats import RadiusSketch

TRIVIAL = 2.0
"""Two cosines are never further apart than this."""
LARGEST_BOUND = 10.0
"""More than any use of a bound, and little enough for e^a_rho in every dtype."""
NO_BOUND = 1e6
"""What eps_eff of a row of length zero is recorded as; from 1 on nothing is guaranteed."""
COLLAPSE_DEVIATIONS = 3.0
"""Standard errors by which a concentration must exceed the target's before it counts as a collapse."""


@dataclass(frozen=True)
class Bounds:
    """Largest turn of a phase (radians), change of a log radius and change of a coordinate of V (METHOD D12).

    Example:
        >>> round(Bounds(a_theta=0.1, a_rho=0.1, a_v=0.0).kappa, 4)
        0.1487
    """

    a_theta: float
    a_rho: float
    a_v: float

    def __post_init__(self) -> None:
        for name in ("a_theta", "a_rho", "a_v"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"{name} must be a number, got {value!r}")
            if not 0 <= value <= LARGEST_BOUND:
                raise InputError(f"{name} must be between 0 and {LARGEST_BOUND:g}, got {value!r}")

    @property
    def kappa(self) -> float:
        """|c^ - c0| <= kappa |c0|: sqrt((e^a_rho - 1)^2 + 4 e^a_rho sin^2(a_theta / 2)) (METHOD D12, paper A.4).

        It is |e^{a_rho + i a_theta} - 1|, the furthest that one block can move in units of its radius; past a half turn
        the furthest point is the opposite one.
        """
        growth = math.exp(self.a_rho)
        return math.sqrt((growth - 1) ** 2 + 4 * growth * math.sin(min(self.a_theta, math.pi) / 2) ** 2)


def similarity_guarantee(eps: float) -> float:
    """4 eps / (1 - eps), the most that the cosine of two rows can change, at most 2 (METHOD D12, paper A.4)."""
    return TRIVIAL if eps >= 1 else min(TRIVIAL, 4 * eps / (1 - eps))


def complement_step(move: torch.Tensor, basis: torch.Tensor, a_v: float, literal: bool) -> torch.Tensor:
    """v^ - v0 [n, D] of moves dv [n, D]: a_v tanh and then the projection, or as printed the reverse (METHOD D11)."""
    if literal:
        return a_v * (move - move @ basis @ basis.T).tanh()
    step = a_v * move.tanh()
    return step - step @ basis @ basis.T


def effective_bound(
    state: torch.Tensor, deltas: torch.Tensor, frame: Frame, bounds: Bounds, *, literal: bool = False
) -> torch.Tensor:
    """eps_eff of each row, relative to its length: (kappa |c0| + |v^ - v0|) / |Q c0 + v0|, [n] (METHOD D12).

    The row is e' before its normalisation. Paper A.4 takes rows of unit length; dividing by the length that they have
    keeps its inequality true for rows of any length.

    Args:
        state: [n, 3M + D], output of :func:`aniso_ext.ops.encode`.
        deltas: [n, 2M + D], output of the refiner.
        frame: of the dtype and device of ``state``.
        bounds: those of the update.
        literal: the order of tanh and projection as printed (METHOD D11).
    """
    blocks, basis = frame.blocks, frame.basis
    sin, cos, log_radius, v0 = state.split((blocks, blocks, blocks, frame.width), dim=1)
    radius = log_radius.exp()
    coordinates = torch.stack((radius * cos, radius * sin), dim=2).flatten(1)
    length = (coordinates @ basis.T + v0).norm(dim=1)
    step = complement_step(deltas[:, frame.rank :], basis, bounds.a_v, literal)
    return (bounds.kappa * coordinates.norm(dim=1) + step.norm(dim=1)) / length


@dataclass(frozen=True)
class BoundReport:
    """eps_eff over the rows of a corpus, and the guarantee for any two of them."""

    mean: float
    median: float
    p99: float
    largest: float

    @property
    def guarantee(self) -> float:
        """|<z_i, z_j> - <y_i, y_j>| of any two rows, before the last calibration."""
        return similarity_guarantee(self.largest)

    def summary(self) -> dict[str, Any]:
        """Entries of ``summary_``."""
        return {
            "eps_eff_mean": self.mean,
            "eps_eff_median": self.median,
            "eps_eff_p99": self.p99,
            "eps_eff_largest": self.largest,
            "similarity_guarantee": self.guarantee,
            "similarity_guarantee_median": similarity_guarantee(self.median),
        }


class BoundSurvey:
    """eps_eff of the rows of a corpus, streamed: mean and maximum are exact, quantiles come from a sketch."""

    def __init__(self) -> None:
        self._sketch = RadiusSketch(1)
        self._sum = 0.0

    def update(self, eps: torch.Tensor) -> None:
        """Take in the bounds [n] of a batch."""
        values = eps.double().clamp_max(NO_BOUND).cpu()
        self._sketch.update(values[:, None].numpy())
        self._sum += float(values.sum())

    def gather(self, rows: Rows) -> None:
        """Take in what the other processes that share the rows have seen."""
        self._sketch = rows.merged(self._sketch)
        self._sum = float(rows.total(torch.tensor(self._sum, dtype=torch.float64)))

    def report(self) -> BoundReport:
        """What was seen so far."""
        median, p99, largest = self._sketch.quantiles([0.5, 0.99, 1.0])[0].tolist()
        return BoundReport(self._sum / self._sketch.count, median, p99, largest)


@dataclass(frozen=True)
class CollapseReport:
    """|E e^{i theta_k}| of target, initialisation and refined rows, each [M] (METHOD D16)."""

    target: torch.Tensor
    initial: torch.Tensor
    refined: torch.Tensor
    margin: float

    @property
    def collapsed(self) -> torch.Tensor:
        """Blocks [M] more concentrated than the target's, and than the initialisation's, by more than ``margin``.

        The second condition leaves out what was concentrated before the refiner touched it.
        """
        return self.refined > torch.maximum(self.target, self.initial) + self.margin

    def warning(self) -> str | None:
        """One line if a block has collapsed."""
        count = int(self.collapsed.sum())
        if not count:
            return None
        excess = torch.where(self.collapsed, self.refined - self.target, -1)
        worst = int(excess.argmax())
        return (
            f"the refiner has concentrated the phases of {count} of {len(self.target)} blocks beyond the target's "
            f"(worst: block {worst}, |E e^(i theta)| {float(self.refined[worst]):.3f}, target "
            f"{float(self.target[worst]):.3f}): lower score_weight or a_theta (METHOD D16)"
        )

    def summary(self) -> dict[str, Any]:
        """Entries of ``summary_``."""
        return {
            "phase_concentration_target": float(self.target.mean()),
            "phase_concentration_initial": float(self.initial.mean()),
            "phase_concentration_refined": float(self.refined.mean()),
            "collapsed_blocks": int(self.collapsed.sum()),
        }


class CollapseWatch:
    """Sums of e^{i theta0} and e^{i theta^} over the rows of a corpus, streamed (METHOD D16)."""

    def __init__(self, target: torch.Tensor, target_rows: int) -> None:
        """``target``: |E e^{i theta_k}| of the target, [M]."""
        self._target, self._target_rows = target.double().cpu(), target_rows
        self._initial = torch.zeros(len(target), dtype=torch.complex128)
        self._refined = torch.zeros(len(target), dtype=torch.complex128)
        self._count = 0

    def update(self, sin: torch.Tensor, cos: torch.Tensor, turn: torch.Tensor) -> None:
        """Take in directions of theta0 and turns theta^ - theta0, each [n, M]."""
        unit = torch.complex(cos.double(), sin.double())
        turned = unit * torch.polar(torch.ones_like(turn, dtype=torch.float64), turn.double())
        self._initial += unit.sum(dim=0).cpu()
        self._refined += turned.sum(dim=0).cpu()
        self._count += len(sin)

    def gather(self, rows: Rows) -> None:
        """Take in what the other processes that share the rows have seen."""
        self._initial, self._refined = rows.total(self._initial), rows.total(self._refined)
        self._count = int(rows.total(torch.tensor(self._count)))

    def report(self) -> CollapseReport:
        """What was seen so far."""
        # The mean of n unit numbers has a standard error of at most 1/sqrt(n).
        margin = COLLAPSE_DEVIATIONS * math.sqrt(1 / self._count + 1 / self._target_rows)
        initial, refined = (self._initial / self._count).abs(), (self._refined / self._count).abs()
        return CollapseReport(self._target, initial, refined, margin)
