"""Several clouds of embeddings that belong to the same pairs: source, target and the stand-ins of each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from aniso_ext.diagnostics.rows import BATCH_ROWS, Rows, choose_rows, open_paired
from aniso_ext.errors import InputError

TARGET, SOURCE = "target", "source"


def open_clouds(source: Any, target: Any, stand_ins: Mapping[str, Any], *, minimum: int) -> dict[str, Rows]:
    """The target, the source and the stand-ins, by name in this order; errors name the method.

    Raises:
        InputError: rows or widths differ, fewer than ``minimum`` rows, or a method is called ``source`` or ``target``.
    """
    for name in stand_ins:
        if name in (SOURCE, TARGET):
            raise InputError(f"stand-ins may not be called {name!r}: that name is taken, choose another")
    opened = open_paired(
        minimum=minimum,
        source=source,
        target=target,
        **{f"stand-in {name!r}": value for name, value in stand_ins.items()},
    )
    return dict(zip((SOURCE, TARGET, *stand_ins), opened, strict=True))


def check_seed(seed: int) -> None:
    """Raises an InputError unless ``seed`` can seed a generator."""
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")


def sample(count: int, max_rows: int | None, seed: int) -> np.ndarray:
    """Indices of all rows, or of a seeded sample without replacement."""
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows must be at least 1, got {max_rows}: or pass None for all rows")
    check_seed(seed)
    chosen = choose_rows(count, max_rows, seed)
    return np.arange(count) if chosen is None else chosen


def batches(rows: Rows, chosen: np.ndarray) -> Iterator[torch.Tensor]:
    """The chosen rows in order, at most ``BATCH_ROWS`` at a time, float64."""
    for start in range(0, len(chosen), BATCH_ROWS):
        yield rows.read(chosen[start : start + BATCH_ROWS])
