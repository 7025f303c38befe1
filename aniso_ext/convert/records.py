"""Small files of a conversion under way, in a hidden folder beside its manifest.

A finished shard whose turn in the manifest has not come is recorded here, and so are the sums of a shard for a corpus
calibration. Every file appears whole or not at all. The folder goes away with the end of the conversion.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aniso_ext.data.shards import unusable
from aniso_ext.data.writer import temporary_name

SHARD = "shard"
_NAME = re.compile(r"([a-z]+(?:-\d+)?)-(\d{8})\.json|\..+\.tmp")


def encoded(record: Mapping[str, Any]) -> bytes:
    """A record as one JSON line."""
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


class RecordFolder:
    """Records by kind (``shard``, ``sums-0``) and index of the shard; only ever changed under the manifest's mutex."""

    def __init__(self, manifest: Path) -> None:
        self.path = manifest.with_name(f".{manifest.name}.records")

    def indices(self, kind: str) -> set[int]:
        """Indices of the shards that have a record of this kind."""
        matches = (_NAME.fullmatch(name) for name in self._names())
        return {int(match[2]) for match in matches if match is not None and match[1] == kind}

    def read(self, kind: str, index: int) -> dict[str, Any] | None:
        """A record; None if it is not there or not one."""
        try:
            content = self._place(kind, index).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unusable(self.path, f"cannot be read ({error.strerror})", "check the permissions") from None
        try:
            record = json.loads(content)
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    def write(self, kind: str, index: int, record: Mapping[str, Any]) -> None:
        """Put a record in place, flushed to disk."""
        place = self._place(kind, index)
        temporary = place.with_name(temporary_name(place.name))
        try:
            self.path.mkdir(exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(encoded(record))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, place)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(self.path)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise unusable(place, reason, "check the space and run again to resume") from None

    def remove(self, kind: str, index: int) -> None:
        """Forget a record, if it is there."""
        self._place(kind, index).unlink(missing_ok=True)

    def remove_temporary(self) -> None:
        """Delete what was being written when a process was killed."""
        for name in self._names():
            if name.startswith("."):
                (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all records, and the folder unless somebody else has put a file there."""
        for name in self._names():
            (self.path / name).unlink(missing_ok=True)
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Delete the folder if it holds nothing."""
        with suppress(OSError):
            self.path.rmdir()

    def __bool__(self) -> bool:
        """Whether there is any record."""
        return any(not name.startswith(".") for name in self._names())

    def _place(self, kind: str, index: int) -> Path:
        return self.path / f"{kind}-{index:08d}.json"

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.path) if _NAME.fullmatch(name))
        except (FileNotFoundError, NotADirectoryError):
            return []


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
