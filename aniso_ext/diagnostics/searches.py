"""All searches behind an alignment report, on the CPU or with half-precision candidates, and what rows owe each other.

A pair counts in its own neighbourhood and in those of others. A bootstrap that only redraws the n values of a mean of
neighbourhoods misses the second part and reads about .7 of the true deviation; one that redraws the rows themselves
puts copies among the neighbours. :func:`overlap_owed` and :func:`mixing_owed` therefore say what the mean would lose
without a pair: its own value, and for each row that has it among its neighbours the change when the next one takes its
place. Which one is next is a matter of chance, and is replaced by its expectation: for mixing, a target with the
probability of the neighbourhood's own share of targets; for omega, a common neighbour as often as the next ones are
over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aniso_ext.diagnostics.candidates import RoundedRows, run_half
from aniso_ext.diagnostics.mixing import binary_entropy
from aniso_ext.diagnostics.neighbours import LabelShare, Nearest, Retrieval, UnitRows, overlaps, run

RECALL_DEPTH = 10


def by_halves(device: torch.device) -> bool:
    """Whether candidates are found in float16: on GPUs, whose matrix units make it many times as fast."""
    return device.type == "cuda"


def nearest(rows: torch.Tensor, k: int, *, half: bool = False) -> Nearest:
    """The k nearest other rows of each of the rows [n, D], n > k."""
    search = Nearest(slice(0, rows.shape[0]), k, rows.shape[0], rows.device)
    if half:
        directions = RoundedRows(rows)
        run_half(directions, [directions], [search], depth=k, own=0)
    else:
        units = UnitRows.of(rows)
        run(units, units, [search], own=0)
    return search


@dataclass(frozen=True)
class Union:
    """What a search of X u Z finds: neighbours among outputs, targets of outputs, labels around outputs and targets."""

    outputs: Nearest
    retrieval: Retrieval
    around_outputs: LabelShare
    around_targets: LabelShare


def search_union(x: torch.Tensor, z: torch.Tensor, k: int, match: torch.Tensor, *, half: bool = False) -> Union:
    """All searches that involve targets or outputs [n, D] with paired cosines ``match`` [n], one pass over each."""
    n = x.shape[0]
    targets, outputs, everything = slice(0, n), slice(n, 2 * n), slice(0, 2 * n)
    among_outputs = Nearest(outputs, k, n, x.device)
    retrieval = Retrieval(targets, RECALL_DEPTH, match)
    around_outputs, around_targets = (LabelShare(everything, k, n, n, x.device) for _ in range(2))
    if half:
        clouds = RoundedRows(x), RoundedRows(z)
        depth = max(k, RECALL_DEPTH)
        run_half(clouds[1], clouds, [among_outputs, retrieval, around_outputs], depth=depth, own=n)
        run_half(clouds[0], clouds, [around_targets], depth=k, own=0)
    else:
        union = UnitRows.of(torch.cat((x, z)))
        run(union.part(outputs), union, [among_outputs, retrieval, around_outputs], own=n)
        run(union.part(targets), union, [around_targets], own=0)
    return Union(among_outputs, retrieval, around_outputs, around_targets)


@dataclass(frozen=True)
class Owed:
    """What queries owe: ``own`` [q] values, and their ``change`` [q, m] without each of ``pairs`` [q, m] near them."""

    own: torch.Tensor
    pairs: torch.Tensor
    change: torch.Tensor

    def influence(self) -> torch.Tensor:
        """[n], what the mean of ``own`` owes to each pair, with that mean; all n pairs are queries."""
        lost = torch.zeros_like(self.own).index_add_(0, self.pairs.flatten(), self.change.flatten())
        return self.own - (lost - lost.mean())

    def influence_variance(self, queries: torch.Tensor, count: int) -> float:
        """An estimate of the variance of :meth:`influence` over all ``count`` pairs, of which [q] are ``queries``.

        Sums over queries and over pairs of queries are divided by the chance that these are in the sample, so that the
        estimate is unbiased (Horvitz and Thompson 1952) but for the square of a mean; what a query owes to itself
        belongs to its own value.
        """
        pairs, order = self.pairs.sort(dim=1)
        change = self.change.gather(1, order)
        again = pairs[:, 1:] == pairs[:, :-1]
        change[:, :-1] += change[:, 1:].masked_fill(~again, 0)
        change[:, 1:].masked_fill_(again, 0)
        itself = pairs == queries.unsqueeze(1)
        own = self.own - (change * itself).sum(dim=1)
        own = own - own.mean()
        change.masked_fill_(itself, 0)
        lost = torch.zeros(count, dtype=own.dtype, device=own.device)
        lost.index_add_(0, pairs.flatten(), change.flatten())
        q = queries.numel()
        once, twice = q / count, q * (q - 1) / (count * (count - 1))
        alone = change.square().sum()
        squares = (lost.square().sum() - alone) / twice + alone / once
        crossed = (own * lost[queries]).sum() / twice
        mean = change.sum() / once / count
        return max(0.0, float(own.square().mean() + (squares - 2 * crossed) / count - mean.square()))


def overlap_owed(first: Nearest, second: Nearest) -> Owed:
    """What omega owes to pairs, for its mean over queries."""
    k = first.k
    own = overlaps(first, second)
    shared = _isin(first.indices, second.indices), _isin(second.indices, first.indices)
    joins = _isin(first.following[:, None], second.indices), _isin(second.following[:, None], first.indices)
    gain_first, gain_second = (float(each.double().mean()) for each in joins)
    gain_both = gain_first + gain_second + float((first.following == second.following).double().mean()) - 1
    change = (torch.where(shared[0], gain_both, gain_first), torch.where(shared[1], 0.0, gain_second))
    return Owed(own, torch.cat((first.indices, second.indices), dim=1).long(), torch.cat(change, dim=1).double() / k)


def mixing_owed(search: LabelShare, expectation: float) -> Owed:
    """What the mean label entropy over its ``expectation`` owes to pairs."""
    k, share = search.k, search.share.unsqueeze(1)
    own = binary_entropy(share)
    target = search.indices < search.labelled
    entropies = (binary_entropy((share + (share - gone) / k).clamp(0, 1)) for gone in (1.0, 0.0))
    without_target, without_output = (after - own for after in entropies)
    change = torch.where(target, without_target, without_output)
    return Owed(own[:, 0] / expectation, search.indices.long() % search.labelled, change / expectation)


def _isin(values: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Which ``values`` [n, m] occur in the sets [n, k] of their rows; ascending sets without repetition."""
    places = torch.searchsorted(sets, values.contiguous()).clamp_max(sets.shape[1] - 1)
    return sets.gather(1, places) == values
