"""Both passes of the refiner written out: what is held between them, and when it is given back, is decided here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu

if TYPE_CHECKING:
    from aniso_ext.align.refiner.network import Refiner


@dataclass
class Kept:
    """Of a forward pass: its rows, the inputs of the activations, and what the last layer saw if it saw all rows.

    ``rows`` [n, 3M + D] are standardised; ``inputs`` are one [n, hidden] a layer before the last.
    """

    rows: torch.Tensor
    inputs: list[torch.Tensor]
    hidden: torch.Tensor | None


class Passes:
    """The layers of a refiner on rows in ``dtype``, ``chunk_rows`` at a time, without autograd.

    Narrow copies of the weights are made when a product needs them and dropped after it where all rows go at once:
    together they are as large as half of the weights. Where there are several chunks they are kept for all of them.

    Args:
        refiner: float32 or wider.
        dtype: of products and activations.
        chunk_rows: rows of a product.
        compiled: whether torch.compile fuses activations with their sum.
    """

    def __init__(self, refiner: Refiner, dtype: torch.dtype, chunk_rows: int, *, compiled: bool = False) -> None:
        self.refiner, self.dtype, self.chunk_rows = refiner, dtype, chunk_rows
        self.layers = [refiner.first, *refiner.hidden, refiner.last]
        self._narrow: dict[int, torch.Tensor] = {}
        self._add_activation = _fused() if compiled else _add_activation

    def standardised(self, state: torch.Tensor) -> torch.Tensor:
        """(state - mean)/std in the dtype of the passes, computed at least in that of mean and std."""
        mean, std = self.refiner.input_mean, self.refiner.input_std
        if self.dtype == mean.dtype:
            return (state - mean).div_(std)
        rows = torch.empty(state.shape, dtype=self.dtype, device=state.device)
        return torch.addcmul(-mean / std, state, 1 / std, out=rows)

    @torch.no_grad()
    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """Deltas [n, 2M + D] of standardised rows, and what the backward pass needs."""
        inputs = [self._empty(rows, layer) for layer in self.layers[:-1]]
        deltas = self._empty(rows, self.layers[-1])
        several = len(rows) > self.chunk_rows
        hidden = rows
        for piece in self._pieces(rows):
            hidden, places, out = rows[piece], [place[piece] for place in inputs], deltas[piece]
            for layer, place in enumerate(places):
                self._apply(layer, hidden, place, several)
                hidden = self._add_activation(hidden, place) if layer else gelu(place)
            self._apply(len(places), hidden, out, several)
        self._narrow.clear()
        return deltas, Kept(rows, inputs, None if several or not inputs else hidden)

    @torch.no_grad()
    def backward(self, kept: Kept, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of the parameters in their order, from that of the deltas; uses up what was kept.

        Those of the weights are in the dtype of the passes where all rows went at once, as a product leaves them, and
        sums in that of the weights otherwise; those of the biases are in that of the weights.
        """
        several = len(grad) > self.chunk_rows
        found: list[torch.Tensor] = []
        for piece in self._pieces(grad):
            rows, back, inputs = kept.rows[piece], grad[piece], [place[piece] for place in kept.inputs]
            hidden, kept.hidden = kept.hidden, None
            if not several:
                kept.inputs.clear()
            gradients: list[torch.Tensor] = []
            upstream = None
            for layer in range(len(inputs), 0, -1):
                weight = self._weight(layer, several)
                upstream = back @ weight if upstream is None else upstream.addmm_(back, weight)
                del weight
                hidden = self._activated(inputs) if hidden is None else hidden
                gradients[:0] = self._gradients(layer, back, hidden, several)
                hidden = None
                # the inputs of this activation are needed no more: the gradient to them takes their place
                back = inputs.pop()
                torch.ops.aten.gelu_backward.grad_input(upstream, back, grad_input=back)
            del upstream
            gradients[:0] = self._gradients(0, back, rows, several)
            if not found:
                found = gradients
            else:
                for total, part in zip(found, gradients, strict=True):
                    total += part
        self._narrow.clear()
        return found

    def _activated(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The hidden rows after the activations of these inputs."""
        hidden = gelu(inputs[0])
        for value in inputs[1:]:
            hidden = self._add_activation(hidden, value)
        return hidden

    def _pieces(self, rows: torch.Tensor) -> Iterator[slice]:
        return (slice(first, first + self.chunk_rows) for first in range(0, len(rows), self.chunk_rows))

    def _empty(self, rows: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        return torch.empty(len(rows), layer.out_features, dtype=self.dtype, device=rows.device)

    def _apply(self, layer: int, rows: torch.Tensor, out: torch.Tensor, keep: bool) -> None:
        bias = self.layers[layer].bias.detach().to(self.dtype)
        torch.addmm(bias, rows, self._weight(layer, keep).T, out=out)

    def _weight(self, layer: int, keep: bool) -> torch.Tensor:
        if layer in self._narrow:
            return self._narrow[layer]
        weight = self.layers[layer].weight.detach().to(self.dtype)
        if keep:
            self._narrow[layer] = weight
        return weight

    def _gradients(self, layer: int, grad: torch.Tensor, rows: torch.Tensor, several: bool) -> list[torch.Tensor]:
        wide = self.layers[layer].weight.dtype
        weight = product(grad.T, rows, wide) if several else grad.T @ rows
        return [weight, column_sums(grad, wide)]


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right of equal narrow dtypes, summed and returned in a wider one."""
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def column_sums(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """rows.sum(dim=0, dtype=dtype), on CUDA as a product with ones: a reduction takes up to 130 MB of memory."""
    if not rows.is_cuda:
        return rows.sum(dim=0, dtype=dtype)
    if rows.dtype == dtype:
        return torch.mv(rows.T, rows.new_ones(len(rows)))
    return product(rows.new_ones(1, len(rows)), rows, dtype)[0]


def _add_activation(hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """hidden + gelu(inputs), in its place."""
    return hidden.add_(gelu(inputs))


@functools.cache
def _fused() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(_add_activation, dynamic=False)
