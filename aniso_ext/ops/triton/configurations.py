"""Block sizes of the kernels, from a table instead of a search at run time: the first call is as fast as the others.

``ANISO_TRITON_CONFIG="rows,columns,warps,stages[,registers]"`` or :func:`overridden` replace the choice of the table
for every kernel; ``benchmarks/tune_triton.py`` measures candidates.
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
    registers: int = 0
    """The most of a thread; 0: as many as there are."""


_override: list[Configuration] = []

# By the padded number of blocks of a rank: block rows, block columns, warps, stages. As many rows as the sums leave
# registers for, since the basis is streamed from the cache once or twice for each block of rows; four warps for each 64
# rows, as a thread then holds both coordinates of a block; of 32 rows eight warps would share the columns of up to 64
# blocks so that it does not, and each of them would map all blocks.
_HALF = {
    "correct": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_split": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_sums": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_leak": {64: (64, 64, 8, 3), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "encode": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2), 512: (16, 16, 8, 2)},
    "decode": {64: (64, 64, 4, 3), 128: (64, 32, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "correct_backward": {64: (64, 64, 4, 2), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "split_backward": {64: (32, 32, 4, 3), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "encode_backward": {64: (64, 64, 4, 2), 128: (32, 64, 8, 3), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
    "decode_backward": {64: (64, 64, 8, 3), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2), 512: (16, 16, 8, 2)},
}
OPERATIONS = tuple(_HALF)
# The least compute capability whose sums lie in tensor memory, where four sums of 64 rows and 256 columns, as float16
# states have, find no room: the compiler makes a trap of such a kernel. Those of 32 rows are left in registers.
_TENSOR_MEMORY = 100
# Where bfloat16, whose parts between two products need fewer registers, takes others. The last number limits registers
# so that three programs share a multiprocessor.
_BFLOAT16: dict[str, dict[int, tuple[int, ...]]] = {
    "correct": {128: (128, 64, 8, 3)},
    "correct_sums": {64: (64, 64, 4, 3, 168), 128: (128, 64, 8, 3)},
    "correct_backward": {64: (64, 64, 4, 3)},
    "encode_backward": {64: (64, 64, 4, 3)},
    "decode_backward": {64: (64, 64, 8, 4)},
}
_HOPPER = 90
# The same on Hopper, where two programs of eight warps are faster than of four; elsewhere those spill too much.
_BFLOAT16_ON_HOPPER = _BFLOAT16 | {"correct_backward": {64: (64, 64, 8, 3, 128)}}
# Where float32 rows take as many columns as others, as their basis is float16 at TF32.
_TF32: dict[str, dict[int, tuple[int, ...]]] = {
    "correct": {64: (64, 64, 4, 3)},
    "correct_split": {64: (64, 64, 4, 3)},
    "encode": {64: (64, 64, 4, 3)},
    "decode": {64: (64, 64, 8, 3)},
}


@contextmanager
def overridden(configuration: Configuration) -> Iterator[None]:
    """Every kernel launched inside uses this configuration."""
    _override.append(configuration)
    try:
        yield
    finally:
        _override.pop()


def configuration(
    operation: str, dtype: torch.dtype, width: int, rank: int, capability: int = 0, *, tf32: bool = False
) -> Configuration:
    """The choice for an operation and rows of a dtype, a width and a rank; ``capability`` of the device, e.g. 90."""
    if _override:
        return _override[-1]
    if chosen := os.environ.get("ANISO_TRITON_CONFIG"):
        return Configuration(*(int(value) for value in chosen.split(",")))
    blocks = max(padded_blocks(rank // 2), 64)
    others: dict[str, dict[int, tuple[int, ...]]] = _TF32 if tf32 else {}
    if dtype == torch.bfloat16:
        others = _BFLOAT16_ON_HOPPER if capability == _HOPPER else _BFLOAT16
    if blocks in others.get(operation, {}):
        return Configuration(*others[operation][blocks])
    rows, columns, warps, stages = _HALF[operation][blocks]
    if dtype == torch.float32:
        # rows as long in bytes
        columns = max(columns // 2, 16)
        if operation == "decode" and blocks == 64:
            rows, columns, warps = 64, 32, 8
    if dtype == torch.float16 and capability >= _TENSOR_MEMORY and operation == "decode" and blocks == 128:
        rows = 32
    return Configuration(rows, columns, warps, stages)


def smaller(choice: Configuration) -> Iterator[Configuration]:
    """The choice itself, then ones that need less shared memory, for devices that have less."""
    yield choice
    while choice.num_stages > 2:
        choice = choice._replace(num_stages=choice.num_stages - 1)
        yield choice
    while choice.block_columns > 16:
        choice = choice._replace(block_columns=choice.block_columns // 2)
        yield choice
    while choice.block_rows > 16:
        choice = choice._replace(block_rows=choice.block_rows // 2)
        yield choice
    yield choice._replace(num_stages=1)
