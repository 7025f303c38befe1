"""Readers of embeddings that train in seconds: a linear one in closed form, and a small network."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEPT = 2000
TEST = 2000
LEAST_COUNT = 60
RIDGE = 2e-5
"""Added to every covariance; noise of .0045 in each coordinate."""
ATTRIBUTES = {
    "fashion44k": ("articleType", "baseColour", "gender", "usage"),
    "clip_vitb32_classpairs": ("cls", "ds"),
}
_WORD = re.compile(r"[a-z0-9]+(?:['’][a-z]+)?")


@dataclass
class Problem:
    """Training rows of both sides, their answers, and held-out images with theirs.

    Attributes:
        source, target: [N, D], row i of both of the same thing; the first :data:`KEPT` choose levels of noise.
        test: [n, D] images.
        labels, test_labels: [., A] numbers of the attributes, -1 where unknown.
        words, test_words: [., W] zeros and ones of the frequent words of the title.
        sizes: values of each attribute.
        rarity: [W] log of rows over rows with the word.
        classes: [N] number of the combination of attributes, or of the first alone if that is all.
        basis: [D, R] of the fitted frame.
    """

    name: str
    source: torch.Tensor
    target: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    test_labels: torch.Tensor
    words: torch.Tensor
    test_words: torch.Tensor
    sizes: tuple[int, ...]
    rarity: torch.Tensor
    classes: torch.Tensor
    basis: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def answers(self) -> torch.Tensor:
        """Attributes one after the other as zeros and ones, then the words, [N, A1 + A2 + ... + W]."""
        parts = [
            torch.nn.functional.one_hot(self.labels[:, i].clamp_min(0), size) * (self.labels[:, i : i + 1] >= 0)
            for i, size in enumerate(self.sizes)
        ]
        return torch.cat([*parts, self.words], dim=1).float()

    def score(self, given: torch.Tensor, labels: torch.Tensor, words: torch.Tensor) -> tuple[float, float]:
        """Mean accuracy of the attributes, and the share of the words, by rarity, among as many that score highest."""
        starts = np.cumsum([0, *self.sizes])
        accuracies = []
        for i, size in enumerate(self.sizes):
            known = labels[:, i] >= -1
            found = given[known, starts[i] : starts[i] + size].argmax(dim=1)
            accuracies.append(float((found == labels[known, i]).float().mean()))
        scores = given[:, starts[-1] :]
        count = words.sum(dim=1, keepdim=True)
        rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
        hits = ((rank < count) * words) @ self.rarity
        return float(np.mean(accuracies)), float((hits / (words @ self.rarity).clamp_min(1e-9)).mean())

    def scores(self, read: Any) -> dict[str, float]:
        """Both scores of the test images and of the kept ones; ``read`` makes answers [n, .] of rows [n, D]."""
        test = self.score(read(self.test), self.test_labels, self.test_words)
        kept = slice(0, KEPT)
        own = self.score(read(self.target[kept]), self.labels[kept], self.words[kept])
        names = ("test_attributes", "test_words", "kept_attributes", "kept_words")
        return dict(zip(names, (*test, *own), strict=True))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def load_problem(folder: Path) -> Problem:
    """A data set of the folder: image.npy, text.npy, captions.jsonl."""
    lines = [json.loads(text) for text in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    image = np.load(folder / "image.npy", allow_pickle=False)
    text = np.load(folder / "text.npy", allow_pickle=False)
    if "split" in lines[0]:
        inside = np.array([line["split"] == "train" for line in lines])
        train, test = np.flatnonzero(inside), np.flatnonzero(~inside)[:TEST]
    else:
        # Copies of an image fall on one side; rows are ordered by class, so both sides are shuffled.
        inside = np.array([hashlib.blake2b(row.tobytes(), digest_size=1).digest()[0] >= 77 for row in image])
        random = np.random.default_rng(0)
        train, test = (random.permutation(np.flatnonzero(side)) for side in (inside, ~inside))
    attributes = ATTRIBUTES[folder.name]
    labels, test_labels, sizes = [], [], []
    for name in attributes:
        values = sorted({lines[row][name] for row in train if lines[row][name]})
        numbers = {value: number for number, value in enumerate(values)}
        labels.append([numbers.get(lines[row][name], -2) for row in train])
        # A value that no training row has is asked all the same, and no answer is right.
        test_labels.append([numbers.get(lines[row][name], -1 if lines[row][name] else -2) for row in test])
        sizes.append(len(values))
    tokens = [frozenset(_WORD.findall(line["caption"].lower())) for line in lines]
    counts = Counter(word for row in train for word in tokens[row])
    vocabulary = sorted(word for word, count in counts.items() if count >= min(LEAST_COUNT, len(train) // 400))
    combined = np.array(labels).T
    classes = np.unique(combined, axis=0, return_inverse=True)[1].ravel()

    def indicator(rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[word in tokens[row] for word in vocabulary] for row in rows], dtype=torch.float32)

    return Problem(
        name=folder.name,
        source=torch.from_numpy(text[train].astype(np.float32)),
        target=torch.from_numpy(image[train].astype(np.float32)),
        test=torch.from_numpy(image[test].astype(np.float32)),
        labels=torch.tensor(combined),
        test_labels=torch.tensor(np.array(test_labels).T),
        words=indicator(train),
        test_words=indicator(test),
        sizes=tuple(sizes),
        rarity=torch.tensor([np.log(len(train) / counts[word]) for word in vocabulary], dtype=torch.float32),
        classes=torch.tensor(classes),
    )


@dataclass(frozen=True)
class Moments:
    """Means and centred second moments of the rows that are trained on, and of their answers."""

    mean: torch.Tensor
    answer_mean: torch.Tensor
    covariance: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, problem: Problem, rows: torch.Tensor) -> Moments:
        """Of all rows but the kept ones."""
        own, answers = rows[KEPT:], problem.answers()[KEPT:].to(rows.dtype)
        mean, answer_mean = own.mean(dim=0), answers.mean(dim=0)
        centred = own - mean
        covariance = centred.T @ centred / len(own)
        return cls(mean, answer_mean, covariance, centred.T @ answers / len(own))


class LinearReader:
    """(S + C)^-1 S_za: the best linear map from rows with noise of covariance C to the answers, and its scores."""

    def __init__(self, problem: Problem, moments: Moments) -> None:
        self.problem, self.moments = problem, moments

    def weights(self, noise: torch.Tensor) -> torch.Tensor:
        """[D, answers]; ``noise`` is C [D, D]."""
        given = self.moments
        ridge = RIDGE * torch.eye(len(noise), dtype=noise.dtype)
        return torch.linalg.solve(given.covariance + noise + ridge, given.cross)

    def scores(self, noise: torch.Tensor) -> dict[str, float]:
        """See :meth:`Problem.scores`."""
        weights, given = self.weights(noise), self.moments
        return self.problem.scores(lambda rows: (rows - given.mean) @ weights + given.answer_mean)


def accuracy_of_network(
    problem: Problem, rows: torch.Tensor, factor: torch.Tensor, seed: int, *, steps: int = 400, batch: int = 256
) -> dict[str, float]:
    """Scores of a network of two hidden layers, trained with fresh noise ``factor`` g in each step, rows made unit.

    Steps, batch, rate and schedule are those of the ladder.
    """
    torch.manual_seed(seed)
    width, outputs = rows.shape[1], sum(problem.sizes) + problem.words.shape[1]
    hidden = 256
    net = torch.nn.Sequential(
        torch.nn.Linear(width, hidden),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, hidden),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, outputs),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    count, scale = len(rows) - KEPT, width**0.5
    passes = -(-steps * batch // count)
    order = torch.cat([torch.randperm(count) for _ in range(passes)]) + KEPT
    starts = np.cumsum([0, *problem.sizes])
    noisy = bool(factor.any())
    for step in range(steps):
        index = order[step * batch : (step + 1) * batch]
        given = rows[index]
        if noisy:
            given = unit(given + torch.randn_like(given) @ factor.T)
        found = net(given * scale)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            found[:, starts[-1] :], problem.words[index], reduction="sum"
        ) / len(index)
        for i, size in enumerate(problem.sizes):
            part = found[:, starts[i] : starts[i] + size]
            loss = loss + torch.nn.functional.cross_entropy(part, problem.labels[index, i], ignore_index=-2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return problem.scores(lambda given: net(given * scale))
