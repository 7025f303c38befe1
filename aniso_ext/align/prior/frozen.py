"""The score network with fixed weights: values and derivatives to its inputs, and nothing else."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn.functional import gelu, silu

from aniso_ext.align.prior.network import ScoreNetwork, scale_features

Kept = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
"""Of each norm: its input, mean and inverse deviation, and the input of the activation that follows."""


class _Affine(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, rows, self.weight.T)


class _Block(NamedTuple):
    """A residual block; what ``film`` gives is 1 + gain and shift."""

    film: _Affine
    first: _Affine
    second: _Affine
    eps: float

    @property
    def gain(self) -> _Affine:
        width = len(self.second.bias)
        return _Affine(self.film.weight[:width], self.film.bias[:width])


class FrozenScore:
    """:class:`~aniso_ext.align.prior.network.ScoreNetwork` at fixed weights, copied once in the dtype of its products.

    Stage II differentiates the score to phases and radii alone. Autograd would keep what the gradients of the weights
    need, and autocast would widen every activation for the norms and narrow it again; here a block keeps its input and
    the input of its activation. No autograd: both passes are written out.

    Args:
        network: whose weights are copied.
        dtype: of products and activations; norms and sums in them are float32 or wider.
        compiled: whether torch.compile fuses norms and modulation.

    Example:
        >>> import torch
        >>> frozen = FrozenScore(ScoreNetwork(3, width=16, blocks=1), torch.float32)
        >>> condition = frozen.condition(torch.full((2, 1), 0.5))
        >>> uv, kept = frozen.forward(torch.zeros(2, 9), condition)
        >>> uv.shape, frozen.backward(torch.ones(2, 6), condition, kept).shape
        (torch.Size([2, 6]), torch.Size([2, 9]))
    """

    def __init__(self, network: ScoreNetwork, dtype: torch.dtype, *, compiled: bool = False) -> None:
        def narrow(layer: Any) -> _Affine:
            return _Affine(layer.weight.detach().to(dtype), layer.bias.detach().to(dtype))

        self.dtype = dtype
        parts: tuple[Any, Any] = _fused() if compiled else (_modulated, _unmodulated)
        self._modulate, self._unmodulate = parts
        self.spread = network.spread
        self.scale_input, self.input, self.output = map(narrow, (network.scale_input, network.input, network.output))
        self.output_norm, self.norm_eps = narrow(network.output_norm), network.output_norm.eps
        self.blocks: list[_Block] = []
        blocks: list[Any] = list(network.blocks)
        for block in blocks:
            bias = block.film.bias.detach().clone()
            bias[: len(bias) // 2] += 1
            film = _Affine(block.film.weight.detach().to(dtype), bias.to(dtype))
            self.blocks.append(_Block(film, narrow(block.first), narrow(block.second), block.norm.eps))

    def condition(self, scale: torch.Tensor) -> torch.Tensor:
        """What the blocks are modulated by, [n, 64] for s [n, 1]."""
        return silu(self.scale_input(scale_features(scale).to(self.dtype)))

    def forward(self, inputs: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """(u, v) [n, 2M] of [sin phi, cos phi, radii] [n, 3M], and what the backward pass needs."""
        hidden = self.input(inputs)
        kept: Kept = []
        for block in self.blocks:
            modulated, mean, scale = self._modulate(hidden, block.film(condition), block.eps)
            inner = block.first(modulated)
            kept.append((hidden, mean, scale, inner))
            hidden = block.second(gelu(inner)).add_(hidden)
        normed, mean, scale = torch.native_layer_norm(hidden, hidden.shape[1:], *self.output_norm, self.norm_eps)
        kept.append((hidden, mean, scale, normed))
        return self.output(gelu(normed)), kept

    def backward(self, grad: torch.Tensor, condition: torch.Tensor, kept: Kept) -> torch.Tensor:
        """The gradient to the inputs, from that to (u, v); uses up what was kept."""
        back = _through_gelu(grad @ self.output.weight, kept[-1][3])
        back = _through_norm(back, kept.pop(), self.output_norm)
        for block in reversed(self.blocks):
            inner = _through_gelu(back @ block.second.weight, kept[-1][3])
            inner = inner @ block.first.weight
            back = self._unmodulate(back, inner, block.gain(condition), *kept.pop()[:3])
        return back @ self.input.weight


def _modulated(hidden: torch.Tensor, film: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """norm(h) gain + shift, and mean and inverse deviation of the norm."""
    normed, mean, scale = torch.native_layer_norm(hidden, hidden.shape[1:], None, None, eps)
    gain, shift = film.chunk(2, dim=-1)
    return torch.addcmul(shift, normed, gain), mean, scale


def _unmodulated(
    back: torch.Tensor,
    grad: torch.Tensor,
    gain: torch.Tensor,
    hidden: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """``back`` and what comes to h through its modulated norm, whose gradient is ``grad``; both are used up."""
    return back.add_(_through_norm(grad.mul_(gain), (hidden, mean, scale, grad), (None, None)))


@functools.cache
def _fused() -> tuple[Any, Any]:
    return torch.compile(fused_modulated, dynamic=False), torch.compile(fused_unmodulated, dynamic=False)


def fused_modulated(hidden: torch.Tensor, film: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """The same in operators that a compiler makes one kernel of; sums are float32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    mean = wide.mean(dim=1, keepdim=True)
    centred = wide - mean
    scale = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    gain, shift = film.to(wide.dtype).chunk(2, dim=-1)
    return (centred * scale * gain + shift).to(hidden.dtype), mean, scale


def fused_unmodulated(
    back: torch.Tensor,
    grad: torch.Tensor,
    gain: torch.Tensor,
    hidden: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The same in operators that a compiler makes one kernel of."""
    normed = (hidden.to(mean.dtype) - mean) * scale
    slope = grad.to(mean.dtype) * gain.to(mean.dtype)
    moved = slope - slope.mean(dim=1, keepdim=True) - normed * (slope * normed).mean(dim=1, keepdim=True)
    return (back.to(mean.dtype) + moved * scale).to(back.dtype)


def _through_gelu(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The gradient to the inputs of an activation, in the memory of the gradient to its outputs."""
    return torch.ops.aten.gelu_backward.grad_input(grad, inputs, grad_input=grad)


def _through_norm(
    grad: torch.Tensor, kept: tuple[torch.Tensor, ...], affine: tuple[torch.Tensor | None, torch.Tensor | None]
) -> torch.Tensor:
    hidden, mean, scale, _ = kept
    only_rows = [True, False, False]
    found: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
        grad, hidden, hidden.shape[1:], mean, scale, *affine, only_rows
    )[0]
    return found
