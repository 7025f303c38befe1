"""Unit vectors with prescribed second moments.

A row of the gap simulator is put on the sphere by construction instead of being divided by its norm afterwards,

    x = a m^ + sqrt(1 - a²) (w e + sqrt(1 - w²) g/|g|),

``a`` its coordinate along the mean direction ``m^``, ``w`` a bounded coordinate along one strong direction ``e`` and
``g`` a centred Gaussian in what remains. Mean and covariance are then exact: only the second moments of ``w(z)`` and of
``g/|g|`` have to be inverted, which this module does by quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The trapezoid rule converges geometrically for these analytic integrands; the spacing resolves bend² <= 200.
_NODES = np.linspace(-7.5, 7.5, 241)
_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()
_PAIR_WEIGHTS = np.outer(_WEIGHTS, _WEIGHTS)


def bisect(function: Callable[[float], float], low: float, high: float, *, steps: int = 60) -> float:
    """Root of an increasing function on ``[low, high]``; the nearer end when there is none inside."""
    if function(low) >= 0.0:
        return low
    if function(high) <= 0.0:
        return high
    for _ in range(steps):
        middle = 0.5 * (low + high)
        if function(middle) < 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def bounded(z: Array, bend: float) -> Array:
    """``w(z) = b z / sqrt(1 + b² z²)`` in (-1, 1): odd, monotone, a scaled Gaussian for a small bend ``b``."""
    return bend * z / np.sqrt(1.0 + (bend * z) ** 2)


def bend_for(second_moment: float) -> float:
    """The bend at which ``E w(z)² = second_moment`` for a standard normal ``z``."""
    return bisect(lambda b: float((_WEIGHTS * bounded(_NODES, b) ** 2).sum()) - second_moment, 1e-6, 15.0)


@dataclass(frozen=True)
class PairedMoments:
    """Moments of ``w_x = w(z_x)`` and ``w_y = w(z_y)``, with ``u = 1 - w²`` the share left to the other directions."""

    product: float
    squares: float
    rest_product: float
    rest_squares: float


def paired_moments(bend_x: float, bend_y: float, correlation: float) -> PairedMoments:
    """``E w_x w_y``, ``E w_x² w_y²``, ``E sqrt(u_x u_y)`` and ``E u_x u_y`` at correlation(z_x, z_y)."""
    z_y = correlation * _NODES[:, None] + np.sqrt(max(0.0, 1.0 - correlation**2)) * _NODES[None, :]
    w_x, w_y = bounded(_NODES, bend_x)[:, None], bounded(z_y, bend_y)

    def mean(values: Array) -> float:
        return float((values * _PAIR_WEIGHTS).sum())

    u = (1.0 - w_x**2) * (1.0 - w_y**2)
    return PairedMoments(mean(w_x * w_y), mean((w_x * w_y) ** 2), mean(np.sqrt(u)), mean(u))


def correlation_for(bend_x: float, bend_y: float, product: float) -> float:
    """The correlation of ``z_x`` and ``z_y`` at which ``E w_x w_y = product``; 1 when even that is too little."""
    return bisect(lambda c: paired_moments(bend_x, bend_y, c).product - product, 0.0, 1.0, steps=40)


def direction_moments(variances: Array) -> Array:
    """``E[(g/|g|)_i²]`` for ``g ~ N(0, diag(variances))``, shape as the input, summing to 1.

    The value is ``l_i ∫_0^∞ (1 + 2 l_i s)^{-1} prod_j (1 + 2 l_j s)^{-1/2} ds``; with ``s = e^v`` the trapezoid rule
    converges geometrically.
    """
    scaled = variances / variances.sum()
    v = np.linspace(-18.0, 12.0, 181)
    s = np.exp(v)
    growth = 1.0 + 2.0 * scaled[:, None] * s
    weight = np.exp(-0.5 * np.log(growth).sum(axis=0)) * s
    moments = scaled * (weight / growth).sum(axis=1)
    return moments / moments.sum()


def variances_for_directions(shares: Array) -> Array:
    """The Gaussian variances whose directions have ``E[(g/|g|)_i²] = shares`` (``shares`` sums to 1)."""
    variances = shares.copy()
    for _ in range(30):
        ratio = shares / direction_moments(variances)
        variances *= ratio
        variances /= variances.sum()
        if np.abs(ratio - 1.0).max() < 1e-10:
            break
    return variances
