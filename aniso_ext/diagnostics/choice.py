"""Which method the numbers favour: what it keeps of the source against how well it mixes with the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from aniso_ext.diagnostics.alignment import AlignmentReport
from aniso_ext.diagnostics.findings import Finding, Range, range_of

IDENTITY = "identity"
MARGIN = 0.01
"""Scores without intervals this close are not told apart."""
RECALL_KEPT = 0.9
"""A method that finds fewer than this share of what identity finds has lost the pairs."""

RULE = (
    "Score: harmonic mean of preservation (mean of Psi and Omega) and mixing (the lesser of M_Z and M_X, at most "
    "1), its bounds from theirs. Methods whose bounds "
    f"overlap those of the highest score cannot be told apart; without intervals bounds are ± {MARGIN:g}, or "
    "what a sample of queries leaves if that is more. Left out: methods whose cosine "
    f"is clearly below identity's or whose R@10 is clearly below {100 * RECALL_KEPT:.0f} % of it. A method is "
    "favoured only if identity is not among the best."
)


def preservation(report: AlignmentReport) -> Range:
    """Mean of Psi and Omega, none below 0."""
    return _mean([range_of(report, name) for name in ("psi", "omega")])


def mixing_share(report: AlignmentReport) -> Range:
    """The lesser of M_Z and M_X, at most 1: mixed on one side only is not mixed, and above 1 is no better."""
    m_z, m_x = (_mean([range_of(report, name)]) for name in ("m_z", "m_x"))
    if math.isnan(m_z.value + m_x.value):
        return Range(math.nan, math.nan, math.nan, False)
    value, low, high = (min(pair) for pair in zip(m_z[:3], m_x[:3], strict=True))
    return Range(value, low, high, m_z.measured and m_x.measured)


def score(report: AlignmentReport) -> Range:
    """2 P M / (P + M) of preservation P and mixing M, rising in both, so that its bounds are those of the bounds.

    Source: this project's rule, not the paper's; it orders the paper's methods as the paper does.
    """
    kept, mixed = preservation(report), mixing_share(report)
    value, low, high = (_harmonic(a, b) for a, b in zip(kept[:3], mixed[:3], strict=True))
    return Range(value, low, high, kept.measured and mixed.measured)


def choose_method(methods: Mapping[str, AlignmentReport], *, paired: bool, gap_is_nil: bool) -> Finding:
    """The finding about methods; ``paired`` says whether cosine and recall of pairs mean anything."""
    scores = {name: _with_margin(score(report)) for name, report in methods.items()}
    if set(methods) <= {IDENTITY}:
        sentence = "Only the source as it is was judged: give aligners or stand-ins to compare methods."
        return Finding("method", "alone", sentence, RULE)
    if any(math.isnan(one.value) for one in scores.values()):
        names = ", ".join(name for name, one in scores.items() if math.isnan(one.value))
        sentence = (
            f"Methods cannot be compared: the score of {names} is undefined (mixing needs k ≥ 2, and rows that vary)."
        )
        return Finding("method", "undefined", sentence, RULE)
    lost = _lost(methods) if paired else []
    ranked = sorted((name for name in methods if name not in lost), key=lambda name: -scores[name].value)
    best = ranked[0]
    tied = [name for name in ranked if scores[name].high >= scores[best].low]
    leftover = f" Left out, since further from the own targets than the source as it is: {_list(lost)}." if lost else ""
    if IDENTITY in tied:
        return Finding("method", "identity", _identity_sentence(scores, tied, gap_is_nil) + leftover, RULE)
    gain = f"; the source as it is has {scores[IDENTITY]:.3f}" if IDENTITY in scores else ""
    if len(tied) == 1:
        sentence = f"The numbers favour {best} (score {scores[best]:.3f}{gain})."
        return Finding("method", "favoured", sentence + leftover, RULE)
    sentence = (
        f"{_list(tied)} cannot be told apart (best score {best} {scores[best]:.3f}{gain}): all beat the source as "
        "it is. " + _closest(methods, tied, paired)
    )
    return Finding("method", "tied", sentence + leftover, RULE)


def _identity_sentence(scores: Mapping[str, Range], tied: Sequence[str], gap_is_nil: bool) -> str:
    if gap_is_nil:
        return "Nothing is to be corrected: the source is the target."
    others = [name for name in tied if name != IDENTITY]
    if not others:
        return f"No method does better than the source as it is (score {scores[IDENTITY]:.3f}): leave it."
    return (
        f"The source as it is (score {scores[IDENTITY]:.3f}) and {_list(others)} cannot be told apart: these numbers "
        "give no reason to correct."
    )


def _closest(methods: Mapping[str, AlignmentReport], tied: Sequence[str], paired: bool) -> str:
    if paired:
        cosines = {name: range_of(methods[name], "paired_cosine") for name in tied}
        first = max(tied, key=lambda name: cosines[name].value)
        if all(cosines[name].high < cosines[first].low for name in tied if name != first):
            return f"Of these, {first} is closest to its own targets (cosine {cosines[first]:.3f})."
    return "Take the simplest of them, or judge by what they are used for."


def _lost(methods: Mapping[str, AlignmentReport]) -> list[str]:
    """Methods that are clearly further from their targets, or find clearly fewer of them, than the source as it is."""
    if IDENTITY not in methods:
        return []
    cosine, recall = (range_of(methods[IDENTITY], name) for name in ("paired_cosine", "recall_at_10"))
    return [
        name
        for name, report in methods.items()
        if name != IDENTITY
        and (
            range_of(report, "paired_cosine").high < cosine.low
            or range_of(report, "recall_at_10").high < RECALL_KEPT * recall.low
        )
    ]


def _with_margin(one: Range) -> Range:
    """Without an interval, bounds of at least the margin."""
    if one.measured:
        return one
    return Range(one.value, min(one.low, one.value - MARGIN), max(one.high, one.value + MARGIN), False)


def _mean(parts: Sequence[Range]) -> Range:
    value, low, high = (
        sum(min(max(getattr(part, side), 0.0), 1.0) for part in parts) / len(parts) for side in ("value", "low", "high")
    )
    if any(math.isnan(part.value) for part in parts):
        return Range(math.nan, math.nan, math.nan, False)
    return Range(value, low, high, all(part.measured for part in parts))


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else (math.nan if math.isnan(a + b) else 0.0)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
