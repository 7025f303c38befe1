"""Captioning metrics over a corpus: CIDEr-D (Vedantam et al. 2015) and BLEU (Papineni et al. 2002)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from aniso_ext.errors import InputError

_LONGEST = 4
_SIGMA = 6.0
"""Of the penalty for another length, in CIDEr-D."""
_WORD = re.compile(r"[a-z0-9]+(?:['’][a-z]+)?")

Grams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Lower-case words of a text, punctuation left out.

    Example:
        >>> words("A man's blue T-shirt, size 40.")
        ['a', "man's", 'blue', 't', 'shirt', 'size', '40']
    """
    return _WORD.findall(text.lower())


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """CIDEr-D of each candidate [N]; the score of a corpus is the mean.

    For n = 1 to 4 the candidate's n-grams, weighted by tf-idf and clipped at those of a reference, are compared with
    the reference by cosine, times exp(-(difference of lengths)^2 / 72); then 10 times the mean over references and n.
    An n-gram's idf comes from the references of this corpus, so that scores of different corpora do not compare.

    Args:
        candidates: words of one caption for each image.
        references: words of one or more captions for each image.

    Raises:
        InputError: not one list of references for each candidate, or an image without any.

    Example:
        >>> found = [["a", "red", "shoe", "today"], ["a", "blue", "bag", "today"]]
        >>> cider_d(found, [[found[0]], [["a", "green", "hat", "today"]]]).round(2).tolist()
        [10.0, 0.0]
    """
    _check(candidates, references)
    counted = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter(gram for texts in counted for gram in set().union(*texts))
    images = math.log(len(references))
    scores = np.zeros(len(candidates))
    for place, (candidate, texts) in enumerate(zip(candidates, counted, strict=True)):
        found = _Weighted(_grams(candidate), frequency, images)
        compared = [_similarity(found, _Weighted(text, frequency, images)) for text in texts]
        scores[place] = 10 * float(np.mean(compared))
    return scores


def bleu_statistics(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """What BLEU adds up, for each candidate: matches and n-grams for n = 1 to 4, its length, the closest reference's.

    Returns:
        [N, 10].
    """
    _check(candidates, references)
    rows = np.zeros((len(candidates), 2 * _LONGEST + 2))
    for row, candidate, texts in zip(rows, candidates, references, strict=True):
        found, most = _grams(candidate), Counter[tuple[str, ...]]()
        for text in texts:
            most |= _grams(text)
        for gram, count in (found & most).items():
            row[len(gram) - 1] += count
        for n in range(_LONGEST):
            row[_LONGEST + n] = max(0, len(candidate) - n)
        lengths = [len(text) for text in texts]
        row[-2:] = len(candidate), min(lengths, key=lambda length: (abs(length - len(candidate)), length))
    return rows


def bleu_of(totals: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 from sums of :func:`bleu_statistics` [..., 10]: [..., 4]."""
    matches, possible = totals[..., :_LONGEST], totals[..., _LONGEST : 2 * _LONGEST]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(possible > 0, matches / np.maximum(possible, 1), 0.0)
        logarithms = np.cumsum(np.log(precision), axis=-1) / np.arange(1, _LONGEST + 1)
        length, wanted = totals[..., -2:-1], totals[..., -1:]
        penalty = np.where(length < wanted, 1 - wanted / np.maximum(length, 1e-9), 0.0)
        return np.exp(logarithms + penalty)


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """BLEU-1 to BLEU-4 of a corpus [4], in 0 to 1; no smoothing, the length of the closest reference.

    Example:
        >>> bleu([["a", "red", "shoe", "today"]], [[["a", "red", "shoe", "today"]]]).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    return bleu_of(bleu_statistics(candidates, references).sum(axis=0))


def _check(candidates: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if len(candidates) != len(references) or not all(references):
        raise InputError(
            f"{len(candidates)} captions and {len(references)} lists of references: pass one list of at least one "
            "reference for each caption"
        )


def _grams(text: Sequence[str]) -> Grams:
    return Counter(
        tuple(text[start : start + n]) for n in range(1, _LONGEST + 1) for start in range(len(text) - n + 1)
    )


class _Weighted:
    """Tf-idf of the n-grams of a text by n, their norms, and the length that CIDEr-D compares: its pairs of words."""

    def __init__(self, grams: Grams, frequency: Grams, images: float) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for gram, count in grams.items():
            self.weights[len(gram) - 1][gram] = count * (images - math.log(max(1, frequency[gram])))
        self.norms = [math.sqrt(sum(value * value for value in weights.values())) for weights in self.weights]
        self.length = sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(found: _Weighted, wanted: _Weighted) -> float:
    total = 0.0
    for n in range(_LONGEST):
        theirs, norm = wanted.weights[n], found.norms[n] * wanted.norms[n]
        if norm:
            ours = found.weights[n].items()
            total += sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours if gram in theirs) / norm
    return total / _LONGEST * math.exp(-((found.length - wanted.length) ** 2) / (2 * _SIGMA**2))
