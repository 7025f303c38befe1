"""The manifest: one JSON line for the conversion, then one for each finished shard, in order.

A line is appended and synced only after its shard is in place, so whatever a killed run leaves is a prefix of what an
unbroken run writes, plus at most one torn line. The open file is locked: two conversions never share a folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from aniso_ext.convert.plan import Plan
from aniso_ext.data.folder import format_of
from aniso_ext.data.shards import unusable
from aniso_ext.data.writer import make_folders
from aniso_ext.errors import DataError

KIND = "aniso_ext.convert"
VERSION = 1
_BEGINNING = f'{{"manifest":"{KIND}"'.encode()
_START_OVER = "pass the same, or another output, or on_existing='overwrite'"


class Manifest:
    """The locked manifest of one conversion; a context manager that cleans up if no shard was finished."""

    def __init__(self, plan: Plan, header: Mapping[str, Any], on_existing: str) -> None:
        self.finished: list[dict[str, Any]] = []
        self.header: dict[str, Any] | None = None
        self._plan = plan
        self._wanted = {"manifest": KIND, "version": VERSION, **header}
        present = plan.manifest.exists()
        if on_existing != "overwrite":
            self._check_foreign(present, on_existing)
        self._made = make_folders(plan.folder)
        self._file = self._open()
        try:
            plan.remove_leftovers()
            if on_existing == "overwrite":
                self._clear()
            else:
                self._read()
        except BaseException:
            self.__exit__(DataError, None, None)
            raise

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = os.fstat(self._file.fileno()).st_size == 0
        unused = kind is not None and not self.finished and (empty or self.header == self._wanted)
        if unused:
            self._plan.manifest.unlink(missing_ok=True)
        self._file.close()
        if unused:
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def start(self, calibrated: str) -> None:
        """Write the first line, or check that a resumed run has arrived at the same calibrated aligner."""
        if self.header is None:
            self._wanted["calibrated"] = calibrated
            self.header = self._wanted
            self._append(self.header)
        elif self.header.get("calibrated") != calibrated:
            self._refuse("calibrated aligner", self.header.get("calibrated"), calibrated)

    def add(self, line: Mapping[str, Any]) -> None:
        """Record a shard that is in place."""
        self._append(line)
        self.finished.append(dict(line))

    def _open(self) -> BinaryIO:
        """The manifest, locked; a run that ends badly may unlink it, so the locked file must still be the one there."""
        path = self._plan.manifest
        if not isinstance(path, Path):
            raise unusable(path, "cannot be locked at a remote place", "convert into a local folder and copy that")
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise unusable(path, f"cannot be written ({error.strerror})", "check the space and permissions") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        file.close()
        raise unusable(path, "is in use by another conversion", "wait for it or choose another output")

    def _check_foreign(self, present: bool, on_existing: str) -> None:
        if on_existing == "fail" and present:
            raise unusable(self._plan.manifest, "exists already", "choose another output, or resume or overwrite")
        for target in self._plan.targets:
            if target.path.exists() and not present:
                reason = "exists already and no manifest says what it is"
                raise unusable(target.path, reason, "choose another output or on_existing='overwrite'")

    def _clear(self) -> None:
        """Forget an earlier conversion and delete the shards that it listed."""
        for line in self._lines():
            name = str(line.get("shard", ""))
            if Path(name).name == name and format_of(Path(name)):
                (self._plan.folder / name).unlink(missing_ok=True)
        self._truncate(0)

    def _lines(self) -> list[dict[str, Any]]:
        """The complete lines up to the first that is not a JSON object."""
        self._file.seek(0)
        lines = []
        for text in self._file:
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break
            lines.append(line)
        return lines

    def _read(self) -> None:
        """Take over the shards that an earlier run finished; cut the manifest after the last one still there."""
        lines = self._lines()
        if not lines:
            self._file.seek(0)
            content = self._file.read()
            torn = b"\n" not in content and (content.startswith(_BEGINNING) or _BEGINNING.startswith(content))
            if not torn:
                raise unusable(self._plan.manifest, "is not the manifest of a conversion", _START_OVER)
            self._truncate(0)
            return
        header = lines[0]
        self._check_header(header)
        kept = self._still_there(lines[1:])
        self.finished = list(kept)
        self.header = header
        self._truncate(sum(len(_encoded(line)) for line in (header, *kept)))

    def _check_header(self, header: Mapping[str, Any]) -> None:
        for key, wanted in self._wanted.items():
            if header.get(key) != wanted:
                self._refuse(key.replace("_", " "), header.get(key), wanted)

    def _refuse(self, what: str, stored: Any, wanted: Any) -> None:
        reason = f"was started with {what} {stored}, now it is {wanted}"
        raise unusable(self._plan.manifest, reason, _START_OVER)

    def _still_there(self, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        kept = []
        for line, target in zip(lines, self._plan.targets, strict=False):
            if line.get("shard") != target.name:
                self._refuse("shard", line.get("shard"), target.name)
            if not target.path.is_file() or target.path.stat().st_size != line.get("bytes"):
                break
            kept.append(dict(line))
        return kept

    def _truncate(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(_encoded(line))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise unusable(self._plan.manifest, reason, "check the space and run again to resume") from None


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
