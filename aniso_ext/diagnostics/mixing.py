"""How well two clouds mix: entropy of the labels among nearest neighbours, against the closed form for no structure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from aniso_ext.diagnostics.neighbours import Corpus, nearest
from aniso_ext.errors import InputError


def binary_entropy(share: torch.Tensor) -> torch.Tensor:
    """H2(p) = -p log2 p - (1 - p) log2(1 - p), elementwise, with H2(0) = H2(1) = 0."""
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / math.log(2)


def mixing_expectation(n: int, k: int) -> float:
    """E[H2(J/k)] under a random permutation of the labels: J ~ Hypergeom(2n - 1, n, k) (METHOD section 1).

    ``n`` rows in each of the two clouds, ``k`` neighbours; exact up to float64.

    Raises:
        InputError: n or k is below 1, or k exceeds the 2n - 1 others.

    Example:
        >>> round(mixing_expectation(10_000, 20), 5)
        0.963
    """
    if n < 1 or not 1 <= k <= 2 * n - 1:
        raise InputError(f"need n >= 1 and 1 <= k <= 2n - 1, got n = {n}, k = {k}")

    def log_choose(total: int, part: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(part + 1) - math.lgamma(total - part + 1)

    counts = range(max(0, k - (n - 1)), min(k, n) + 1)
    weights = [
        math.exp(log_choose(n, count) + log_choose(n - 1, k - count) - log_choose(2 * n - 1, k)) for count in counts
    ]
    entropies = binary_entropy(torch.tensor([count / k for count in counts], dtype=torch.float64)).tolist()
    return math.fsum(weight * entropy for weight, entropy in zip(weights, entropies, strict=True)) / math.fsum(weights)


def label_mixing(neighbours: torch.Tensor, is_target: torch.Tensor) -> tuple[float, float]:
    """(M over the other rows, M over the target rows) of a neighbour list [2n, k] and labels [2n], n of each kind."""
    count, k = is_target.numel() // 2, neighbours.shape[1]
    share = is_target[neighbours].sum(dim=1).double() / k
    relative = binary_entropy(share) / mixing_expectation(count, k)
    return float(relative[~is_target].mean()), float(relative[is_target].mean())


def mixing(target: Any, transformed: Any, *, k: int = 20, seed: int = 0) -> tuple[float, float]:
    """(m_z, m_x): label entropy among the k nearest of the union, over its expectation (METHOD section 1).

    ``target`` and ``transformed`` are float64 tensors [n, D]. The union is shuffled by ``seed`` first, so that ties
    favour neither side. 1 is perfect mixing, 0 two clouds apart.
    """
    count = target.shape[0]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(2 * count))
    is_target = order < count
    union = Corpus(torch.cat((target, transformed))[order])
    return label_mixing(nearest(union, k).indices, is_target)
