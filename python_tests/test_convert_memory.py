"""The memory of a conversion: the same however many shards there are and however long they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heap import bytes_in_use
from torch.utils._python_dispatch import TorchDispatchMode

from aniso_ext.align import make_aligner
from aniso_ext.bench.conversions import measure_conversion
from aniso_ext.convert import convert_embeddings
from aniso_ext.convert.maps import Mapped, make_map

WIDTH, SHARD_ROWS = 512, 1 << 14


def unit(rows: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("method, options", [("realign", {}), ("anisoalign", {"rank": 32, "refine": False})])
def test_the_peak_is_the_same_for_four_times_the_rows(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Within 5 %, in processes of their own. The steps of ReAlign each allocate as much as they map."""
    rows = unit(SHARD_ROWS)
    make_aligner(method, **options).fit(rows[:2000], -rows[2000:4000]).save_pretrained(tmp_path / "aligner")
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    peaks = []
    for shards in (4, 16):
        source = tmp_path / f"{shards} shards"
        source.mkdir()
        for number in range(shards):
            os.link(tmp_path / "rows.npy", source / f"{number:02d}.npy")
        found = measure_conversion(tmp_path / "aligner", source, tmp_path / f"{shards} converted", threads=2)
        assert found.rows == shards * SHARD_ROWS
        peaks.append(found.peak_bytes)
    assert peaks[1] < 1.05 * peaks[0]


def test_what_is_in_use_does_not_grow_with_the_rows() -> None:
    """Within a batch, over a million narrow rows: what is lost with each product is then large beside a batch."""
    width, batch = 8, 8192
    rows = unit(1 << 17, width).astype(np.float16)
    aligner = make_aligner("anisoalign", rank=4, refine=False).fit(rows[:2000], -rows[2000:4000])
    row_map, result = make_map(aligner, "float16", "float16", "cpu"), Mapped.empty(batch, width, "float16", "float16")
    in_use: list[int] = []
    for first in range(0, 8 * len(rows), batch):
        row_map(rows[first % len(rows) :][:batch], result)
        in_use.append(bytes_in_use())
    assert max(in_use[-16:]) - max(in_use[16:32]) < result.rows.nbytes


class NewMemory(TorchDispatchMode):
    """Remembers the bytes of every tensor that an operator returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        listed = results if isinstance(results, (tuple, list)) else (results,)
        for returned, tensor in zip(function._schema.returns, listed, strict=False):
            if returned.alias_info is None and isinstance(tensor, torch.Tensor):
                self.blocks.append(tensor.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_no_tensor_is_as_large_as_a_batch(stored: str) -> None:
    """The C library does not always use the block of a freed tensor again, so that each may be there many times."""
    rows, aligner = unit(8192), make_aligner("anisoalign", rank=32, refine=False)
    row_map = make_map(aligner.fit(rows[:2000], -rows[2000:4000]), "float16", stored, "cpu")
    batch, result = rows.astype(np.float16), Mapped.empty(8192, WIDTH, "float16", stored)
    row_map(batch, result)  # folds the constants
    with NewMemory() as new:
        row_map(batch, result)
        torch.ones(3) + 1
    assert max(new.blocks) < batch.nbytes / 8


class Watching:
    """Hands rows on, and remembers in which thread and how many."""

    width = 16

    def __init__(self, tile_bytes: int | None = None) -> None:
        self.tile_bytes = tile_bytes
        self.threads: list[threading.Thread] = []
        self.rows: list[int] = []

    def fingerprint(self) -> str:
        return "0"

    def calibrated(self, source: Any, *, calibration: str | None = None) -> Watching:
        return self

    def transform(self, source: Any, *, calibration: str | None = None) -> Any:
        raise AssertionError("rows go through transform_batch")

    def transform_batch(self, rows: torch.Tensor) -> torch.Tensor:
        self.threads.append(threading.current_thread())
        self.rows.append(len(rows))
        return rows.clone()


def test_threads_stay_from_shard_to_shard_and_end_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        np.save(tmp_path / "in" / f"{number}.npy", unit(5000, 16, number))
    aligner = Watching()
    convert_embeddings(aligner, tmp_path / "in", tmp_path / "out", threads=2)
    assert len({id(thread) for thread in aligner.threads}) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aniso-")]
    for number in range(6):
        assert np.array_equal(np.load(tmp_path / "out" / f"{number}.npy"), unit(5000, 16, number))


@pytest.mark.parametrize("tile_bytes", [1, 64 * 16 * 4, None])
def test_rows_are_mapped_as_many_at_a_time_as_the_aligner_asks_for(tmp_path: Path, tile_bytes: int | None) -> None:
    rows = unit(2100, 16)
    rows[[3, 70, 2099]] = 0
    np.save(tmp_path / "in.npy", rows)
    aligner = Watching(tile_bytes)
    report = convert_embeddings(aligner, tmp_path / "in.npy", tmp_path / "out.npy", on_bad="drop", threads=1)
    assert report.bad_row_indices == {"in.npy": [3, 70, 2099]}
    # a batch is half of the shard, as whole products of 32 rows; the last row of the shard is repeated up to one
    assert max(aligner.rows) == {1: 32, None: 1056}.get(tile_bytes, 64)
    assert sum(aligner.rows) == -(-2100 // 32) * 32
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.delete(rows, [3, 70, 2099], axis=0))
