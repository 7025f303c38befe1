"""Conversions that die at each of their durable steps in turn, and what is made of what they left.

A script of its own, so that it may fork before anything has started threads:
``python convert_deaths.py CALIBRATION INPUT WANTED RUNS``; prints how many steps each case has.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from test_convert_embeddings import Affine, contents

from aniso_ext.convert import convert_embeddings

STEPS = ("replace", "fsync", "pwrite", "link", "unlink", "rmdir", "ftruncate", "truncate", "mkdir")
"""Calls that change what is on the disk. Bytes that are written between them are in files that are not in place."""
Workers = list[tuple[int, int]]
CASES: dict[str, dict[str, tuple[Workers, tuple[int, int], Workers]]] = {
    "fitted": {
        "alone": ([], (0, 1), [(0, 1)]),
        "first of two": ([], (0, 2), [(1, 2), (0, 2)]),
        "second of two": ([(0, 2)], (1, 2), [(1, 2)]),
        "other number": ([(1, 2)], (0, 2), [(1, 3), (0, 3), (2, 3)]),
        "then alone": ([(2, 3)], (0, 3), [(0, 1)]),
    },
    "corpus": {
        "alone": ([], (0, 1), [(0, 1)]),
        "first sums of two": ([], (0, 2), [(1, 2), (0, 2), (1, 2), (0, 2), (1, 2)]),
        "last of two": ([(0, 2), (1, 2), (0, 2)], (1, 2), [(1, 2)]),
        "then alone": ([(0, 2), (1, 2), (0, 2)], (1, 2), [(0, 1)]),
    },
}
"""Workers that run first, the one that dies, and those that run afterwards, by kind of calibration."""


class SummingAffine(Affine):
    """A map with a corpus mean that can be summed in parts; ``passes`` of them, each of which moves the mean."""

    corpus_passes = 2

    def corpus_sums(self, batch: np.ndarray, number: int) -> np.ndarray:
        self.calls += 1
        self.before(self.calls)
        return (batch - number * self.mean).astype(np.float64).sum(axis=0)

    def with_corpus_mean(self, mean: np.ndarray, number: int) -> SummingAffine:
        twin = SummingAffine(self.scale, self.width)
        twin.mean, twin.before = mean + number * self.mean / 2, self.before
        return twin


def die_before(step: int) -> None:
    """End the process without a word just before its n-th durable step."""
    counter = itertools.count(1)

    def deadly(perform: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(counter) == step:
                os._exit(9)
            return perform(*arguments, **options)

        return call

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))


def run(calibration: str, folder: str, output: Path, worker: tuple[int, int], death: int | None = None) -> int:
    """Exit code of a worker in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if death is not None:
                die_before(death)
            convert_embeddings(SummingAffine(), folder, output, batch_rows=4, calibration=calibration, worker=worker)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(calibration: str, folder: str, wanted: str, runs: str) -> None:
    want = contents(Path(wanted))
    for name, (first, dying, last) in CASES[calibration].items():
        for step in itertools.count(1):
            output = Path(runs) / f"{name} {step}"
            for worker in first:
                assert run(calibration, folder, output, worker) == 0, (name, step, worker)
            code = run(calibration, folder, output, dying, step)
            if code == 0:
                break
            assert code == 9, (name, step, code)
            for worker in last:
                assert run(calibration, folder, output, worker) == 0, (name, step, worker)
            assert contents(output) == want, (name, step)
        print(step - 1, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
