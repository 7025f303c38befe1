"""The normal distribution wrapped around the circle: density, score, samples (METHOD D7)."""

from __future__ import annotations

import math

import torch

from aniso_ext.errors import InputError

SMALLEST_SCALE, LARGEST_SCALE = 0.03, 1.5
"""Range of the noise scale s: past 2 a wrapped normal is uniform to the eye and its score carries no signal."""
_TWO_PI = 2 * math.pi


def wrap(angle: torch.Tensor) -> torch.Tensor:
    """The angle in [-pi, pi) that differs by whole turns; angles in that range come back to the bit, gradient 1.

    Example:
        >>> import torch
        >>> wrap(torch.tensor([0.25, 2 * torch.pi + 0.25, -2 * torch.pi]))
        tensor([0.2500, 0.2500, 0.0000])
    """
    turned = angle - _TWO_PI * torch.floor(angle / _TWO_PI + 0.5)
    # One rounding error past either end is brought to the other.
    turned = torch.where(turned < -math.pi, turned + _TWO_PI, turned)
    return torch.where(turned >= math.pi, turned - _TWO_PI, turned)


def score(delta: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """d/d delta of the log density of a wrapped normal at distance ``delta`` from its centre.

    -sum_n w_n (delta + 2 pi n)/s^2 with w = softmax_n(-(delta + 2 pi n)^2/(2 s^2)), |n| <= 1: for delta in [-pi, pi]
    and s <= 1.5 the terms left out amount to at most 4e-7.

    Args:
        delta: wrapped differences, any shape, floating.
        scale: s, a number or a tensor that broadcasts against ``delta``.

    Returns:
        The score, shape and dtype of the broadcast arguments.

    Example:
        >>> import torch
        >>> score(torch.tensor([0.0, 0.05]), 0.1)
        tensor([-0.0000, -5.0000])
    """
    squared, images = _images(delta, scale)
    weights = torch.softmax(-images.square() / (2 * squared.unsqueeze(-1)), dim=-1)
    return -(weights * images).sum(-1) / squared


def log_density(delta: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Log density at distance ``delta`` in [-pi, pi] from the centre, with the terms |n| <= 1 as in :func:`score`."""
    squared, images = _images(delta, scale)
    terms = torch.logsumexp(-images.square() / (2 * squared.unsqueeze(-1)), dim=-1)
    return terms - 0.5 * torch.log(_TWO_PI * squared)


def sample(center: torch.Tensor, scale: torch.Tensor | float, generator: torch.Generator) -> torch.Tensor:
    """wrap(center + s eps) with standard normal eps, shape of ``center``."""
    noise = torch.randn(center.shape, generator=generator, device=center.device, dtype=center.dtype)
    return wrap(center + scale * noise)


def check_scale(scale: float) -> None:
    """Refuse a noise scale outside the range that the formulas and the networks are made for."""
    if not SMALLEST_SCALE * (1 - 1e-6) <= scale <= LARGEST_SCALE * (1 + 1e-6):
        raise InputError(f"the noise scale must lie in [{SMALLEST_SCALE}, {LARGEST_SCALE}], got {scale}")


def _images(delta: torch.Tensor, scale: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """s^2, broadcast to ``delta``, and delta + 2 pi n along a last dimension."""
    squared = torch.as_tensor(scale, dtype=delta.dtype, device=delta.device).square().expand_as(delta)
    turns = torch.arange(-1, 2, dtype=delta.dtype, device=delta.device) * _TWO_PI
    return squared, delta.unsqueeze(-1) + turns
