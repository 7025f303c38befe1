"""Randomness that belongs to a row: the same embedding gets the same draw in any batch, order, shard or process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def row_keys(rows: torch.Tensor, seed: int) -> Iterator[int]:
    """A 128-bit key for each row of [n, D], from the seed and the float32 values of the row."""
    values = rows.detach().to(device="cpu", dtype=torch.float32).numpy() + np.float32(0)
    salt = int(seed).to_bytes(8, "little", signed=True)
    for row in np.ascontiguousarray(values):
        yield int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=16, salt=salt).digest(), "little")


def row_noise(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal [n, D], one counter-based stream (Philox) a row; dtype and device of ``rows``.

    Drawn in float32, so that a row keeps its noise when it is stored in another dtype that holds its values.
    """
    noise = np.empty(tuple(rows.shape), dtype=np.float32)
    bits = np.random.Philox(key=0)
    generator = np.random.Generator(bits)
    fresh = bits.state
    for out, key in zip(noise, row_keys(rows, seed), strict=True):
        fresh["state"]["key"] = np.array([key & (2**64 - 1), key >> 64], dtype=np.uint64)
        bits.state = fresh
        generator.standard_normal(out=out, dtype=np.float32)
    return torch.from_numpy(noise).to(device=rows.device, dtype=rows.dtype)


def row_choice(rows: torch.Tensor, seed: int, count: int) -> torch.Tensor:
    """An index in [0, count) for each row, uniform over distinct rows."""
    return torch.tensor([key % count for key in row_keys(rows, seed)], dtype=torch.int64, device=rows.device)
