"""Files written past the page cache: the same bytes whatever the filesystem allows, and errors that are not lost."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from aniso_ext.data import direct_file
from aniso_ext.data.direct_file import BLOCK_BYTES, BLOCKS_ON_THEIR_WAY, DirectFile

BLOCKS = BLOCKS_ON_THEIR_WAY + 3
CONTENT = np.random.default_rng(0).integers(0, 256, BLOCKS * BLOCK_BYTES + 12_345, dtype=np.uint8).tobytes()
BEGINNING = b"a header that is known only at the end"


def write(path: Path, sizes: tuple[int, ...]) -> bytes:
    """What is in a file after writes of these sizes in turn."""
    path.touch()
    file, done, number = DirectFile(path), 0, 0
    while done < len(CONTENT):
        size = sizes[number % len(sizes)]
        file.write(CONTENT[done : done + size])
        done, number = done + size, number + 1
    file.close(BEGINNING)
    return path.read_bytes()


def expected() -> bytes:
    return BEGINNING + CONTENT[len(BEGINNING) :]


@pytest.mark.parametrize("sizes", [(1 << 30,), (BLOCK_BYTES,), (128, 1_000_003), (5 * 10**6, 1)], ids=str)
def test_the_bytes_are_those_that_were_written(tmp_path, sizes):
    assert write(tmp_path / "file", sizes) == expected()


def test_few_bytes_and_none(tmp_path):
    for content in (b"", b"abc", BEGINNING):
        (tmp_path / "file").write_bytes(b"")
        file = DirectFile(tmp_path / "file")
        file.write(content)
        file.close(content[:2])
        assert (tmp_path / "file").read_bytes() == content


def test_whole_blocks_pass_by_the_page_cache_where_the_filesystem_allows_that(tmp_path, monkeypatch):
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the filesystem of the temporary folder has no direct writes")
    direct: list[tuple[int, bool]] = []
    plain = os.pwrite

    def watched(descriptor, data, offset):
        direct.append((len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return plain(descriptor, data, offset)

    monkeypatch.setattr(direct_file.os, "pwrite", watched)
    assert write(tmp_path / "file", (1 << 20,)) == expected()
    assert direct == [(BLOCK_BYTES, True)] * BLOCKS + [(12_345, False), (len(BEGINNING), False)]


def test_a_filesystem_without_direct_writes_gets_others(tmp_path, monkeypatch):
    plain = fcntl.fcntl

    def refusing(descriptor, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return plain(descriptor, command, argument)

    monkeypatch.setattr(direct_file.fcntl, "fcntl", refusing)
    assert write(tmp_path / "file", (10**6,)) == expected()


@pytest.mark.parametrize("refused", [1, 2, BLOCKS])
def test_writes_that_are_refused_or_stop_within_a_page_go_on(tmp_path, monkeypatch, refused):
    plain, calls = os.pwrite, []

    def write_some(descriptor, data, offset):
        calls.append(len(data))
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if len(calls) >= refused and direct:
            raise OSError(errno.EINVAL, "not now")
        return plain(descriptor, data[: len(data) // 2 + 1] if not direct else data, offset)

    monkeypatch.setattr(direct_file.os, "pwrite", write_some)
    assert write(tmp_path / "file", (10**6,)) == expected()
    assert len(calls) > BLOCKS


def test_blocks_that_are_refused_together_go_on_together(tmp_path, monkeypatch):
    """Each was sent as a direct write, and all are refused before one of them ends that."""
    plain, together = os.pwrite, threading.Barrier(BLOCKS_ON_THEIR_WAY)
    refused = []

    def refuse_all(descriptor, data, offset):
        if len(refused) < BLOCKS_ON_THEIR_WAY:
            refused.append(offset)
            together.wait()
            raise OSError(errno.EINVAL, "not now")
        return plain(descriptor, data, offset)

    monkeypatch.setattr(direct_file.os, "pwrite", refuse_all)
    assert write(tmp_path / "file", (10**6,)) == expected()
    assert sorted(refused) == [number * BLOCK_BYTES for number in range(BLOCKS_ON_THEIR_WAY)]


def test_an_error_of_a_block_on_its_way_is_raised_and_the_file_closed(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / "file").touch()
    file = DirectFile(tmp_path / "file")
    monkeypatch.setattr(direct_file.os, "pwrite", full)
    file.write(CONTENT[:BLOCK_BYTES])
    with pytest.raises(OSError, match="full"):
        file.close(BEGINNING)
    before = len(os.listdir("/proc/self/fd"))
    file.discard()
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_file_can_be_left_with_a_block_on_its_way(tmp_path):
    (tmp_path / "file").touch()
    file = DirectFile(tmp_path / "file")
    file.write(CONTENT[: BLOCK_BYTES + 5])
    file.discard()
    file.discard()
    assert (tmp_path / "file").read_bytes() in (b"", CONTENT[:BLOCK_BYTES])
