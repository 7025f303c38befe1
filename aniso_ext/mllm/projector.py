"""From one embedding to the tokens that a language model reads."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import gelu


class Projector(nn.Module):
    """Two layers with a GELU: [n, D] -> [n, T, H].

    Unit rows have coordinates of about 1/sqrt(D); they are scaled by sqrt(D) first, so that the usual initialisation of
    a layer meets inputs of order one.

    Args:
        embedding_width: D.
        hidden: width of the hidden layer.
        width: H, that of the language model.
        visual_tokens: T.

    Example:
        >>> import torch
        >>> Projector(8, 16, 32, visual_tokens=2)(torch.randn(3, 8)).shape
        torch.Size([3, 2, 32])
    """

    def __init__(self, embedding_width: int, hidden: int, width: int, *, visual_tokens: int = 1) -> None:
        super().__init__()
        self.embedding_width, self.visual_tokens = embedding_width, visual_tokens
        self.first = nn.Linear(embedding_width, hidden)
        self.last = nn.Linear(hidden, visual_tokens * width)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Tokens [n, T, H] of embeddings [n, D]."""
        scaled = embeddings.to(self.first.weight.dtype) * math.sqrt(self.embedding_width)
        tokens: torch.Tensor = self.last(gelu(self.first(scaled)))
        return tokens.unflatten(-1, (self.visual_tokens, -1))
