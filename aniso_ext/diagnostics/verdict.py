"""What the numbers of a study say in words, each sentence with the rule behind it.

A number with an interval counts by the interval: a rule that needs "at least" takes its lower end, "at most" its upper
end, and where the two ends would say different things the finding is ``undecided``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aniso_ext.diagnostics.alignment import AlignmentReport
from aniso_ext.diagnostics.choice import choose_method
from aniso_ext.diagnostics.findings import Finding, Range, range_of, share
from aniso_ext.diagnostics.gap import ROWS_PER_DIMENSION, GapReport
from aniso_ext.diagnostics.oracle import OraclePathReport

SAME = 1e-6
"""Source and target are the same when E||x - y||^2 is at most this share of the spread of both."""
MOST = 2 / 3
"""The gap is "mostly" of a part when at least this share of E||x - y||^2 is."""
SIGMAS = 3.0
"""Standard deviations of what chance gives."""
C_LAMBDA = 0.8
"""Spectra from this correlation of log eigenvalues on fall off alike."""
EXCESS = 0.1
"""Leading subspaces are shared when (O_q - q/D) / (1 - q/D) is at least this; the paper's data have 0.38."""
FLAT = 0.9
"""A spectrum is flat when its effective dimension is at least this share of an isotropic sample's."""
STRONGER = 2.0
"""A residual is anisotropic when A_r is at least this many times its isotropic value,"""
CONCENTRATED = 0.8
"""and d_eff/D at most this share of its isotropic value."""
ISOTROPIC_STRONGER, ISOTROPIC_SPREAD = 1.25, 0.9
"""It is isotropic when A_r is at most, and d_eff/D at least, these times their isotropic values."""


@dataclass(frozen=True)
class Verdict:
    """Findings by topic: ``rows``, ``composition``, ``pairing``, ``geometry``, ``anisotropy``, ``premise``,
    ``headroom`` (with an oracle path) and ``method``."""

    findings: tuple[Finding, ...]

    def __getitem__(self, topic: str) -> Finding:
        return next(finding for finding in self.findings if finding.topic == topic)

    def __contains__(self, topic: str) -> bool:
        return any(finding.topic == topic for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(f"{finding.topic}: {finding.sentence}" for finding in self.findings)


def verdict(gap: GapReport, methods: Mapping[str, AlignmentReport], oracle: OraclePathReport | None = None) -> Verdict:
    """Say what the gap is made of, whether the premise of the method holds, and which method the numbers favour.

    The premise is that source and target share their dominant geometry and that the residual is anisotropic (METHOD
    sections 1 and 2): only then can a map that is fitted without pairs know what to correct.

    Args:
        gap: of all pairs.
        methods: alignment of every method by name, ``identity`` among them.
        oracle: the paired path, for what a correction could be worth.
    """
    pairing = _pairing(gap)
    geometry, anisotropy = _geometry(gap), _anisotropy(gap)
    findings = [
        _rows(gap),
        _composition(gap),
        pairing,
        geometry,
        anisotropy,
        _premise(pairing, geometry, anisotropy),
        *([] if oracle is None or pairing.outcome == "same" else [_headroom(oracle)]),
        choose_method(methods, paired=pairing.outcome in ("paired", "same"), gap_is_nil=pairing.outcome == "same"),
    ]
    return Verdict(tuple(findings))


def _rows(gap: GapReport) -> Finding:
    enough = gap.n >= ROWS_PER_DIMENSION * gap.width
    rule = (
        f"Enough means n ≥ {ROWS_PER_DIMENSION} D = {ROWS_PER_DIMENSION * gap.width:,}; isotropic values at n come "
        "from the Marchenko–Pastur law."
    )
    if enough:
        return Finding("rows", "enough", f"{gap.n:,} pairs are enough for the spectra of width {gap.width:,}.", rule)
    sentence = (
        f"{gap.n:,} pairs are few for width {gap.width:,}: an isotropic residual would already read A_r = "
        f"{gap.a_r_isotropic:.2f} and d_eff/D = {gap.d_eff_ratio_isotropic:.2f}, so compare with those and not with 1."
    )
    return Finding("rows", "few", sentence, rule)


def _nil(gap: GapReport) -> bool:
    return gap.g_mu**2 + gap.d_center <= SAME * _spread(gap)


def _spread(gap: GapReport) -> float:
    return math.fsum(gap.source_spectrum) + math.fsum(gap.target_spectrum)


def _composition(gap: GapReport) -> Finding:
    rule = (
        f"R_res = E‖r‖² / E‖x − y‖². Mostly residual: R_res ≥ {MOST:.2f}; mostly bias: R_res ≤ {1 - MOST:.2f}; "
        "both: between them; no gap: "
        f"E‖x − y‖² ≤ {SAME:g} of the spread of both sets."
    )
    if _nil(gap):
        return Finding("composition", "none", "Source and target are the same: there is no gap.", rule)
    r = range_of(gap, "r_res")
    parts = (
        f"residual {share(r)}, bias {share(Range(1 - r.value, 1 - r.high, 1 - r.low, r.measured))} of the mean "
        "squared distance of a pair"
    )
    if r.low >= MOST:
        return Finding(
            "composition",
            "residual",
            f"The gap is mostly residual ({parts}): shifting the mean leaves most of it.",
            rule,
        )
    if r.high <= 1 - MOST:
        return Finding(
            "composition", "bias", f"The gap is mostly bias ({parts}): shifting the mean removes most of it.", rule
        )
    if r.low > 1 - MOST and r.high < MOST:
        return Finding("composition", "both", f"Bias and residual both matter ({parts}).", rule)
    return Finding(
        "composition", "undecided", f"What dominates the gap cannot be told from these pairs ({parts}).", rule
    )


def _pairing(gap: GapReport) -> Finding:
    """1 - E||r||^2 / (tr S_x + tr S_y) is 2 tr Cov(x, y) over the spread; its variance for unrelated rows is known."""
    spread = _spread(gap)
    products = math.fsum(a * b for a, b in zip(gap.source_spectrum, gap.target_spectrum, strict=True))
    chance = SIGMAS * 2 * math.sqrt(products / gap.n) / spread if spread > 0 else math.nan
    rule = (
        "Shared variation is 1 − D_center / (tr S_x + tr S_y): 0 for unrelated rows, 1 for equal ones. Related: "
        f"above {SIGMAS:g} standard deviations "
        f"of shuffled rows ({chance:.3f} here)."
    )
    if _nil(gap):
        return Finding("pairing", "same", "Every source row is its own target.", rule)
    if not spread > 0:
        return Finding("pairing", "undecided", "The rows do not vary: nothing can be said of pairs.", rule)
    d = range_of(gap, "d_center")
    shared = Range(1 - d.value / spread, 1 - d.high / spread, 1 - d.low / spread, d.measured)
    if shared.low > chance:
        sentence = (
            f"Pairs share {share(shared)} of their variation; of the rest no map of the source alone can know the "
            "target's part."
        )
        return Finding("pairing", "paired", sentence, rule)
    if shared.high <= chance:
        sentence = (
            f"Row i of the source says nothing about row i of the target (shared variation {share(shared)}): "
            "check that the rows are in the same "
            "order. Cosine, R@k and everything about the residual mean nothing before that."
        )
        return Finding("pairing", "unpaired", sentence, rule)
    return Finding(
        "pairing", "undecided", f"Whether the rows are pairs cannot be told (shared variation {share(shared)}).", rule
    )


def _flat(spectrum: tuple[float, ...], gap: GapReport) -> bool:
    total = math.fsum(spectrum)
    squares = math.fsum(value * value for value in spectrum)
    return total**2 / squares / gap.width >= FLAT * gap.d_eff_ratio_isotropic if squares > 0 else False


def _geometry(gap: GapReport) -> Finding:
    base = gap.o_q_baseline
    chance = base + SIGMAS * math.sqrt(2 / ((gap.width - 1) * (gap.width + 2))) * (1 - base) if gap.width > 1 else 1.0
    needed = base + EXCESS * (1 - base)
    rule = (
        f"Compatible: C_lambda ≥ {C_LAMBDA:g} and O_q ≥ {needed:.3f}, which is {100 * EXCESS:.0f} % of the way "
        f"from q/D = {base:.3f} to 1. Weak: O_q between that "
        f"and {chance:.3f}, which random subspaces reach ({SIGMAS:g} standard deviations). Incompatible: C_lambda "
        "or O_q below. Flat: the effective dimension of "
        f"a cloud is at least {100 * FLAT:.0f} % of an isotropic sample's."
    )
    c, o = range_of(gap, "c_lambda"), range_of(gap, "o_q")
    numbers = f"C_lambda {c}, O_{gap.q} {o} against q/D = {base:.3f}"
    if gap.c_lambda_count < max(gap.q, 2) or math.isnan(c.value) or math.isnan(o.value):
        sentence = (
            f"The leading subspaces cannot be compared: only {gap.c_lambda_count} eigenvalues of both clouds are "
            f"usable, and O_q looks at {gap.q}. "
            "Give more rows, or a smaller q."
        )
        return Finding("geometry", "undecided", sentence, rule)
    if _flat(gap.source_spectrum, gap) or _flat(gap.target_spectrum, gap):
        sentence = (
            f"There is no dominant geometry to share: a cloud has about the same energy in all directions ({numbers})."
        )
        return Finding("geometry", "flat", sentence, rule)
    if c.low >= C_LAMBDA and o.low >= needed:
        return Finding(
            "geometry", "compatible", f"The dominant geometry of both clouds is compatible ({numbers}).", rule
        )
    if c.high < C_LAMBDA or o.high <= chance:
        return Finding(
            "geometry", "incompatible", f"The dominant geometry of the clouds is not compatible ({numbers}).", rule
        )
    if c.low >= C_LAMBDA and o.low > chance and o.high < needed:
        sentence = f"The dominant geometry is shared only weakly: above chance, but little ({numbers})."
        return Finding("geometry", "weak", sentence, rule)
    return Finding(
        "geometry", "undecided", f"Whether the dominant geometry is compatible cannot be told ({numbers}).", rule
    )


def _anisotropy(gap: GapReport) -> Finding:
    strong, spread = gap.a_r_isotropic, gap.d_eff_ratio_isotropic
    rule = (
        f"At this n an isotropic residual reads A_r = {strong:.2f} and d_eff/D = {spread:.3f}. Anisotropic: A_r ≥ "
        f"{STRONGER:g} × and d_eff/D ≤ {CONCENTRATED:g} × "
        f"these. Isotropic: A_r ≤ {ISOTROPIC_STRONGER:g} × and d_eff/D ≥ {ISOTROPIC_SPREAD:g} ×. Weak: between."
    )
    if _nil(gap) or math.isnan(gap.a_r):
        return Finding("anisotropy", "none", "There is no residual whose directions could differ.", rule)
    a, d = range_of(gap, "a_r"), range_of(gap, "d_eff_ratio")
    numbers = f"A_r {a:.1f} against {strong:.1f}, d_eff/D {d} against {spread:.3f}"
    if a.low >= STRONGER * strong and d.high <= CONCENTRATED * spread:
        return Finding(
            "anisotropy",
            "anisotropic",
            f"The residual is anisotropic ({numbers}): it has directions that can be corrected.",
            rule,
        )
    # resampled rows repeat, which raises A_r and lowers d_eff as fewer rows would: the values themselves decide here
    if a.value <= ISOTROPIC_STRONGER * strong and d.value >= ISOTROPIC_SPREAD * spread:
        return Finding(
            "anisotropy",
            "isotropic",
            f"The residual is isotropic ({numbers}): no direction stands out to be corrected.",
            rule,
        )
    if a.value >= STRONGER * strong and d.value <= CONCENTRATED * spread:
        return Finding(
            "anisotropy", "undecided", f"Whether the residual is anisotropic cannot be told ({numbers}).", rule
        )
    return Finding("anisotropy", "weak", f"The residual is only weakly anisotropic ({numbers}).", rule)


def _premise(pairing: Finding, geometry: Finding, anisotropy: Finding) -> Finding:
    rule = (
        "Holds: geometry compatible and residual anisotropic. Fails: geometry incompatible or flat, or residual "
        "isotropic. Partly: one of them weak. "
        "Without related rows the residual cannot be judged."
    )
    if pairing.outcome == "same":
        return Finding("premise", "none", "There is no gap, so nothing is to be corrected.", rule)
    if pairing.outcome == "unpaired":
        return Finding("premise", "undecided", "The premise cannot be judged on rows that are not pairs.", rule)
    failing = [
        text
        for wrong, text in (
            (geometry.outcome == "incompatible", "the dominant geometry is not shared"),
            (geometry.outcome == "flat", "there is no dominant geometry"),
            (anisotropy.outcome == "isotropic", "the residual is isotropic"),
        )
        if wrong
    ]
    if failing:
        sentence = (
            f"The premise of a geometric correction does not hold: {' and '.join(failing)}. Expect no more than a "
            "shift of the mean gives."
        )
        return Finding("premise", "fails", sentence, rule)
    outcomes = {geometry.outcome, anisotropy.outcome}
    if outcomes == {"compatible", "anisotropic"}:
        sentence = (
            "The premise of a geometric correction holds: the dominant geometry is shared and the residual has "
            "directions."
        )
        return Finding("premise", "holds", sentence, rule)
    if "undecided" in outcomes or "none" in outcomes:
        return Finding("premise", "undecided", "Whether the premise holds cannot be told from these pairs.", rule)
    weak = "geometry" if geometry.outcome == "weak" else "anisotropy of the residual"
    return Finding("premise", "partly", f"The premise holds only in part: the {weak} is weak.", rule)


def _headroom(path: OraclePathReport) -> Finding:
    """What the leading directions are worth, by the largest rank below D (or D itself)."""
    rule = (
        "From the oracle path, which is given the pairs it is judged on: mean cosine to the own target after the "
        "mean shift (α = 0) and with the K leading "
        "residual directions given away (α = 1). An upper bound for K directions, no method."
    )
    ranks = sorted({point.top_k for point in path.points})
    rank = max((one for one in ranks if one < path.width), default=ranks[-1])
    points = sorted((point for point in path.points if point.top_k == rank), key=lambda point: point.alpha)
    first, last = points[0], points[-1]
    sentence = (
        f"The {rank} leading of {path.width:,} residual directions hold {100 * last.energy:.0f} % of the "
        "residual; knowing them exactly would raise the cosine of pairs "
        f"from {first.alignment.paired_cosine:.3f} to {last.alignment.paired_cosine:.3f}."
    )
    return Finding("headroom", "measured", sentence, rule)
