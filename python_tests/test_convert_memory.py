"""The memory of a conversion: the same however many shards there are and however long they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aniso_ext.align import make_aligner
from aniso_ext.align import rows as rows_module
from aniso_ext.bench.conversions import measure_conversion
from aniso_ext.convert import convert_embeddings
from aniso_ext.convert.maps import TILE_ROWS

WIDTH, SHARD_ROWS = 512, 1 << 14


def unit(rows: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_the_peak_is_the_same_for_four_times_the_rows(tmp_path: Path) -> None:
    """Within 5 %, in processes of their own. Of ReAlign, whose steps each allocate as much as they map."""
    rows = unit(SHARD_ROWS)
    make_aligner("realign").fit(rows[:2000], -rows[2000:4000]).save_pretrained(tmp_path / "aligner")
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


class Watching:
    """Hands rows on, and remembers in which thread and how many."""

    width = 16

    def __init__(self) -> None:
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
    assert max(aligner.rows) <= TILE_ROWS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("aniso-")]
    for number in range(6):
        assert np.array_equal(np.load(tmp_path / "out" / f"{number}.npy"), unit(5000, 16, number))


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_maps_a_few_rows_at_a_time(threads: int) -> None:
    aligner = make_aligner("realign").fit(unit(300), -unit(300, seed=1))
    rows, seen = torch.from_numpy(unit(3000, seed=2)), []
    whole = aligner._apply(rows.clone())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = rows_module.map_tiles(lambda part: (seen.append(len(part)), aligner._apply(part))[1], rows)
    finally:
        torch.set_num_threads(before)
    assert sum(seen) == 3000
    assert max(seen) == (rows_module.TILE_BYTES // (4 * WIDTH) if threads == 1 else 3000)
    # the norm of a row may be summed in another order; entries are below 1
    assert torch.allclose(found, whole, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_tiles_hold_every_row_of_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(rows_module, "TILE_BYTES", 1)
    for count in (0, 1, 31, 32, 33, 65):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            rows = torch.arange(3 * count).reshape(count, 3).to(dtype)
            assert torch.equal(rows_module.map_tiles(lambda part: 2 * part, rows), 2 * rows)
    rows = torch.ones(40, 3, requires_grad=True)
    rows_module.map_tiles(lambda part: 2 * part, rows).sum().backward()
    assert rows.grad is not None and bool((rows.grad == 2).all())
