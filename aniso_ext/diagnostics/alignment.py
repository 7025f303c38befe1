"""What a transform did: closeness to the target, faithfulness to the source, and mixing (METHOD section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aniso_ext.diagnostics import spectra
from aniso_ext.diagnostics.alignment_intervals import PairSums, Settings, alignment_intervals, query_errors
from aniso_ext.diagnostics.consistency import exact_psi as correlate_all_pairs
from aniso_ext.diagnostics.consistency import phi_bound, sampled_psi
from aniso_ext.diagnostics.intervals import Interval
from aniso_ext.diagnostics.mixing import binary_entropy, mixing_expectation
from aniso_ext.diagnostics.neighbours import Nearest, overlaps
from aniso_ext.diagnostics.report import Report, Table, checked_bootstrap, emit, report_table
from aniso_ext.diagnostics.rows import choose_device, choose_rows, load, open_paired
from aniso_ext.diagnostics.sampled import choose_queries, query_count, sampled_neighbours
from aniso_ext.diagnostics.searches import RECALL_DEPTH, Union, by_halves, nearest, search_union
from aniso_ext.diagnostics.streams import Matrix, Stream
from aniso_ext.errors import InputError

ROWS_PER_DIMENSION = 4
CHANCE_OVERLAP = 0.05
TIED_SHARE = 0.05


@dataclass(frozen=True)
class AlignmentReport(Report):
    """Numbers of METHOD section 1 on ``n`` held-out pairs after a transform; see :func:`alignment`."""

    n: int
    n_available: int
    width: int
    k: int
    delta_mu: float
    phi: float
    phi_bound: float
    phi_bound_output: float
    psi: float
    psi_pairs: int
    omega: float
    omega_chance: float
    omega_tied: float
    m_z: float
    m_x: float
    mixing_expectation: float
    a_r: float
    a_r_centred: float
    paired_cosine: float
    recall_at_1: float
    recall_at_10: float
    spectrum: tuple[float, ...]
    intervals: dict[str, Interval] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    queries: int = 0
    """Pairs whose neighbours were searched, among those of all pairs; 0 is taken for all ``n``."""
    query_errors: dict[str, float] = field(default_factory=dict)
    """Standard errors of the numbers that are means over sampled queries; empty where all pairs are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", self.queries or self.n)

    def _table(self) -> Table:
        lines = [
            ("Delta_mu", self.delta_mu, "distance of the output mean from the target mean"),
            ("Phi", self.phi, f"mean y.z (at most {self.phi_bound:.3f} once the means agree)"),
            ("Psi", self.psi, f"correlation of pairwise similarities, {self.psi_pairs} pairs"),
            (f"Omega_{self.k}", self.omega, f"neighbours kept (by chance: {self.omega_chance:.3f})"),
            ("M_Z", self.m_z, "penetration: label entropy around outputs, 1 = mixed"),
            ("M_X", self.m_x, "coverage: label entropy around targets, 1 = mixed"),
            ("A_r", self.a_r, f"anisotropy of x - z, uncentred (centred: {self.a_r_centred:.2f})"),
            ("cosine", self.paired_cosine, "mean cosine of x_i and z_i"),
            ("R@1", self.recall_at_1, "z_i finds x_i first"),
            ("R@10", self.recall_at_10, "z_i finds x_i among ten"),
        ]
        names = ("delta_mu", "phi", "psi", "omega", "m_z", "m_x", "a_r", "paired_cosine", "recall_at_1", "recall_at_10")
        shown = [
            (label, value, note + self._error_note(name), self.intervals.get(name))
            for (label, value, note), name in zip(lines, names, strict=True)
        ]
        chosen = "" if self.n == self.n_available else f" sampled from {self.n_available}"
        searched = "" if self.queries == self.n else f", neighbours of {self.queries} sampled ones"
        return report_table(f"alignment of {self.n} pairs{chosen}{searched}, width {self.width}", shown, self.warnings)

    def _error_note(self, name: str) -> str:
        return f"; s.e. {self.query_errors[name]:.1g} of the sample" if name in self.query_errors else ""


def alignment(
    source: Any,
    target: Any,
    transformed: Any,
    *,
    k: int = 20,
    max_pairs: int | None = 10_000,
    n_random_pairs: int = 1_000_000,
    exact_psi: bool = False,
    seed: int = 0,
    bootstrap: int = 0,
    device: torch.device | str | None = None,
    max_queries: int | None = None,
) -> AlignmentReport:
    """Measure a transform z = T(y) on held-out pairs (METHOD section 1).

    With y_i in ``source``, x_i in ``target``, z_i in ``transformed``::

        delta_mu = ||m_z - m_x||      phi = mean y_i.z_i      psi = corr(y_i.y_j, z_i.z_j), i != j
        omega = mean |kNN_Y(i) & kNN_Z(i)| / k                paired_cosine = mean cos(x_i, z_i)
        m_z, m_x = mean H2(share of targets among the kNN in X u Z), over z or x, divided by mixing_expectation
        a_r = lambda_max D / tr of E[(x - z)(x - z)^T], uncentred; a_r_centred of the covariance
        recall_at_1, recall_at_10: x_i among the nearest targets of z_i
        phi_bound = largest phi of unit rows with output mean m_x; phi_bound_output with output mean m_z

    Neighbours are exact, by cosine, without the row itself (by index). Similarities within 1e-6 are ties (copies of a
    row): for omega they go to the lower index, in mixing and recall they count at their expected share. omega_tied is
    the share of source rows that have ties at their k-th neighbour.

    Args:
        source, target, transformed: [N, D] arrays or tensors (float16 to float64, bfloat16), opened embedding sets,
            or paths; row i of all three belongs to pair i.
        k: neighbours of omega and mixing.
        max_pairs: above this many pairs, a uniform sample drawn with ``seed`` is measured; None takes all. Time grows
            with the square of the pairs (but see ``max_queries``), memory linearly: about 24 D bytes a pair and set on
            the CPU; on a GPU 2 D bytes beside the rows in their own dtype, and about 8 GB of work space.
        n_random_pairs: pairs behind psi.
        exact_psi: psi over all pairs i != j instead: no sampling error, and at D below a few thousand also faster.
        seed: of the sample, of the random pairs and of the resampling.
        bootstrap: number of resamples behind ``report.intervals``, which then has a 95 % :class:`Interval` for every
            number that depends on the pairs (200 is plenty). Neighbours are not searched again: what each pair adds to
            a number is resampled (docs/diagnostics.md says how for each number).
        device: "cpu" or "cuda"; None is the device of CUDA inputs, else a GPU if there is one, else the CPU. Neighbours
            are exact on both.
        max_queries: above this many pairs, neighbours are searched of a uniform sample of them, drawn with ``seed``,
            still among all pairs: omega, mixing and recall are then means over the sample, unbiased, with standard
            errors in ``report.query_errors`` and ``report.queries`` of them. None is all pairs up to 1M and 10^12 / n
            beyond, which takes the time of 1M; n or more is all. With a sample, rows stay where they are (in memory, or
            in their files) and pass by in tiles.

    Raises:
        InputError: rows, widths, dtypes or options do not fit, n <= k, or a non-finite row.

    Warns:
        DiagnosticsWarning: too few rows for D or k, or rows that are not unit vectors; also in ``report.warnings``.

    Source: METHOD section 1, table "after a transform", and known fact (a).

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> y = rng.normal(size=(500, 8)); y /= np.linalg.norm(y, axis=1, keepdims=True)
        >>> x = rng.normal(size=(500, 8)); x /= np.linalg.norm(x, axis=1, keepdims=True)
        >>> report = alignment(y, x, y, k=5)
        >>> round(report.phi, 6), round(report.psi, 6), report.omega
        (1.0, 1.0, 1.0)
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if max_pairs is not None and max_pairs <= k:
        raise InputError(f"max_pairs = {max_pairs} must exceed k = {k}")
    if not exact_psi and n_random_pairs < 2:
        raise InputError(f"n_random_pairs must be at least 2, got {n_random_pairs}: or pass exact_psi=True")
    resamples = checked_bootstrap(bootstrap)
    query_count(1, max_queries)
    opened = open_paired(minimum=max(3, k + 1), source=source, target=target, transformed=transformed)
    place = choose_device(device, source, target, transformed)
    chosen = choose_rows(opened[0].count, max_pairs, seed)
    count = opened[0].count if chosen is None else len(chosen)
    queries = query_count(count, max_queries)
    settings = Settings(k, None if exact_psi else n_random_pairs, seed, resamples, by_halves(place))
    sampled = queries < count
    sides: list[Matrix] = [Stream(rows, chosen, place) if sampled else load(rows, chosen, place) for rows in opened]
    settings = replace(settings, queries=queries if sampled else None)
    report = replace(measure(sides[0], sides[1], sides[2], settings), n_available=opened[0].count)
    emit(report.warnings)
    return report


def measure(
    y: Matrix,
    x: Matrix,
    z: Matrix,
    settings: Settings,
    *,
    source_neighbours: Nearest | None = None,
) -> AlignmentReport:
    """The report of rows [n, D] in memory; ``source_neighbours`` saves a repeated search.

    Where the settings name a number of queries, rows are streams.
    """
    count, width = x.shape
    k = settings.k
    if settings.psi_pairs is None:
        psi, psi_pairs = correlate_all_pairs(y, z), count * (count - 1)
    else:
        psi, psi_pairs = sampled_psi(y, z, settings.psi_pairs, settings.seed), settings.psi_pairs
    pairs = PairSums.of(y, x, z)
    queries, source_neighbours, around = _neighbours((y, x, z), pairs.cosines, settings, source_neighbours)
    expectation = mixing_expectation(count, k)
    spectrum = spectra.eigenvalues(pairs.second_moment)
    report = AlignmentReport(
        n=count,
        n_available=count,
        width=width,
        k=k,
        delta_mu=float((pairs.output_mean - pairs.target_mean).norm()),
        phi=float(pairs.products.mean()),
        phi_bound=phi_bound(pairs.source_mean, pairs.target_mean),
        phi_bound_output=phi_bound(pairs.source_mean, pairs.output_mean),
        psi=psi,
        psi_pairs=psi_pairs,
        omega=float(overlaps(source_neighbours, around.outputs).mean()),
        omega_chance=k / (count - 1),
        omega_tied=float(source_neighbours.tied.double().mean()),
        m_z=_mixing(around.around_outputs.share, expectation),
        m_x=_mixing(around.around_targets.share, expectation),
        mixing_expectation=expectation,
        a_r=spectra.anisotropy(spectrum),
        a_r_centred=spectra.anisotropy(spectra.eigenvalues(pairs.covariance)),
        paired_cosine=float(pairs.cosines.mean()),
        recall_at_1=float(around.retrieval.recalls(1).mean()),
        recall_at_10=float(around.retrieval.recalls(RECALL_DEPTH).mean()),
        spectrum=tuple(spectrum.tolist()),
        warnings=_warnings(k, source_neighbours.tied, pairs),
        queries=source_neighbours.tied.numel(),
        query_errors={} if queries is None else query_errors((source_neighbours, around), expectation, count),
    )
    if settings.bootstrap == 0:
        return report
    intervals = alignment_intervals(report, (y, x, z), pairs, (source_neighbours, around), settings, queries)
    return replace(report, intervals=intervals)


def _neighbours(
    sides: tuple[Matrix, Matrix, Matrix], cosines: torch.Tensor, settings: Settings, known: Nearest | None
) -> tuple[torch.Tensor | None, Nearest, Union]:
    """The pairs that are queries (None: all), neighbours among sources, and what lies around outputs and targets."""
    y, x, z = sides
    k, half = settings.k, settings.half
    if settings.queries is None:
        assert isinstance(y, torch.Tensor) and isinstance(x, torch.Tensor) and isinstance(z, torch.Tensor)
        found = nearest(y, k, half=half) if known is None else known
        return None, found, search_union(x, z, k, cosines, half=half)
    assert isinstance(y, Stream) and isinstance(x, Stream) and isinstance(z, Stream)
    queries = choose_queries(x.shape[0], settings.queries, settings.seed).to(x.device)
    return queries, *sampled_neighbours(y, x, z, queries, k, cosines[queries], half=half)


def _mixing(share: torch.Tensor, expectation: float) -> float:
    """M of the shares of targets among neighbours; one neighbour has no entropy to compare: NaN for k = 1."""
    return float(binary_entropy(share).mean()) / expectation if expectation > 0 else math.nan


def _warnings(k: int, ties: torch.Tensor, pairs: PairSums) -> tuple[str, ...]:
    searched, tied = ties.numel(), int(ties.sum())
    count, width = pairs.cosines.numel(), pairs.target_mean.numel()
    found = []
    if count < ROWS_PER_DIMENSION * width:
        found.append(
            f"{count} pairs are few for width {width}: isotropic x - z would read a_r = "
            f"{spectra.isotropic_anisotropy(count, width):.2f} instead of 1"
        )
    if k > CHANCE_OVERLAP * (count - 1):
        found.append(
            f"k = {k} neighbours are many for {count} pairs: unrelated spaces would share omega = {k / (count - 1):.2f}"
        )
    if tied > TIED_SHARE * searched:
        found.append(
            f"{tied} of {searched} {'sampled ' if searched < count else ''}source rows have ties, such as copies of "
            f"rows, at their neighbour {k}: omega resolves ties alike before and after; an arbitrary order would read "
            "lower"
        )
    for name in pairs.zero:
        if zero := pairs.zero[name]:
            found.append(f"{name} has {zero} zero rows: their cosines are taken as 0")
        if stray := pairs.stray[name]:
            found.append(
                f"{name} has {stray} rows that are not unit vectors: phi, psi, delta_mu and a_r depend on their "
                "lengths and the bounds of phi do not hold; neighbours, recall and paired_cosine use cosines"
            )
    return tuple(found)
