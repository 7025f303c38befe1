"""Stand-ins made of other things' targets, and stand-ins drawn towards their mean: variants of ladder_directions.py."""

from __future__ import annotations

import torch
from ladder_readers import Problem

from aniso_ext.align.neighbours import NeighbourMean
from aniso_ext.align.residual import unpaired_residual
from aniso_ext.mllm.arms.ladder import strangers

COUNTS = (1, 3, 5, 10)
NETWORK_COUNTS = (1, 5)
RIDGE = 1e-6


def mean_of_strangers(standins: torch.Tensor, problem: Problem, count: int) -> torch.Tensor:
    """The unit mean of the ``count`` target rows near each stand-in, none of which is its own or a copy of it."""
    centre = standins.mean(dim=0, dtype=torch.float64)
    found = torch.empty_like(standins)
    for own, others in strangers(problem.target.numpy(), None):
        found[own] = NeighbourMean(torch.from_numpy(others), centre, count=count)(standins[own])
    return found


def shrunken(standins: torch.Tensor, problem: Problem, *, paired: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A (z - m_z) + m_x, and what it leaves of the target's covariance S_x, for A = S_xz S_z^-1.

    A residual R = S_x + S_z - S_xz - S_zx gives S_xz where it is symmetric: (S_x + S_z - R) / 2. ``paired`` takes S_xz
    itself, an oracle.
    """
    z, x = standins.double(), problem.target.double()
    centre, goal = z.mean(dim=0), x.mean(dim=0)
    within, wanted = ((side - side.mean(dim=0)).T @ (side - side.mean(dim=0)) / len(side) for side in (z, x))
    if paired:
        joint = (x - goal).T @ (z - centre) / len(z)
    else:
        # halves without a common row, as texts and images of other things
        joint = (wanted + within - unpaired_residual(z[0::2], x[1::2])) / 2
    inverse = torch.linalg.inv(within + RIDGE * torch.eye(len(within), dtype=z.dtype))
    values, vectors = torch.linalg.eigh(wanted - joint @ inverse @ joint.T)
    left = (vectors * values.clamp_min(0)) @ vectors.T
    moved = goal + (z - centre) @ (joint @ inverse).T
    return moved.float(), left.float()
