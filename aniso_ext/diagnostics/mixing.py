"""How well two clouds mix: entropy of the labels among nearest neighbours, against the closed form for no structure."""

from __future__ import annotations

import math

import torch

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
