"""What an evaluation found: scores with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_RESAMPLES = 500


@dataclass(frozen=True)
class Score:
    """A number, its bootstrap standard error, and how many questions it is of."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f} (n = {self.count:,})"


@dataclass(frozen=True)
class EvaluationReport:
    """Scores by name: ``cider_d``, ``bleu_1`` to ``bleu_4``; ``multiple_choice``, ``yes_no``, ``yes_no_f1``,
    ``yes_share``; ``attribute`` and one ``attribute:NAME`` for each.

    ``predictions`` is the file with every answer.
    """

    scores: dict[str, Score]
    predictions: str | None = None

    def __str__(self) -> str:
        width = max(map(len, self.scores), default=0)
        return "\n".join(f"{name:<{width}}  {score}" for name, score in self.scores.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, ready for JSON."""
        return {"scores": {name: asdict(score) for name, score in self.scores.items()}, "predictions": self.predictions}


def mean_score(values: Sequence[float] | np.ndarray) -> Score:
    """The mean; its standard error is that of resampling the values."""
    found = np.asarray(values, dtype=float)
    return Score(float(found.mean()), float(found.std() / np.sqrt(len(found))), len(found))


def resampled_score(rows: np.ndarray, statistic: Any, *, seed: int = 0) -> Score:
    """``statistic`` of the sum of rows [N, K]; its standard error over resampled rows."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_RESAMPLES)
    spread = np.array([statistic(total) for total in drawn @ rows])
    return Score(float(statistic(rows.sum(axis=0))), float(spread.std()), len(rows))


def f1_of(counts: np.ndarray) -> float:
    """F1 from [true positives, false positives, false negatives]; 0 where there are no true positives."""
    hits, false, missed = counts
    return float(2 * hits / (2 * hits + false + missed)) if hits else 0.0
