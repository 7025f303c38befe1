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

# By the padded number of blocks of a rank: block rows, block columns, warps, stages. As many rows as the sums leave
# registers for, since the basis is streamed from the cache once or twice for each block of rows.
_HALF = {
    "correct": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_sums": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_leak": {64: (64, 64, 8, 3), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "encode": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "decode": {64: (128, 64, 8, 3), 128: (64, 32, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_backward": {64: (64, 64, 4, 2), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "split_backward": {64: (32, 64, 8, 3), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "encode_backward": {64: (64, 64, 4, 2), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "decode_backward": {64: (64, 64, 8, 3), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
}
OPERATIONS = tuple(_HALF)


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
    blocks = max(padded_blocks(rank // 2), 64)
    rows, columns, warps, stages = _HALF[operation][blocks]
    if dtype == torch.float32:
        # rows as long in bytes
        columns = max(columns // 2, 16)
        if operation == "decode" and blocks == 64:
            rows, columns = 64, 32
    return Configuration(rows, columns, warps, stages)


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
