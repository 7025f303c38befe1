"""Exact nearest neighbours and retrieval by cosine, in blocks of queries.

Single precision proposes, double precision decides. A block of scores is computed in float32; a query stands when the
scores that matter differ by more than rounding and ``TIE`` can explain, and is computed again in float64 otherwise.
Scores within ``TIE`` of the k-th are ties (the resolution of float32 embeddings: copies of one row that a transform
rounded differently still tie). A row is left out of its own neighbours by its index, never by its similarity.

Several searches share one pass over the scores: ``Nearest``, ``LabelShare`` and ``Retrieval`` each look at a range of
columns, remember the queries that they could not decide, and settle those on float64 scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class UnitRows:
    """Directions of rows [N, D], in float64 and float32; ``part`` is a view of some of them."""

    def __init__(self, exact: torch.Tensor, single: torch.Tensor) -> None:
        self.exact, self.single = exact, single
        self.count, self.width = exact.shape

    @classmethod
    def of(cls, rows: torch.Tensor) -> UnitRows:
        exact = unit_rows(rows)
        return cls(exact, exact.float())

    def part(self, rows: slice) -> UnitRows:
        return UnitRows(self.exact[rows], self.single[rows])


class Search:
    """One question about the scores of each query with the corpus columns ``columns``."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns
        self._undecided: list[torch.Tensor] = []

    @property
    def undecided(self) -> torch.Tensor:
        """The queries whose float32 scores leave the answer open."""
        return torch.cat(self._undecided)

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        """Answer what scores [b, n] of queries [b], each off by at most ``bound``, decide."""
        raise NotImplementedError

    def settle(self, queries: torch.Tensor, scores: torch.Tensor) -> None:
        """Answer for queries [b] from float64 scores [b, n]."""
        raise NotImplementedError


class _TopSearch(Search):
    """A search for the k best columns."""

    def __init__(self, columns: slice, k: int) -> None:
        super().__init__(columns)
        self.k = k

    def _best(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> torch.Tensor:
        """The k best columns [b, k]; queries where the k-th and the next score are too close become undecided."""
        k = min(self.k + 1, scores.shape[1])
        best = scores.topk(k, dim=1)
        close = best.values[:, self.k - 1] - best.values[:, -1] <= 2 * bound + TIE
        self._undecided.append(queries[close & (k > self.k)])
        return best.indices[:, : self.k]

    def _split(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Columns surely among the k best, columns tied at the k-th place (masks), and how many of those to take."""
        threshold = scores.topk(self.k, dim=1).values[:, -1:]
        above = scores > threshold + TIE
        return above, (scores >= threshold - TIE) & ~above, self.k - above.sum(dim=1, keepdim=True)


class Nearest(_TopSearch):
    """The k nearest columns of each query, ``indices`` [n, k] ascending; ties go to the lower index.

    A space of duplicates therefore has the same neighbours before and after any transform that keeps duplicates
    together. ``tied`` counts the queries whose k-th place had more candidates than room.
    """

    def __init__(self, columns: slice, k: int, queries: int) -> None:
        super().__init__(columns, k)
        self.indices = torch.empty(queries, k, dtype=torch.int64)
        self.tied = 0

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        self.indices[queries] = self._best(queries, scores, bound).sort(dim=1).values

    def settle(self, queries: torch.Tensor, scores: torch.Tensor) -> None:
        above, tied, missing = self._split(scores)
        order = tied.cumsum(dim=1)
        self.indices[queries] = (above | (tied & (order <= missing))).nonzero()[:, 1].view(-1, self.k)
        self.tied += int((order[:, -1:] > missing).sum())


class LabelShare(_TopSearch):
    """The share [n] of the first ``labelled`` columns among the k nearest; ties count at their expected share."""

    def __init__(self, columns: slice, k: int, queries: int, labelled: int) -> None:
        super().__init__(columns, k)
        self.labelled = labelled
        self.share = torch.empty(queries, dtype=torch.float64)

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        self.share[queries] = (self._best(queries, scores, bound) < self.labelled).sum(dim=1).double() / self.k

    def settle(self, queries: torch.Tensor, scores: torch.Tensor) -> None:
        above, tied, missing = self._split(scores)
        expected = tied[:, : self.labelled].sum(dim=1) / tied.sum(dim=1).double() * missing[:, 0]
        self.share[queries] = (above[:, : self.labelled].sum(dim=1) + expected) / self.k


class Retrieval(Search):
    """How many columns beat, and how many others tie with, column i for query i."""

    def __init__(self, columns: slice, depth: int, queries: int) -> None:
        super().__init__(columns)
        self.depth = depth
        self.better = torch.zeros(queries, dtype=torch.int64)
        self.tied = torch.zeros(queries, dtype=torch.int64)

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        match = scores[torch.arange(queries.numel()), queries].unsqueeze(1)
        margin = 2 * bound + TIE
        better = (scores > match + margin).sum(dim=1)
        possibly = (scores >= match - margin).sum(dim=1) - 1
        self.better[queries] = better
        self._undecided.append(queries[(possibly > better) & (better < self.depth)])

    def settle(self, queries: torch.Tensor, scores: torch.Tensor) -> None:
        match = scores[torch.arange(queries.numel()), queries].unsqueeze(1)
        self.better[queries] = (scores > match + TIE).sum(dim=1)
        self.tied[queries] = ((scores - match).abs() <= TIE).sum(dim=1) - 1

    def recall(self, depth: int) -> float:
        """R@depth for depth up to that of the search: a query with ties counts by its chance in a random order."""
        return float(((depth - self.better).double() / (self.tied + 1)).clamp(0, 1).mean())


def run(queries: UnitRows, corpus: UnitRows, searches: Sequence[Search], *, own: int | None = None) -> None:
    """Answer all searches in one pass. Query i is corpus row ``own + i`` and left out there, unless ``own`` is None."""
    for rows, scores, bound in _blocks(queries, corpus):
        _leave_out_self(scores, rows, slice(0, corpus.count), own)
        for search in searches:
            search.take(rows, scores[:, search.columns], bound)
    for search in searches:
        candidates = corpus.exact[search.columns]
        for rows in search.undecided.split(max(1, EXACT_BLOCK_ELEMENTS // candidates.shape[0])):
            scores = queries.exact[rows] @ candidates.T
            _leave_out_self(scores, rows, search.columns, own)
            search.settle(rows, scores)


def _leave_out_self(scores: torch.Tensor, rows: torch.Tensor, columns: slice, own: int | None) -> None:
    if own is not None and columns.start <= own < columns.stop:
        scores[torch.arange(rows.numel()), rows + (own - columns.start)] = -torch.inf


def _blocks(queries: UnitRows, corpus: UnitRows) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Cosines of the queries with all corpus rows: (query indices [b], scores [b, N], bound on their error).

    The first row of each block is checked in float64; where float32 products run at reduced precision (a process-wide
    setting of torch) the whole block is float64.
    """
    size = max(1, BLOCK_ELEMENTS // corpus.count)
    bound = score_error(corpus.width, SINGLE_ROUNDING)
    for rows in torch.arange(queries.count).split(size):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        scores = products(queries.single[part], corpus.single)
        error = float((corpus.exact @ queries.exact[part.start] - scores[0]).abs().max())
        if error <= bound:
            yield rows, scores, bound
        else:
            yield rows, queries.exact[part] @ corpus.exact.T, score_error(corpus.width, DOUBLE_ROUNDING)


def nearest(rows: torch.Tensor, k: int) -> Nearest:
    """The k nearest other rows of each of the rows [n, D], n > k."""
    units = UnitRows.of(rows)
    search = Nearest(slice(0, units.count), k, units.count)
    run(units, units, [search], own=0)
    return search


def overlap(first: Nearest, second: Nearest) -> float:
    """Mean share of common neighbours of two searches with the same queries and k."""
    merged = torch.cat((first.indices, second.indices), dim=1).sort(dim=1).values
    return float((merged[:, 1:] == merged[:, :-1]).sum()) / first.indices.numel()
