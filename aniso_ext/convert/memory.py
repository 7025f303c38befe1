"""How many rows a batch may have within a budget of memory."""

from __future__ import annotations

import re

import numpy as np

from aniso_ext.convert.plan import Plan
from aniso_ext.data.dtypes import array_dtype
from aniso_ext.errors import InputError

BATCH_ROWS = 8192
FEWEST_ROWS = 64
"""The smallest batch that a budget may lead to; smaller ones leave the kernels idle."""
COPIES = 6
"""Times that the numbers of a batch are in memory at once: as read, widened, mapped (twice, inside the map), to be
stored, and the next batch; each in the widest of the formats, at least single precision."""
ROW_GROUPS = 64 << 20
"""What parquet takes beside the batches: the row group that is collected, as rows, as Arrow arrays and as pages."""

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of a size such as 2GB, 512MiB or 1000000; K, M, G and T are powers of 1000, Ki, Mi, Gi and Ti of 1024.

    Example:
        >>> parse_size("1.5GB"), parse_size("2MiB")
        (1500000000, 2097152)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is no size: pass something like 2GB or 512MiB")
    return int(float(match[1]) * unit)


def shown_size(size: int) -> str:
    """A size as people write it.

    Example:
        >>> shown_size(1_500_000_000)
        '1.50 GB'
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def needed_memory(plan: Plan, batch_rows: int) -> int:
    """Bytes that a conversion needs beside what Python and its libraries take, with one batch under way at a time."""
    shard = plan.targets[0].shard
    wide = np.promote_types(np.promote_types(shard.dtype, array_dtype(plan.stored_dtype)), np.float32).itemsize
    parquet = "parquet" in (shard.format, *(target.format for target in plan.targets[:1]))
    return COPIES * batch_rows * shard.width * wide + (ROW_GROUPS if parquet else 0)


def batch_rows_within(plan: Plan, memory: int, wanted: int | None) -> int:
    """Rows of a batch that fits into a budget: those wanted, else the largest power of two up to 8192.

    Raises:
        InputError: the budget is too small; the message says what is needed.
    """
    rows = BATCH_ROWS if wanted is None else wanted
    while wanted is None and rows > FEWEST_ROWS and needed_memory(plan, rows) > memory:
        rows //= 2
    if needed_memory(plan, rows) > memory:
        raise InputError(
            f"memory {shown_size(memory)} is too little for batches of {rows} rows, which need "
            f"{shown_size(needed_memory(plan, rows))}: allow more, or fewer rows with batch_rows"
        )
    return rows
