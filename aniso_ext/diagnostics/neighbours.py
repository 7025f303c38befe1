"""Exact nearest neighbours and retrieval by cosine, in blocks of queries.

Single precision proposes, double precision decides. A block of scores is computed in float32; a row stands when its
k-th and (k+1)-th scores differ by more than rounding and ``TIE`` can explain, and is computed again in float64
otherwise. Scores within ``TIE`` of the k-th are ties (the resolution of float32 embeddings: copies of one row that a
transform rounded differently still tie), and ties go to the lower index, so that a space of duplicates has the same
neighbours before and after any transform that keeps duplicates together. A row is left out of its own neighbours by
its index, never by its similarity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

TIE = 1e-6
BLOCK_ELEMENTS = 2**24
EXACT_BLOCK_ELEMENTS = 2**22
SINGLE_ROUNDING = 2.0**-24
DOUBLE_ROUNDING = 2.0**-53


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, D] over their norms; a zero row stays zero (its cosines are 0)."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


def score_error(width: int, rounding: float) -> float:
    """Bound on the error of a computed cosine of unit rows: (4 sqrt(D) + 2) u for unit roundoff u.

    The first term is the probabilistic bound on the rounding of a D-term inner product (Higham and Mary 2019) at four
    standard deviations of its worst case, the second the rounding of both operands.
    """
    return (4 * width**0.5 + 2) * rounding


@cache
def _onednn_products() -> bool:
    """Whether oneDNN's fp32 inner product can be called directly; on many processors it beats the default BLAS."""
    if not torch.backends.mkldnn.is_available():
        return False
    probe = torch.ones(2, 2)
    try:
        torch.ops.mkldnn._linear_pointwise(probe, probe, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def products(queries: torch.Tensor, corpus: torch.Tensor) -> torch.Tensor:
    """queries @ corpus^T, [b, N] for float32 [b, D] and [N, D]."""
    if _onednn_products():
        return torch.ops.mkldnn._linear_pointwise(queries, corpus, None, "none", [], "")
    return queries @ corpus.T


class Corpus:
    """Unit rows [N, D] that are searched, held in float64 and float32."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.exact = unit_rows(rows)
        self.single = self.exact.float()
        self.count, self.width = rows.shape

    def blocks(self, queries: Corpus) -> Iterator[tuple[slice, torch.Tensor, float]]:
        """Cosines of the queries with all rows: (query slice, scores [b, N], bound on their error).

        The first row of each block is checked in float64; where float32 products run at reduced precision (a
        process-wide setting of torch) the whole block is float64.
        """
        rows = max(1, BLOCK_ELEMENTS // self.count)
        bound = score_error(self.width, SINGLE_ROUNDING)
        for start in range(0, queries.count, rows):
            part = slice(start, min(start + rows, queries.count))
            scores = products(queries.single[part], self.single)
            error = float((self.exact @ queries.exact[start] - scores[0]).abs().max())
            if error <= bound:
                yield part, scores, bound
            else:
                yield part, queries.exact[part] @ self.exact.T, score_error(self.width, DOUBLE_ROUNDING)

    def exact_rows(self, queries: Corpus, indices: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Float64 cosines of chosen queries: (their indices [b], scores [b, N])."""
        for part in indices.split(max(1, EXACT_BLOCK_ELEMENTS // self.count)):
            yield part, queries.exact[part] @ self.exact.T


@dataclass(frozen=True)
class Neighbours:
    """``indices`` [N, k] of the nearest other rows, ascending; in ``tied`` rows the k-th place had several candidates."""

    indices: torch.Tensor
    tied: int


def nearest(corpus: Corpus, k: int) -> Neighbours:
    """The k nearest other rows of each row of a corpus with more than k rows; ties go to the lower index."""
    found = torch.empty(corpus.count, k, dtype=torch.int64)
    undecided, tied = [], 0
    for part, scores, bound in corpus.blocks(corpus):
        own = torch.arange(part.start, part.stop)
        scores[own - part.start, own] = -torch.inf
        best = scores.topk(k + 1, dim=1)
        found[part] = best.indices[:, :k]
        undecided.append(own[best.values[:, k - 1] - best.values[:, k] <= 2 * bound + TIE])
    for rows, scores in corpus.exact_rows(corpus, torch.cat(undecided)):
        scores[torch.arange(rows.numel()), rows] = -torch.inf
        found[rows], choices = _lowest_index_nearest(scores, k)
        tied += choices
    return Neighbours(found.sort(dim=1).values, tied)


def _lowest_index_nearest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
    """The k best columns [b, k] of float64 scores [b, N], ties going to the lower index; and how many rows had ties."""
    threshold = scores.topk(k, dim=1).values[:, -1:]
    above = scores > threshold + TIE
    tied = (scores >= threshold - TIE) & ~above
    missing = k - above.sum(dim=1, keepdim=True)
    order = tied.cumsum(dim=1)
    chosen = above | (tied & (order <= missing))
    return chosen.nonzero()[:, 1].view(-1, k), int((order[:, -1:] > missing).sum())


def overlap(first: Neighbours, second: Neighbours) -> float:
    """Mean share of common neighbours of two lists of the same shape."""
    merged = torch.cat((first.indices, second.indices), dim=1).sort(dim=1).values
    return float((merged[:, 1:] == merged[:, :-1]).sum()) / first.indices.numel()


def recall(queries: Corpus, corpus: Corpus, depths: tuple[int, ...]) -> tuple[float, ...]:
    """R@depth for each depth: how often row i of the corpus is among the best ``depth`` for query i.

    Where others tie with row i, its expected share under a random order of the ties counts.
    """
    better = torch.zeros(queries.count, dtype=torch.int64)
    tied = torch.zeros(queries.count, dtype=torch.int64)
    undecided = []
    for part, scores, bound in corpus.blocks(queries):
        own = torch.arange(part.start, part.stop)
        match = scores[own - part.start, own].unsqueeze(1)
        margin = 2 * bound + TIE
        surely = (scores > match + margin).sum(dim=1)
        possibly = (scores >= match - margin).sum(dim=1) - 1
        better[part] = surely
        undecided.append(own[(possibly > surely) & (surely < max(depths))])
    for rows, scores in corpus.exact_rows(queries, torch.cat(undecided)):
        match = scores[torch.arange(rows.numel()), rows].unsqueeze(1)
        better[rows] = (scores > match + TIE).sum(dim=1)
        tied[rows] = ((scores - match).abs() <= TIE).sum(dim=1) - 1
    return tuple(float(((depth - better) / (tied + 1)).clamp(0, 1).mean()) for depth in depths)
