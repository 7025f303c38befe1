"""Block sizes of the kernels, from a table instead of a search at run time: the first call is as fast as the others.

``ANISO_TRITON_CONFIG="rows,columns,warps,stages"`` or :func:`overridden` replace the table's choice for every kernel;
``benchmarks/tune_triton.py`` measures candidates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from aniso_ext.ops.triton.constants import padded_blocks


class Configuration(NamedTuple):
    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int


_override: list[Configuration] = []

# Pairs of sums [rows, P] that a program of each kernel keeps while it walks over the columns.
ACCUMULATORS = {
    "correct": 1,
    "correct_sums": 1,
    "encode": 1,
    "decode": 2,
    "correct_backward": 2,
    "encode_backward": 2,
    "decode_backward": 3,
}


@contextmanager
def overridden(configuration: Configuration) -> Iterator[None]:
    """Every kernel launched inside uses this configuration."""
    _override.append(configuration)
    try:
        yield
    finally:
        _override.pop()


def configuration(operation: str, dtype: torch.dtype, width: int, rank: int) -> Configuration:
    """The choice for an operation and rows of a dtype, a width and a rank."""
    if _override:
        return _override[-1]
    if chosen := os.environ.get("ANISO_TRITON_CONFIG"):
        return Configuration(*(int(value) for value in chosen.split(",")))
    blocks, pairs = padded_blocks(rank // 2), ACCUMULATORS[operation]
    # a basis tile is streamed from the cache for each block of rows: as many rows as the sums leave registers for,
    # 64 of 8 x 32 threads' 255
    rows = 128
    while rows > 16 and rows * 2 * blocks * pairs > (64 if rows > 64 else 96) * 256:
        rows //= 2
    warps = 8 if rows * blocks >= 64 * 32 else 4
    columns = 64 if blocks <= 64 else 32
    if dtype == torch.float32:
        columns //= 2
    if blocks >= 512:
        columns = 16
    return Configuration(rows, columns, warps, 3 if blocks <= 128 else 2)


def smaller(choice: Configuration) -> Iterator[Configuration]:
    """The choice itself, then ones that need less shared memory, for devices that have less."""
    yield choice
    rows, columns, warps, stages = choice
    while stages > 2:
        stages -= 1
        yield Configuration(rows, columns, warps, stages)
    while columns > 16:
        columns //= 2
        yield Configuration(rows, columns, warps, stages)
    while rows > 16:
        rows //= 2
        yield Configuration(rows, columns, warps, stages)
    yield Configuration(rows, columns, warps, 1)
