"""Exact nearest neighbours and retrieval by cosine, in blocks of queries.

Single precision proposes, double precision decides. A block of scores is computed in float32; a query stands when the
scores that matter differ by more than rounding and ``TIE`` can explain, and is computed again in float64 otherwise.
Scores within ``TIE`` of the k-th are ties (the resolution of float32 embeddings: copies of one row that a transform
rounded differently still tie). A row is left out of its own neighbours by its index, never by its similarity.

Several searches share one pass over the scores: ``Nearest``, ``LabelShare`` and ``Retrieval`` each look at a range of
columns, remember the queries that they could not decide, and settle those on float64 scores. They are answered here on
the CPU, and in :mod:`aniso_ext.diagnostics.candidates` on a GPU.
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
    """One question about the scores of each query with the corpus columns ``columns``; columns count from its start."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns
        self._undecided: list[torch.Tensor] = []

    def take_undecided(self) -> torch.Tensor:
        """The queries whose answer is still open, which are forgotten here."""
        undecided = torch.cat(self._undecided) if self._undecided else torch.empty(0, dtype=torch.int64)
        self._undecided = []
        return undecided

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        """Answer what scores [b, n] of queries [b] with all columns, each off by at most ``bound``, decide."""
        raise NotImplementedError

    def settle(self, queries: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor) -> None:
        """Answer for queries [b] from float64 scores [b, c] with ``columns`` [b or 1, c], ascending in each row."""
        raise NotImplementedError

    def consider(self, queries: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor, limit: torch.Tensor) -> None:
        """Settle the queries for which columns that are not listed, of scores up to ``limit`` [b], cannot matter."""
        decided = self._decided(queries, scores, limit)
        self._undecided.append(queries[~decided])
        self.settle(queries[decided], scores[decided], columns[decided])

    def _decided(self, queries: torch.Tensor, scores: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def floor(self, queries: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[b], no column that scores less matters to these undecided queries, of which ``scores`` [b, w] are known."""
        raise NotImplementedError


class Nearest(Search):
    """The k nearest columns of each query, ``indices`` [n, k] ascending; ties go to the lower index.

    A space of duplicates therefore has the same neighbours before and after any transform that keeps duplicates
    together. ``tied`` [n] marks the queries whose k-th place had more candidates than room, ``following`` [n] is the
    column that would come next.
    """

    def __init__(self, columns: slice, k: int, queries: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns)
        self.k = k
        self.indices = torch.empty(queries, k, dtype=torch.int32, device=device)
        self.following = torch.empty(queries, dtype=torch.int32, device=device)
        self.tied = torch.zeros(queries, dtype=torch.bool, device=device)

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        best = scores.topk(min(self.k + 1, scores.shape[1]), dim=1)
        close = best.values[:, self.k - 1] - best.values[:, -1] <= 2 * bound + TIE
        self._undecided.append(queries[close & (best.indices.shape[1] > self.k)])
        self.indices[queries] = best.indices[:, : self.k].sort(dim=1).values.int()
        self.following[queries] = best.indices[:, -1].int()

    def _decided(self, queries: torch.Tensor, scores: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        return scores.topk(self.k, dim=1).values[:, -1] - TIE > limit

    def floor(self, queries: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(min(self.k + 1, scores.shape[1]), dim=1).values[:, -1] - 2 * TIE

    def settle(self, queries: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor) -> None:
        if queries.numel() == 0:
            return
        threshold = scores.topk(self.k, dim=1).values[:, -1:]
        above = scores > threshold + TIE
        tied = (scores >= threshold - TIE) & ~above
        missing = self.k - above.sum(dim=1, keepdim=True)
        order = tied.cumsum(dim=1, dtype=torch.int32)
        self.tied[queries] = order[:, -1] > missing[:, 0]
        columns = columns.expand(scores.shape)
        chosen = above | (tied & (order <= missing))
        self.indices[queries] = columns[chosen].view(-1, self.k).int()
        rest = torch.where(tied & ~chosen, torch.inf, scores.masked_fill(chosen, -torch.inf))
        self.following[queries] = columns.gather(1, rest.argmax(dim=1, keepdim=True))[:, 0].int()
        self._settle_share(queries, columns, above, tied, missing)

    def _settle_share(
        self,
        queries: torch.Tensor,
        columns: torch.Tensor,
        above: torch.Tensor,
        tied: torch.Tensor,
        missing: torch.Tensor,
    ) -> None:
        """A derived search reads here which columns are surely among the nearest, and which tie for the rest."""


class LabelShare(Nearest):
    """The share [n] of the first ``labelled`` columns among the k nearest; ties count at their expected share."""

    def __init__(self, columns: slice, k: int, queries: int, labelled: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, k, queries, device)
        self.labelled = labelled
        self.share = torch.empty(queries, dtype=torch.float64, device=device)

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        super().take(queries, scores, bound)
        self.share[queries] = (self.indices[queries] < self.labelled).sum(dim=1).double() / self.k

    def _settle_share(
        self,
        queries: torch.Tensor,
        columns: torch.Tensor,
        above: torch.Tensor,
        tied: torch.Tensor,
        missing: torch.Tensor,
    ) -> None:
        labelled = columns < self.labelled
        expected = (tied & labelled).sum(dim=1) / tied.sum(dim=1).double() * missing[:, 0]
        self.share[queries] = ((above & labelled).sum(dim=1) + expected) / self.k


class Retrieval(Search):
    """How many columns beat, and how many others tie with, column i for query i, whose cosine is ``match`` [n].

    Of queries that at least ``depth`` columns beat, more is not looked for.
    """

    def __init__(self, columns: slice, depth: int, match: torch.Tensor) -> None:
        super().__init__(columns)
        self.depth, self.match = depth, match
        self.better = torch.zeros(match.numel(), dtype=torch.int64, device=match.device)
        self.tied = torch.zeros_like(self.better)

    def take(self, queries: torch.Tensor, scores: torch.Tensor, bound: float) -> None:
        match = self.match[queries].unsqueeze(1)
        margin = bound + TIE
        better = (scores > match + margin).sum(dim=1)
        possibly = (scores >= match - margin).sum(dim=1) - 1
        self.better[queries] = better
        self._undecided.append(queries[(possibly > better) & (better < self.depth)])

    def _decided(self, queries: torch.Tensor, scores: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
        match = self.match[queries]
        return (limit < match - TIE) | ((scores > match.unsqueeze(1) + TIE).sum(dim=1) >= self.depth)

    def floor(self, queries: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.match[queries] - 2 * TIE

    def settle(self, queries: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor) -> None:
        match = self.match[queries].unsqueeze(1)
        self.better[queries] = (scores > match + TIE).sum(dim=1)
        self.tied[queries] = (((scores - match).abs() <= TIE).sum(dim=1) - 1).clamp_min(0)

    def recalls(self, depth: int) -> torch.Tensor:
        """[n] for depth up to that of the search: a query with ties counts by its chance in a random order."""
        return ((depth - self.better).double() / (self.tied + 1)).clamp(0, 1)


def run(queries: UnitRows, corpus: UnitRows, searches: Sequence[Search], *, own: int | None = None) -> None:
    """Answer all searches in one pass. Query i is corpus row ``own + i`` and left out there, unless ``own`` is None."""
    for rows, scores, bound in _blocks(queries, corpus):
        leave_out_self(scores, rows, slice(0, corpus.count), own)
        for search in searches:
            search.take(rows, scores[:, search.columns], bound)
    for search in searches:
        candidates = corpus.exact[search.columns]
        columns = torch.arange(candidates.shape[0]).unsqueeze(0)
        for rows in search.take_undecided().split(max(1, EXACT_BLOCK_ELEMENTS // candidates.shape[0])):
            scores = queries.exact[rows] @ candidates.T
            leave_out_self(scores, rows, search.columns, own)
            search.settle(rows, scores, columns)


def leave_out_self(scores: torch.Tensor, rows: torch.Tensor, columns: slice, own: int | None) -> None:
    """Set the scores of queries ``rows`` with themselves, corpus rows ``own + rows``, below any other."""
    if own is not None and columns.start <= own < columns.stop:
        scores[torch.arange(rows.numel(), device=rows.device), rows + (own - columns.start)] = -torch.inf


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


def overlaps(first: Nearest, second: Nearest) -> torch.Tensor:
    """[n], the share of common neighbours of two searches with the same queries and k."""
    merged = torch.cat((first.indices, second.indices), dim=1).sort(dim=1).values
    return (merged[:, 1:] == merged[:, :-1]).sum(dim=1).double() / first.k
