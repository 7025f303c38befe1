"""Neighbours of sampled rows among all rows, where the neighbours of all rows would take too long.

The sample is of queries, never of candidates: every list of neighbours is as exact as that of a full search, and a mean
over a uniform sample of queries is an unbiased estimate of the mean over all of them, with a standard error that the
sample shows.

Tiles of a cloud pass by. The best columns of each are found as in :mod:`aniso_ext.diagnostics.candidates`, in float16
on a GPU and in float32 on the CPU, scored again in float64, and merged into one list a query, with a bound on the score
of whatever is not listed. A query for which that could matter is settled in a second pass on float64 scores of all
columns, of which those that can matter are kept: also the copies of a row that fill every list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aniso_ext.diagnostics.candidates import SPARE, Candidates, RoundedRows, best_columns, rounded_scores
from aniso_ext.diagnostics.neighbours import LabelShare, Nearest, Retrieval, Search, unit_rows
from aniso_ext.diagnostics.searches import RECALL_DEPTH, Union
from aniso_ext.diagnostics.streams import Stream
from aniso_ext.errors import InputError

ALL_UP_TO = 1_000_000
"""Pairs up to which all are queries, unless fewer are asked for; beyond, as many as keep the number of scores."""
LEAST_QUERIES = 2


@dataclass(frozen=True)
class Sizes:
    """Numbers held at a time: of a tile and of its rounded scores; rows, scores and kept columns of a settling."""

    tile: int
    scores: int
    settled_rows: int
    settled_scores: int
    kept: int


SIZES = {
    "cpu": Sizes(2**25, 2**24, 2**12, 2**22, 2**24),
    "cuda": Sizes(2**30, 2**31, 2**15, 2**26, 2**27),
}


def query_count(pairs: int, max_queries: int | None) -> int:
    """How many pairs are queries: all up to 1M, beyond that 10^12 / pairs, or at most ``max_queries``.

    Raises:
        InputError: ``max_queries`` is below 2, where a mean has no standard error.
    """
    if max_queries is None:
        return pairs if pairs <= ALL_UP_TO else max(LEAST_QUERIES, ALL_UP_TO**2 // pairs)
    if max_queries < LEAST_QUERIES:
        raise InputError(
            f"max_queries must be at least {LEAST_QUERIES}, got {max_queries}: a standard error needs two queries; "
            "thousands make it small"
        )
    return min(pairs, max_queries)


def choose_queries(pairs: int, queries: int, seed: int) -> torch.Tensor:
    """Ascending places of a uniform sample without replacement, of a stream of its own of the seed."""
    chosen = np.random.default_rng((seed, 1)).choice(pairs, size=queries, replace=False)
    return torch.from_numpy(np.sort(chosen))


class Lists:
    """The best columns so far of each of q queries, and what any other column can score."""

    def __init__(self, queries: int, length: int, device: torch.device) -> None:
        self.length = length
        self.scores = torch.full((queries, length), -torch.inf, dtype=torch.float64, device=device)
        self.columns = torch.zeros(queries, length, dtype=torch.int64, device=device)
        self.limit = torch.full((queries,), -torch.inf, dtype=torch.float64, device=device)

    def merge(self, rows: torch.Tensor, found: Candidates, start: int) -> None:
        """Take in candidates of the queries ``rows`` among columns from ``start`` on."""
        scores = torch.cat((self.scores[rows], found.scores), dim=1)
        columns = torch.cat((self.columns[rows], found.columns + start), dim=1)
        best = scores.topk(self.length + 1, dim=1)
        self.scores[rows] = best.values[:, : self.length]
        self.columns[rows] = columns.gather(1, best.indices[:, : self.length])
        self.limit[rows] = torch.maximum(torch.maximum(self.limit[rows], found.limit), best.values[:, self.length])

    def found(self) -> Candidates:
        columns, order = self.columns.sort(dim=1)
        return Candidates(self.scores.gather(1, order), columns, self.limit)


@dataclass(frozen=True)
class Queries:
    """Rounded rows [q, D], each of them row ``own`` [q] of the cloud ``home`` and left out there."""

    rows: RoundedRows
    home: Stream
    own: torch.Tensor

    def leave_out(self, scores: torch.Tensor, asked: torch.Tensor, cloud: Stream, start: int) -> None:
        """Set scores [b, c] of ``asked`` queries with themselves, among rows of a cloud from ``start`` on, to -inf."""
        if cloud is self.home:
            places = self.own[asked] - start
            inside = ((places >= 0) & (places < scores.shape[1])).nonzero()[:, 0]
            scores[inside, places[inside]] = -torch.inf


def sampled_neighbours(
    y: Stream, x: Stream, z: Stream, chosen: torch.Tensor, k: int, match: torch.Tensor, *, half: bool
) -> tuple[Nearest, Union]:
    """What a full search finds, of the ``chosen`` [q] rows of each cloud alone; ``match`` [q] are their cosines."""
    n, q, device = x.shape[0], chosen.numel(), x.device
    dtype = torch.float16 if half else torch.float32
    own = chosen.to(device)
    of_source, of_target, of_output = (Queries(RoundedRows(side.take(chosen), dtype), side, own) for side in (y, x, z))
    among_sources, among_outputs = (Nearest(slice(0, n), k, q, device) for _ in range(2))
    retrieval = Retrieval(slice(0, n), RECALL_DEPTH, match)
    around_outputs, around_targets = (LabelShare(slice(0, 2 * n), k, q, n, device) for _ in range(2))

    length = max(k, RECALL_DEPTH) + SPARE
    (near_sources,) = _search(y, [of_source], length, dtype)
    _answer(among_sources, of_source, [(y, near_sources)])
    output_targets, target_targets = _search(x, [of_output, of_target], length, dtype)
    output_outputs, target_outputs = _search(z, [of_output, of_target], length, dtype)
    _answer(retrieval, of_output, [(x, output_targets)])
    _answer(among_outputs, of_output, [(z, output_outputs)])
    _answer(around_outputs, of_output, [(x, output_targets), (z, output_outputs)])
    _answer(around_targets, of_target, [(x, target_targets), (z, target_outputs)])
    return among_sources, Union(among_outputs, retrieval, around_outputs, around_targets)


def _search(cloud: Stream, asked: Sequence[Queries], length: int, dtype: torch.dtype) -> list[Candidates]:
    """The best columns of the cloud for all queries of each kind, in one pass over it."""
    lists = [Lists(queries.own.numel(), length, cloud.device) for queries in asked]
    start = 0
    for rows in cloud.split(max(1, SIZES[cloud.device.type].tile // cloud.shape[1])):
        _search_tile(RoundedRows(rows, dtype), cloud, start, asked, lists)
        start += rows.shape[0]
    return [best.found() for best in lists]


def _search_tile(
    tile: RoundedRows, cloud: Stream, start: int, asked: Sequence[Queries], lists: Sequence[Lists]
) -> None:
    """Merge the best columns of a tile, the rows of a cloud from ``start`` on, into the lists."""

    def candidates(queries: Queries, part: torch.Tensor, length: int) -> Candidates:
        scores = rounded_scores(queries.rows, part, tile)
        queries.leave_out(scores, part, cloud, start)
        return best_columns(scores, queries.rows, part, tile, length)

    size = max(1, SIZES[cloud.device.type].scores // tile.rounded.shape[0])
    size = size if size < 128 else size // 128 * 128
    for queries, best in zip(asked, lists, strict=True):
        for part in torch.arange(queries.own.numel(), device=cloud.device).split(size):
            best.merge(part, candidates(queries, part, best.length), start)


def _answer(search: Search, queries: Queries, found: Sequence[tuple[Stream, Candidates]]) -> None:
    """Answer one search from the candidates in its clouds, whose columns follow one another."""
    starts = [sum(cloud.shape[0] for cloud, _ in found[:index]) for index in range(len(found))]
    scores = torch.cat([each.scores for _, each in found], dim=1)
    columns = torch.cat([each.columns + start for (_, each), start in zip(found, starts, strict=True)], dim=1)
    limit = torch.stack([each.limit for _, each in found]).amax(dim=0)
    size = max(1, SIZES[scores.device.type].kept // scores.shape[1])
    for part in torch.arange(scores.shape[0], device=scores.device).split(size):
        search.consider(part, scores[part], columns[part], limit[part])
    left = search.take_undecided()
    if left.numel() == 0:
        return
    floor = search.floor(left, scores[left])
    clouds = [(cloud, start) for (cloud, _), start in zip(found, starts, strict=True)]
    while left.numel():
        served, entries = _reaching(clouds, queries, left, floor)
        for part, block_scores, block_columns in _padded(entries, served):
            search.settle(left[part], block_scores, block_columns)
        left, floor = left[served:], floor[served:]


Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Place of a query, float64 score and column of each column that is kept."""


def _reaching(
    clouds: Sequence[tuple[Stream, int]], queries: Queries, left: torch.Tensor, floor: torch.Tensor
) -> tuple[int, Entries]:
    """All columns that score at least ``floor`` [u] with the queries ``left`` [u], or the first so many of these.

    As many queries are served as there is memory for their columns, at least one.
    """
    sizes = SIZES[left.device.type]
    exact, served = queries.rows.exact(left), left.numel()
    kept: list[Entries] = []
    for cloud, offset in clouds:
        start = 0
        for rows in cloud.split(sizes.settled_rows):
            tile = unit_rows(rows.double())
            for part in torch.arange(served, device=left.device).split(max(1, sizes.settled_scores // rows.shape[0])):
                scores = exact[part] @ tile.T
                queries.leave_out(scores, left[part], cloud, start)
                place, column = (scores >= floor[part].unsqueeze(1)).nonzero(as_tuple=True)
                kept.append((part[place], scores[place, column], column + (start + offset)))
            start += rows.shape[0]
            while served > 1 and sum(entry[0].numel() for entry in kept) > sizes.kept:
                served = max(1, served // 2)
                kept = [tuple(part[entry[0] < served] for part in entry) for entry in kept]  # type: ignore[misc]
    place, scores, column = (torch.cat(parts) for parts in zip(*kept, strict=True))
    order = place.argsort(stable=True)
    return served, (place[order], scores[order], column[order])


def _padded(entries: Entries, queries: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Blocks of queries [b] with the scores and columns [b, c] of their entries, short lists filled with -inf."""
    place, scores, columns = entries
    counts = place.bincount(minlength=queries)
    ends = counts.cumsum(dim=0)
    order = counts.argsort(descending=True)
    done = 0
    while done < queries:
        longest = max(1, int(counts[order[done]]))
        part = order[done : done + max(1, SIZES[place.device.type].kept // longest)]
        done += part.numel()
        inside = torch.arange(longest, device=place.device) < counts[part].unsqueeze(1)
        index = ((ends - counts)[part].unsqueeze(1) + torch.arange(longest, device=place.device)).clamp_max(
            scores.numel() - 1
        )
        yield part, scores[index].masked_fill(~inside, -torch.inf), columns[index]
