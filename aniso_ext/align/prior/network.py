"""The periodic score network of Stage I (METHOD D8)."""

from __future__ import annotations

import math

import torch
from torch import nn

from aniso_ext.align.prior.wrapped_normal import LARGEST_SCALE, SMALLEST_SCALE

WIDTH = 512
BLOCKS = 4
SCALE_FEATURES = 64
_FREQUENCIES = 4
_LOG_MIDDLE = (math.log(LARGEST_SCALE) + math.log(SMALLEST_SCALE)) / 2
_LOG_HALF_SPAN = (math.log(LARGEST_SCALE) - math.log(SMALLEST_SCALE)) / 2


class ScoreNetwork(nn.Module):
    """Score of noisy phases, periodic by construction.

        score_k = (-u_k sin phi_k + v_k cos phi_k)/sqrt(s^2 + spread_k^2)

    with (u, v) from a residual MLP on [sin phi, cos phi, r], r the standardised log radii; every block is modulated by
    the noise scale s (FiLM on log s). phi enters only through its sine and cosine. The divisor is the size that a score
    has at noise s if the phases spread by ``spread`` [M] around what is known of them, so that the network's own
    outputs stay near 1. The output layer starts at zero, hence the score does.

    Args:
        phases: M.
        width: of the hidden layers.
        blocks: number of residual blocks.

    Shapes:
        phi [n, M], radii [n, M], s [n, 1] -> score [n, M].

    Example:
        >>> import torch
        >>> network = ScoreNetwork(3, width=16, blocks=1)
        >>> network(torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 1), 0.5)).tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    spread: torch.Tensor

    def __init__(self, phases: int, *, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(phases), persistent=False)
        self.scale_input = nn.Linear(1 + 2 * _FREQUENCIES, SCALE_FEATURES)
        self.input = nn.Linear(3 * phases, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 2 * phases)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, phi: torch.Tensor, radii: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        sin, cos = phi.sin(), phi.cos()
        condition = nn.functional.silu(self.scale_input(scale_features(scale)))
        hidden = self.input(torch.cat((sin, cos, radii), dim=-1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        u, v = self.output(nn.functional.gelu(self.output_norm(hidden))).to(phi.dtype).chunk(2, dim=-1)
        return (v * cos - u * sin) * torch.rsqrt(scale.square() + self.spread.square())


class _Block(nn.Module):
    """h + W2 gelu(W1 (norm(h) (1 + gain) + shift)), (gain, shift) linear in the condition and zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(SCALE_FEATURES, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gain, shift = self.film(condition).chunk(2, dim=-1)
        modulated = self.norm(hidden) * (1 + gain) + shift
        moved: torch.Tensor = hidden + self.second(nn.functional.gelu(self.first(modulated)))
        return moved


def scale_features(scale: torch.Tensor) -> torch.Tensor:
    """Position of log s in its range, in [-1, 1], and its first Fourier features: [n, 9] for s [n, 1]."""
    position = (scale.log() - _LOG_MIDDLE) / _LOG_HALF_SPAN
    angles = position * (math.pi * torch.arange(1, _FREQUENCIES + 1, dtype=scale.dtype, device=scale.device) / 2)
    return torch.cat((position, angles.sin(), angles.cos()), dim=-1)
