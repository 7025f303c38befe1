"""All searches behind an alignment report, on the CPU or with half-precision candidates, and what rows owe each other.

A pair counts in its own neighbourhood and in those of others. A bootstrap that only redraws the n values of a mean of
neighbourhoods misses the second part and reads about .7 of the true deviation; one that redraws the rows themselves
puts copies among the neighbours. :func:`overlap_influence` and :func:`mixing_influence` therefore say for each pair
what the mean would lose without it: its own value, and for each row that has it among its neighbours the change when
the next one takes its place. Which one is next is a matter of chance, and is replaced by its expectation: for mixing, a
target with the probability of the neighbourhood's own share of targets; for omega, a common neighbour as often as the
next ones are over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aniso_ext.diagnostics.candidates import HalfRows, run_half
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
        directions = HalfRows(rows)
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
        clouds = HalfRows(x), HalfRows(z)
        depth = max(k, RECALL_DEPTH)
        run_half(clouds[1], clouds, [among_outputs, retrieval, around_outputs], depth=depth, own=n)
        run_half(clouds[0], clouds, [around_targets], depth=k, own=0)
    else:
        union = UnitRows.of(torch.cat((x, z)))
        run(union.part(outputs), union, [among_outputs, retrieval, around_outputs], own=n)
        run(union.part(targets), union, [around_targets], own=0)
    return Union(among_outputs, retrieval, around_outputs, around_targets)


def overlap_influence(first: Nearest, second: Nearest) -> torch.Tensor:
    """[n], what omega owes to each pair, with mean omega."""
    k = first.k
    own = overlaps(first, second)
    shared = _isin(first.indices, second.indices), _isin(second.indices, first.indices)
    joins = _isin(first.following[:, None], second.indices), _isin(second.following[:, None], first.indices)
    gain_first, gain_second = (float(each.double().mean()) for each in joins)
    gain_both = gain_first + gain_second + float((first.following == second.following).double().mean()) - 1
    lost = torch.zeros_like(own)
    change = torch.where(shared[0], gain_both, gain_first).double() / k
    lost.index_add_(0, first.indices.flatten().long(), change.flatten())
    change = torch.where(shared[1], 0.0, gain_second).double() / k
    lost.index_add_(0, second.indices.flatten().long(), change.flatten())
    return own - (lost - lost.mean())


def mixing_influence(search: LabelShare) -> torch.Tensor:
    """[n], what the mean label entropy owes to each pair, with that mean; divide by the expectation as the mean."""
    k, share = search.k, search.share.unsqueeze(1)
    own = binary_entropy(share)
    target = search.indices < search.labelled
    entropies = (binary_entropy((share + (share - gone) / k).clamp(0, 1)) for gone in (1.0, 0.0))
    without_target, without_output = (after - own for after in entropies)
    lost = torch.zeros_like(search.share)
    pairs = (search.indices.long() % search.labelled).flatten()
    lost.index_add_(0, pairs, torch.where(target, without_target, without_output).flatten())
    return own[:, 0] - (lost - lost.mean())


def _isin(values: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Which ``values`` [n, m] occur in the sets [n, k] of their rows; ascending sets without repetition."""
    places = torch.searchsorted(sets, values.contiguous()).clamp_max(sets.shape[1] - 1)
    return sets.gather(1, places) == values
