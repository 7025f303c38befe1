"""Moments behind the gap simulator, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aniso_ext.worlds.spherical import (
    bend_for,
    bisect,
    bounded,
    correlation_for,
    direction_moments,
    paired_moments,
    variances_for_directions,
)


@pytest.mark.parametrize("bend", [0.05, 0.7, 2.0, 8.0])
def test_bend_inverts_the_second_moment(bend: float) -> None:
    """E b²z²/(1 + b²z²) = 1 - sqrt(pi/2)/b exp(1/(2b²)) erfc(1/(b sqrt 2))."""
    inner = 1.0 / (bend * math.sqrt(2.0))
    if inner > 10.0:  # erfc underflows beside the exponential: 1 - (1 - b² + 3b⁴ - 15b⁶ + ...)
        second = bend**2 - 3.0 * bend**4 + 15.0 * bend**6
        tolerance = 105.0 * bend**8 / second
    else:
        second = 1.0 - math.sqrt(math.pi / 2.0) / bend * math.exp(inner**2) * math.erfc(inner)
        tolerance = 1e-6 + math.exp(-2.0 * math.pi / (bend * 15.0 / 240.0)) * bend**2  # trapezoid, pole at i/bend
    assert bend_for(second) == pytest.approx(bend, rel=tolerance)


def test_direction_moments_in_the_plane() -> None:
    """In two dimensions E[(g/|g|)_1²] = s_1 / (s_1 + s_2) with the standard deviations s."""
    deviations = np.array([3.0, 0.5])
    np.testing.assert_allclose(direction_moments(deviations**2), deviations / deviations.sum(), rtol=1e-4)


def test_direction_moments_of_an_isotropic_gaussian() -> None:
    np.testing.assert_allclose(direction_moments(np.full(37, 2.5)), 1.0 / 37, rtol=1e-12)


def test_direction_moments_against_a_large_draw() -> None:
    variances = np.array([4.0, 2.0, 1.0, 0.5, 0.25, 0.1])
    g = np.random.default_rng(0).standard_normal((200_000, 6)) * np.sqrt(variances)
    squares = g**2 / np.square(g).sum(axis=1, keepdims=True)
    error = 5.0 * squares.std(axis=0) / math.sqrt(len(g))
    assert (np.abs(direction_moments(variances) - squares.mean(axis=0)) < error).all()


def test_variances_invert_direction_moments() -> None:
    shares = np.geomspace(1.0, 0.01, 50)
    shares /= shares.sum()
    np.testing.assert_allclose(direction_moments(variances_for_directions(shares)), shares, rtol=1e-8)


def test_paired_moments_against_a_large_draw() -> None:
    rng = np.random.default_rng(1)
    z, e = rng.standard_normal((2, 400_000))
    w_x, w_y = bounded(z, 0.9), bounded(0.8 * z + 0.6 * e, 1.4)
    u = (1.0 - w_x**2) * (1.0 - w_y**2)
    found = paired_moments(0.9, 1.4, 0.8)
    pairs = [(w_x * w_y, found.product), ((w_x * w_y) ** 2, found.squares), (np.sqrt(u), found.rest_product)]
    for values, exact in [*pairs, (u, found.rest_squares)]:
        assert abs(values.mean() - exact) < 5.0 * values.std() / math.sqrt(values.size)


def test_correlation_inverts_the_product() -> None:
    product = paired_moments(1.1, 1.3, 0.6).product
    assert correlation_for(1.1, 1.3, product) == pytest.approx(0.6, abs=1e-9)
    assert correlation_for(1.1, 1.3, 2.0) == 1.0


def test_bisect_answers_with_an_end_when_there_is_no_root() -> None:
    assert bisect(lambda v: v + 1.0, 0.0, 1.0) == 0.0
    assert bisect(lambda v: v - 2.0, 0.0, 1.0) == 1.0
    assert bisect(lambda v: v * v - 0.5, 0.0, 1.0) == pytest.approx(math.sqrt(0.5))
