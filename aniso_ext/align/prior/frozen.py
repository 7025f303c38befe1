"""The score network with fixed weights: values and derivatives to its inputs, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import gelu, linear, silu

from aniso_ext.align.prior.network import ScoreNetwork, scale_features


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
    the input of its activation.

    Args:
        network: whose weights are copied.
        dtype: of products and activations; norms and sums in them are float32 or wider.

    Example:
        >>> import torch
        >>> network = ScoreNetwork(3, width=16, blocks=1)
        >>> frozen = FrozenScore(network, torch.float32)
        >>> frozen(torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 1), 0.5)).shape
        torch.Size([2, 3])
    """

    def __init__(self, network: ScoreNetwork, dtype: torch.dtype) -> None:
        def narrow(layer: Any) -> _Affine:
            return _Affine(layer.weight.detach().to(dtype), layer.bias.detach().to(dtype))

        self.dtype = dtype
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

    def __call__(self, phi: torch.Tensor, radii: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As of the network; differentiable in ``phi`` and ``radii``, once."""
        sin, cos = phi.sin(), phi.cos()
        with torch.autocast(phi.device.type, enabled=False):
            condition = silu(linear(scale_features(scale).to(self.dtype), *self.scale_input))
            inputs = torch.cat((sin, cos, radii), dim=-1).to(self.dtype)
            u, v = _Trunk.apply(inputs, condition, self).to(phi.dtype).chunk(2, dim=-1)
        return (v * cos - u * sin) * torch.rsqrt(scale.square() + self.spread.square())


class _Trunk(torch.autograd.Function):
    """From inputs [n, 3M] and condition [n, 64] to (u, v) [n, 2M]; no gradient to the condition."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, condition: torch.Tensor, frozen: FrozenScore) -> torch.Tensor:
        hidden = frozen.input(inputs)
        kept: list[tuple[torch.Tensor, ...]] = []
        for block in frozen.blocks:
            normed, mean, scale = torch.native_layer_norm(hidden, hidden.shape[1:], None, None, block.eps)
            gain, shift = block.film(condition).chunk(2, dim=-1)
            inner = block.first(torch.addcmul(shift, normed, gain))
            kept.append((hidden, mean, scale, inner))
            hidden = block.second(gelu(inner)).add_(hidden)
        normed, mean, scale = torch.native_layer_norm(hidden, hidden.shape[1:], *frozen.output_norm, frozen.norm_eps)
        kept.append((hidden, mean, scale, normed))
        ctx.frozen, ctx.condition, ctx.kept = frozen, condition, kept
        return frozen.output(gelu(normed))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        frozen, kept = ctx.frozen, ctx.kept
        back = _through_gelu(grad @ frozen.output.weight, kept[-1][3])
        back = _through_norm(back, kept.pop(), frozen.output_norm)
        for block in reversed(frozen.blocks):
            inner = _through_gelu(back @ block.second.weight, kept[-1][3])
            inner = (inner @ block.first.weight).mul_(block.gain(ctx.condition))
            back += _through_norm(inner, kept.pop(), (None, None))
        return back @ frozen.input.weight, None, None


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
