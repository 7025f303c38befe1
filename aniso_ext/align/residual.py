"""What stand-ins still miss of the target, estimated without pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from aniso_ext.align.base import Aligner

_CHUNK = 1024
# Rows of the target among which a stand-in looks for the nearest: more are hardly nearer.
_MOST_TARGET_ROWS = 262_144


def unpaired_residual(
    standins: torch.Tensor,
    target: torch.Tensor,
    *,
    neighbours: int = 5,
    rows: int = 4096,
    seed: int = 0,
) -> torch.Tensor:
    """Covariance of x - z over stand-ins z and the nearest rows x of the target, float64 [D, D]; no pair is used.

        S = mean_ik (d_ik - mean d)(d_ik - mean d)^T,  d_ik = x_(k)(z_i) - z_i,  k = 1 .. neighbours

    where x_(k)(z) is the row of the target with the k-th largest z . x. It is a little smaller than the covariance of
    true residuals, since a neighbour is nearer than a partner, and has nearly its shape (docs/mllm.md, fashion44k).

    Args:
        standins: [N, D] rows after a correction; ``rows`` of them, drawn by ``seed``, are looked up.
        target: [M, D] rows of the target, in any order.

    Raises:
        InputError: widths differ, there are fewer target rows than ``neighbours``, or a number is below 1.

    Example:
        >>> import torch
        >>> unpaired_residual(torch.eye(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]), neighbours=1)
        tensor([[ 0.0625, -0.0625],
                [-0.0625,  0.0625]], dtype=torch.float64)
    """
    if standins.dim() != 2 or target.dim() != 2 or standins.shape[1] != target.shape[1]:
        raise InputError(
            f"stand-ins and target must be [N, D] and [M, D], got {list(standins.shape)} and {list(target.shape)}"
        )
    if not 1 <= neighbours <= len(target):
        raise InputError(f"neighbours must be from 1 to the {len(target)} rows of the target, got {neighbours}")
    if rows < 1 or len(standins) == 0:
        raise InputError(f"there must be rows to look up: got rows={rows} of {len(standins)} stand-ins")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(standins))[:rows])
    width = standins.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    for part in np.array_split(chosen, -(-len(chosen) // _CHUNK)):
        queries = standins[torch.from_numpy(part)].to(target)
        nearest = (queries @ target.T).topk(neighbours, dim=1).indices
        differences = (target[nearest].double() - queries.double()[:, None]).flatten(0, 1)
        total += differences.sum(dim=0).cpu()
        products += (differences.T @ differences).cpu()
    count = len(chosen) * neighbours
    mean = total / count
    return products / count - torch.outer(mean, mean)


def noise_factor(covariance: torch.Tensor) -> torch.Tensor:
    """F [D, D] with F F^T = S D / tr S: s F g, g standard normal, has the shape of S and the energy of N(0, s^2 I).

    Raises:
        InputError: the covariance is zero or has values that are not finite.

    Example:
        >>> import torch
        >>> noise_factor(torch.diag(torch.tensor([4.0, 0.0]))).square().sum().round(decimals=6)
        tensor(2., dtype=torch.float64)
    """
    exact = covariance.double()
    trace = float(exact.diagonal().sum())
    if not 0 < trace < float("inf") or not bool(torch.isfinite(exact).all()):
        raise InputError(f"the covariance of noise must be finite and not zero, its trace is {trace:g}")
    values, vectors = torch.linalg.eigh(exact * (len(exact) / trace))
    return vectors * values.clamp_min(0).sqrt()


def residual_noise_factor(
    aligner: Aligner | None, source: Any, target: Any, *, rows: int = 4096, seed: int = 0
) -> torch.Tensor:
    """:func:`noise_factor` of the :func:`unpaired_residual` that an aligner leaves.

    Args:
        aligner: fitted; None judges the source rows themselves.
        source, target: unpaired embeddings [N, D] and [M, D], anything that ``fit`` takes; ``rows`` of the source and
            at most 262 144 of the target are read, drawn by ``seed``.

    Raises:
        InputError: as :func:`unpaired_residual` and :func:`noise_factor`.
        DataError: a path that holds no usable embeddings.
    """
    random = np.random.default_rng(seed)
    standins = drawn_rows(source, rows, random)
    if aligner is not None:
        standins = aligner.transform(standins)
    unpaired = drawn_rows(target, _MOST_TARGET_ROWS, random)
    return noise_factor(unpaired_residual(standins, unpaired, rows=rows, seed=seed))


def drawn_rows(given: Any, count: int, random: np.random.Generator) -> torch.Tensor:
    """At most ``count`` rows of embeddings, anything that ``fit`` takes, drawn without replacement; float32."""
    from aniso_ext.data import open_embeddings

    embeddings = open_embeddings(given)
    chosen = np.sort(random.permutation(len(embeddings))[:count])
    return torch.from_numpy(embeddings.read(chosen).astype(np.float32))
