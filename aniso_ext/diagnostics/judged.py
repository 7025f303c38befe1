"""What a study goes by: the rows that are judged, the time of its steps, and warnings that wait."""

from __future__ import annotations

import time
import warnings as python_warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from aniso_ext.diagnostics.report import DiagnosticsWarning
from aniso_ext.diagnostics.rows import open_paired
from aniso_ext.errors import InputError


@dataclass(frozen=True)
class JudgedRows:
    """The rows that stand-ins are judged on; ``chosen`` is None when they are all.

    ``in_place`` leaves a set whose rows are all judged where it is, for whoever reads it in pieces.
    """

    given: Any
    total: int
    width: int
    chosen: np.ndarray | None
    in_place: bool = False

    @property
    def count(self) -> int:
        return self.total if self.chosen is None else len(self.chosen)

    @property
    def source(self) -> Any:
        return self.read(self.given)

    def read(self, value: Any) -> Any:
        """The judged rows of an array, a tensor, a set or a path, as stored."""
        opened = _opened(value)
        return opened if self.in_place and self.chosen is None else self._in_memory(opened)

    def _in_memory(self, opened: Any) -> Any:
        if isinstance(opened, (np.ndarray, torch.Tensor)):
            return opened if self.chosen is None else opened[self.chosen]
        return opened.read(slice(0, self.total) if self.chosen is None else self.chosen)

    def check(self, name: str, value: Any) -> None:
        """Refuse a set whose rows are not those of the source; what a function makes is seen when it is called."""
        if not callable(value):
            open_paired(minimum=1, source=self.given, **{name: value})

    def stand_ins(self, name: str, value: Any) -> Any:
        """The judged rows of a method: those of a set of all rows, or what a function makes of the source."""
        if callable(value):
            made = value(self._in_memory(_opened(self.given)))
            shape = tuple(getattr(made, "shape", ()))
            if shape != (self.count, self.width):
                raise InputError(
                    f"{name} made {list(shape) or type(made).__name__} of {[self.count, self.width]} source rows: "
                    "a method must return one stand-in a row"
                )
            return made
        self.check(name, value)
        return self.read(value)


def _opened(value: Any) -> Any:
    if not isinstance(value, (str, PathLike)):
        return value
    from aniso_ext.data import open_embeddings

    return open_embeddings(value)


class Clock:
    """How long the steps of a study take; steps of one name add up."""

    def __init__(self, progress: Callable[[str], AbstractContextManager[None]]) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.progress(text):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def quietly() -> Iterator[None]:
    """Warnings of the parts are collected from their reports and said once."""
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", DiagnosticsWarning)
        yield
