"""Results of a comparison: means and spread over seeds, and how far each arm comes from identity to the bound."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.errors import DataError

RESULT = "result.json"
FLOOR, BOUND = "identity", "images"
_LEFT_OUT = ("yes_share",)


@dataclass(frozen=True)
class Ladder:
    """Scores by arm, score and seed.

    Attributes:
        scores: arm -> score -> one value for each seed. Arms that are reported as one are the best of them.
        chosen: name of the reported arm -> the arm that was best on the validation questions.
    """

    scores: dict[str, dict[str, list[float]]]
    chosen: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Scores that every arm has."""
        found = [list(scores) for scores in self.scores.values()]
        return [name for name in found[0] if all(name in names for names in found) and name not in _LEFT_OUT]

    def mean(self, arm: str, name: str) -> float:
        return float(np.mean(self.scores[arm][name]))

    def spread(self, arm: str, name: str) -> float:
        """Standard deviation over the seeds; NaN of one seed."""
        values = self.scores[arm][name]
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    def recovered(self, arm: str, name: str) -> float | None:
        """Share of the distance from identity to the bound; None where one of the two is missing."""
        if not {FLOOR, BOUND} <= set(self.scores):
            return None
        low, high = self.mean(FLOOR, name), self.mean(BOUND, name)
        return (self.mean(arm, name) - low) / (high - low) if high != low else None

    def table(self) -> str:
        """Markdown: mean ± standard deviation over the seeds, and in brackets the recovered share."""
        lines = ["| arm | " + " | ".join(self.names) + " |", "|---|" + "---|" * len(self.names)]
        for arm in self.scores:
            level = self.chosen.get(arm, arm)
            shown = arm if level == arm else f"{arm} ({level})"
            lines.append(f"| {shown} | " + " | ".join(self._cell(arm, name) for name in self.names) + " |")
        return "\n".join(lines)

    def _cell(self, arm: str, name: str) -> str:
        share = self.recovered(arm, name)
        spread = self.spread(arm, name)
        text = f"{self.mean(arm, name):.3f}" + ("" if np.isnan(spread) else f" ± {spread:.3f}")
        return text if share is None or arm in (FLOOR, BOUND) else f"{text} ({share:.0%})"

    def verdict(self, name: str) -> str:
        """In words: which arm without pairs comes closest to the bound."""
        rivals = [arm for arm in self.scores if arm not in (BOUND, "blind", FLOOR)]
        if BOUND not in self.scores or FLOOR not in self.scores or not rivals:
            return "identity, images and another arm are needed for a verdict"
        if self.recovered(BOUND, name) is None:
            return f"{name}: identity is as good as images, so that nothing is left to recover"
        ranked = sorted(rivals, key=lambda arm: -self.mean(arm, name))
        shares = ", ".join(f"{arm} {self.recovered(arm, name):.0%}" for arm in ranked)
        return f"{name}: of the distance from identity to images, {shares}"

    def write_csv(self, path: Path) -> None:
        """One line for each arm, score and seed."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["arm", "chosen", "score", "seed", "value"])
            for arm, scores in self.scores.items():
                for name, values in scores.items():
                    for seed, value in enumerate(values):
                        writer.writerow([arm, self.chosen.get(arm, ""), name, seed, f"{value:.5g}"])


def read_ladder(folder: str | os.PathLike[str], arms: Sequence[str] | None = None) -> Ladder:
    """What runs have left in a folder.

    Raises:
        DataError: there is no result.
    """
    root = Path(folder)
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(root.glob(f"*/seed-*/{RESULT}")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault(result["arm"], []).append(result)
    order = list(arms) if arms is not None else list(results)
    found = {arm: sorted(results[arm], key=lambda one: one["seed"]) for arm in order if arm in results}
    if not found:
        raise DataError(f"{root} has no results of runs: train an arm first")
    groups: dict[str, list[str]] = {}
    for arm, runs in found.items():
        groups.setdefault(runs[0]["tuned"] or arm, []).append(arm)
    scores: dict[str, dict[str, list[float]]] = {}
    chosen: dict[str, str] = {}
    for name, members in groups.items():
        best = _best({arm: found[arm] for arm in members})
        if best != name or len(members) > 1:
            chosen[name] = best
        runs = found[best]
        scores[name] = {key: [run["scores"][key]["value"] for run in runs] for key in runs[0]["scores"]}
    return Ladder(scores, chosen)


def _best(members: dict[str, list[dict[str, Any]]]) -> str:
    """The arm of a group with the best validation scores, over the seeds that all of the group have."""
    if len(members) == 1:
        return next(iter(members))
    seeds = {arm: {run["seed"] for run in runs} for arm, runs in members.items()}
    common = set.intersection(*seeds.values()) or set.union(*seeds.values())
    means = {
        arm: float(np.mean([_headline(run) for run in runs if run["seed"] in common])) for arm, runs in members.items()
    }
    return max(means, key=means.__getitem__)


def _headline(run: dict[str, Any]) -> float:
    """What arms are chosen by: the mean of the kinds of questions, captions counted as a tenth of CIDEr-D."""
    scores = run.get("validation") or {}
    values = [
        scores[name]["value"] / (10 if name == "cider_d" else 1)
        for name in ("cider_d", "attribute", "multiple_choice", "yes_no")
        if name in scores
    ]
    if not values:
        raise DataError(f"{run['arm']} is one of several arms to choose from: give the comparison validation questions")
    return float(np.mean(values))
