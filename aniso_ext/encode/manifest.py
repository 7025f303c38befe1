"""The record of an embedding run: a JSON line for the run, then one for each finished shard."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from aniso_ext.data.clip_retrieval import METADATA
from aniso_ext.data.folder import KINDS
from aniso_ext.data.shards import unusable

MANIFEST = "embed.jsonl"
KIND = "aniso_ext.embed"
ON_EXISTING = ("resume", "overwrite", "fail")


class Manifest:
    """The manifest of one run, locked for this process; a context manager.

    A line is written and synced after its shard's files are in place, so a killed run leaves a prefix of what an
    unbroken one writes, and at most one torn line.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], on_existing: str) -> None:
        self.path = folder / MANIFEST
        self.folder = folder
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by __exit__
        try:
            self._lock()
            self.shards = self._arrive({"manifest": KIND, **header}, on_existing)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.shards:
            with suppress(OSError):  # a run that finished nothing leaves nothing
                self.path.unlink()
                if self._made:
                    self.folder.rmdir()
        self._file.close()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append the line of the next shard and put it on the disk."""
        self._write(line)
        self.shards.append(dict(line))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise unusable(self.path, "is in use by another process", "wait for it, or name another folder") from None

    def _arrive(self, header: Mapping[str, Any], on_existing: str) -> list[dict[str, Any]]:
        if on_existing == "overwrite":
            self._file.truncate(0)
            self._remove_files("[!.]*_*[0-9].*")
        lines, end = self._read()
        if lines and on_existing == "fail":
            raise unusable(self.folder, "has embeddings already", "name another folder, or resume or overwrite")
        if not lines:
            self._check_free()
            self._file.truncate(0)
            self._write(header)
            return []
        for name in {**header, **lines[0]}:
            stored, wanted = lines[0].get(name), header.get(name)
            if stored != wanted:
                reason = f"was started with {name.replace('_', ' ')} {stored}, now it is {wanted}"
                raise unusable(self.path, reason, "pass the same, or name another folder, or overwrite")
        self._file.truncate(end)
        self._remove_files(".*.tmp")
        shards = lines[1:]
        for number, line in enumerate(shards):
            self._check_files(number, line)
        return shards

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines, and where they end."""
        self._file.seek(0)
        lines: list[dict[str, Any]] = []
        end = 0
        for text in self._file.read().splitlines(keepends=True):
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break
            lines.append(line)
            end += len(text)
        return lines, end

    def _check_files(self, number: int, line: Mapping[str, Any]) -> None:
        for name, size in line["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                reason = f"shard {number} is recorded, but {name} is missing or has another size"
                raise unusable(self.path, reason, "overwrite, or name another folder")

    def _check_free(self) -> None:
        """Without a manifest there must be no embeddings that a new run would mix with its own."""
        for name in (*KINDS.values(), METADATA):
            place = self.folder / name
            if place.is_dir() and any(not entry.name.startswith(".") for entry in place.iterdir()):
                raise unusable(place, f"has files, but there is no {MANIFEST}", "name another folder, or overwrite")

    def _remove_files(self, pattern: str) -> None:
        for name in (*KINDS.values(), METADATA):
            for path in (self.folder / name).glob(pattern):
                path.unlink()

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = f"cannot be written ({error.strerror or error})"
            raise unusable(self.path, reason, "check the space and permissions") from None
