"""The searches of :mod:`aniso_ext.diagnostics.neighbours` at the speed of half-precision matrix units.

A block of queries meets a whole cloud in one float16 product. Its columns fall into ``GROUP`` interleaved groups: the
best w columns lie in the w groups of largest maximum, so one pass for the maxima, a selection among 1/GROUP of the
numbers and one among w GROUP scores give the w best columns. Those are scored again in float64. What was left out has
float16 scores up to that of the last column kept, and exact ones up to a bound above it; a query for which that could
matter is searched once more with longer lists (copies of rows fill short ones), and in float64 throughout after that.
No decision rests on float16, so results equal those of the CPU. At no time is more held than one block of scores.

Bound on the error of a float16 score of unit rows a and b with roundings a', b':

    |a.b - fl(a'.b')| <= |a - a'| + (1 + |a - a'|) |b - b'|  +  D 2^-23  +  2^-11

Cauchy-Schwarz with the norms of the roundings as they are (about 2e-4), float32 sums of D terms that may be truncated,
and the rounding of the score. Every float64 score checks it: a block where one is off by more is searched in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aniso_ext.diagnostics.neighbours import Search, leave_out_self, products

GROUP = 32
PADDING = 8 * GROUP
SPARE = 12
LONGER = 16
BLOCK_ELEMENTS = 2**31
EXACT_BLOCK_ELEMENTS = 2**26
SETTLE_ELEMENTS = 2**28
CORPUS_ROWS = 2**15


class RoundedRows:
    """Directions of rows [n, D] of any floating dtype: rounded for products, and in float64 where asked.

    ``rounded`` [n', D'] in ``dtype`` is padded with zeros so that matrix units and groups divide it; ``rounding`` [n]
    are the distances of its rows from the directions, ``norms`` [n] their lengths. A zero row has direction 0 and
    length 1.
    """

    def __init__(self, rows: torch.Tensor, dtype: torch.dtype = torch.float16) -> None:
        self.rows = rows
        self.count, self.width = rows.shape
        padded = -(-self.count // PADDING) * PADDING, -(-self.width // 8) * 8
        self.rounded = torch.zeros(padded, dtype=dtype, device=rows.device)
        self.norms = torch.empty(self.count, dtype=torch.float64, device=rows.device)
        self.rounding = torch.empty_like(self.norms)
        for start in range(0, self.count, CORPUS_ROWS):
            part = slice(start, min(start + CORPUS_ROWS, self.count))
            norms = rows[part].double().norm(dim=1)
            self.norms[part] = torch.where(norms > 0, norms, 1)
            exact = self.exact(part)
            self.rounded[part, : self.width] = exact.to(dtype)
            self.rounding[part] = (exact - self.rounded[part, : self.width].double()).norm(dim=1)
        self.worst_rounding = float(self.rounding.max())

    def exact(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Directions in float64, [..., D] for an index of any shape."""
        return self.rows[index].double() / self.norms[index].unsqueeze(-1)

    def error(self, rows: torch.Tensor, corpus: RoundedRows) -> torch.Tensor:
        """[b], the bound on the error of scores of these rows with the corpus, both rounded."""
        own = self.rounding[rows]
        of_score = torch.finfo(self.rounded.dtype).eps / 2
        return own + (1 + own) * corpus.worst_rounding + self.width * 2.0**-23 + of_score


@dataclass(frozen=True)
class Candidates:
    """``columns`` [b, w] ascending with their float64 ``scores`` [b, w]; all others score at most ``limit`` [b]."""

    scores: torch.Tensor
    columns: torch.Tensor
    limit: torch.Tensor


def find_candidates(
    queries: RoundedRows, rows: torch.Tensor, corpus: RoundedRows, length: int, own: int | None
) -> Candidates:
    """The ``length`` best columns of the corpus for some queries, by rounded scores; fewer if there are fewer."""
    scores = rounded_scores(queries, rows, corpus)
    leave_out_self(scores, rows, slice(0, corpus.count), own)
    return best_columns(scores, queries, rows, corpus, length)


def rounded_scores(queries: RoundedRows, rows: torch.Tensor, corpus: RoundedRows) -> torch.Tensor:
    """[b, n'] in the dtype of the rounding; the padding scores -inf."""
    wanted = queries.rounded[rows]
    single = wanted.dtype == torch.float32 and wanted.device.type == "cpu"
    scores = products(wanted, corpus.rounded) if single else wanted @ corpus.rounded.T
    scores[:, corpus.count :] = -torch.inf
    return scores


def best_columns(
    scores: torch.Tensor, queries: RoundedRows, rows: torch.Tensor, corpus: RoundedRows, length: int
) -> Candidates:
    """The columns of the ``length`` best of these rounded scores [b, n'], scored again."""
    stride = scores.shape[1] // GROUP
    groups = scores.view(-1, GROUP, stride).amax(dim=1).topk(min(length, stride), dim=1, sorted=False).indices
    members = torch.arange(0, scores.shape[1], stride, device=rows.device).view(1, GROUP, 1)
    columns = (groups.unsqueeze(1) + members).flatten(1)
    rough, places = scores.gather(1, columns).topk(min(length, columns.shape[1]), dim=1, sorted=False)
    columns, order = columns.gather(1, places).sort(dim=1)
    rough = rough.gather(1, order).double()
    missing = rough == -torch.inf
    exact = _exact_scores(queries, rows, corpus, columns.clamp_max(corpus.count - 1)).masked_fill(missing, -torch.inf)
    error = queries.error(rows, corpus)
    broken = ((exact - rough).abs() > error.unsqueeze(1)).masked_fill(missing, False).any()
    limit = (rough.amin(dim=1) + error).masked_fill(broken, torch.inf)
    return Candidates(exact, columns, limit)


def _exact_scores(queries: RoundedRows, rows: torch.Tensor, corpus: RoundedRows, columns: torch.Tensor) -> torch.Tensor:
    """Float64 scores [b, w] of queries with columns of their own."""
    size = max(1, EXACT_BLOCK_ELEMENTS // (columns.shape[1] * corpus.width))
    return torch.cat(
        [
            torch.bmm(corpus.rows[wanted].double(), queries.exact(part).unsqueeze(2)).squeeze(2) / corpus.norms[wanted]
            for part, wanted in zip(rows.split(size), columns.split(size), strict=True)
        ]
    )


def run_half(
    queries: RoundedRows, corpus: Sequence[RoundedRows], searches: Sequence[Search], *, depth: int, own: int | None
) -> None:
    """Answer all searches; their columns are whole clouds of ``corpus``, one after another, and lists ``depth`` long.

    Query i is corpus row ``own + i`` and left out there, unless ``own`` is None.
    """
    starts = [sum(cloud.count for cloud in corpus[:index]) for index in range(len(corpus))]
    everyone = torch.arange(queries.count, device=queries.rows.device)
    _search(queries, everyone, corpus, starts, searches, depth + SPARE, own)
    for search in searches:
        _search(queries, search.take_undecided(), corpus, starts, [search], LONGER * (depth + SPARE), own)
        total = search.columns.stop - search.columns.start
        columns = torch.arange(total, device=everyone.device).unsqueeze(0)
        for rows in search.take_undecided().split(max(1, SETTLE_ELEMENTS // total)):
            if rows.numel() == 0:
                continue
            exact = queries.exact(rows)
            inside = [cloud for cloud, start in zip(corpus, starts, strict=True) if _covers(search, start)]
            scores = torch.cat([exact @ part.T for cloud in inside for part in _exact_parts(cloud)], dim=1)
            leave_out_self(scores, rows, search.columns, own)
            search.settle(rows, scores, columns)


def _search(
    queries: RoundedRows,
    wanted: torch.Tensor,
    corpus: Sequence[RoundedRows],
    starts: Sequence[int],
    searches: Sequence[Search],
    length: int,
    own: int | None,
) -> None:
    """Let the searches consider candidates of the ``wanted`` queries."""
    used = [index for index, start in enumerate(starts) if any(_covers(search, start) for search in searches)]
    size = max(1, BLOCK_ELEMENTS // max(corpus[index].rounded.shape[0] for index in used))
    for rows in wanted.split(size if size < 128 else size // 128 * 128):
        if rows.numel() == 0:
            continue
        found = {}
        for index in used:
            within = None if own is None or not 0 <= own - starts[index] < corpus[index].count else own - starts[index]
            found[index] = find_candidates(queries, rows, corpus[index], length, within)
        for search in searches:
            lists = [(found[index], starts[index]) for index in used if _covers(search, starts[index])]
            search.consider(
                rows,
                torch.cat([each.scores for each, _ in lists], dim=1),
                torch.cat([each.columns + (start - search.columns.start) for each, start in lists], dim=1),
                torch.stack([each.limit for each, _ in lists]).amax(dim=0),
            )


def _covers(search: Search, start: int) -> bool:
    return bool(search.columns.start <= start < search.columns.stop)


def _exact_parts(cloud: RoundedRows) -> Iterator[torch.Tensor]:
    for start in range(0, cloud.count, CORPUS_ROWS):
        yield cloud.exact(slice(start, min(start + CORPUS_ROWS, cloud.count)))
