"""The manifest: one JSON line for the conversion, then one for each finished shard, in order.

The manifest is made whole with its first line and only grows. The line of a shard is written and synced after the shard
is in place. Where earlier shards are still missing, which happens when workers share a conversion, the line waits as a
file of its own in the folder of records and moves into the manifest when its turn has come. Whatever a killed run
leaves is therefore a prefix of what an unbroken run writes, plus records, plus at most one torn line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from aniso_ext.convert.lines import (
    CALIBRATED,
    KIND,
    START_OVER,
    check_same,
    differing,
    first_line,
    fits,
    parse,
    refusal,
)
from aniso_ext.convert.locks import ByteLocks
from aniso_ext.convert.plan import Plan
from aniso_ext.convert.records import SHARD, RecordFolder, encoded, sync_folder
from aniso_ext.convert.workers import Worker
from aniso_ext.data.folder import format_of
from aniso_ext.data.locations import Location, put_bytes_atomically
from aniso_ext.data.shards import unusable
from aniso_ext.data.writer import make_folders, temporary_name
from aniso_ext.errors import DataError

_BEGINNING = f'{{"manifest":"{KIND}"'.encode()
_ARRIVALS = 20
"""How often a manifest may vanish, because a run that ended without a shard removed it, before that is an error."""


class Manifest:
    """The manifest of one conversion as one of its workers has it open; a context manager.

    Leaving it with an error removes everything again if no shard was finished and no other worker is there.
    """

    def __init__(self, plan: Plan, header: Mapping[str, Any], on_existing: str, worker: Worker | None = None) -> None:
        self.records = RecordFolder(plan.ledger)
        self._plan = plan
        self._worker = worker or Worker()
        self._wanted = first_line(header)
        self._lines: list[dict[str, Any]] = []
        self._end = 0
        self._made: list[Location] = []
        self._is_local = plan.ledger == plan.manifest
        if self._worker.world > 1 and not self._is_local:
            raise unusable(plan.manifest, "cannot be locked at a remote place", "let workers share a local folder")
        for _ in range(_ARRIVALS):
            if self._arrive(on_existing):
                return
        raise unusable(plan.manifest, "keeps vanishing", "look for another process that removes it, and run again")

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with self._locks.mutex():
                self._remove_unused()
        self._file.close()
        if kind is not None:
            self._remove_folders()

    def start(self, calibrated: str) -> None:
        """Complete the first line, or check that this run has arrived at the same calibrated aligner as others."""
        with self._mutex():
            self._load()
            stored = self._header.get(CALIBRATED)
            if stored is None:
                self._header[CALIBRATED] = calibrated
                self._end = 0
                self._put(encoded(self._header))
            elif stored != calibrated:
                raise refusal(self._plan, "calibrated aligner", stored, calibrated)

    def add(self, index: int, line: Mapping[str, Any]) -> None:
        """Record a shard that is in place."""
        with self._mutex():
            self._catch_up()
            if index > len(self._lines):
                self.records.write(SHARD, index, line)
            elif index == len(self._lines):
                self._append([dict(line)])
                self._merge()

    def keep(self, kind: str, index: int, record: Mapping[str, Any]) -> None:
        """Store another record of a shard until the conversion is complete."""
        with self._mutex():
            self.records.write(kind, index, record)

    def finished(self) -> dict[int, dict[str, Any]]:
        """Lines of all shards that are in place, by index; the last one of them all tidies up."""
        with self._mutex():
            self._catch_up()
            self._merge()
            if len(self._lines) == len(self._plan.targets):
                self.records.clear()
            lines = dict(enumerate(self._lines))
            for index in sorted(self.records.indices(SHARD)):
                if record := self.records.read(SHARD, index):
                    lines.setdefault(index, record)
            return lines

    # Arriving and leaving

    def _arrive(self, on_existing: str) -> bool:
        """Open the manifest and join its workers; False if it was removed meanwhile."""
        created = self._create(on_existing)
        try:
            self._file = self._plan.ledger.open("r+b", buffering=0)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._locks = ByteLocks(self._file.fileno())
            with self._mutex():
                if not self._is_in_place():
                    self._file.close()
                    return False
                try:
                    self._join(created, on_existing)
                except BaseException:
                    if created:
                        self._remove_unused()
                    raise
        except BaseException:
            self._file.close()
            self._remove_folders()
            raise
        return True

    def _create(self, on_existing: str) -> bool:
        """Make the manifest, whole and with its first line, unless it is there; whether it was made."""
        path, found = self._plan.ledger, None
        if path.exists():
            return False
        if not self._is_local and self._plan.manifest.exists():
            found = self._plan.manifest.read_bytes()  # begun on another machine
        elif on_existing != "overwrite":
            self._check_foreign()
        try:
            self._made += make_folders(path.parent)
            temporary = path.with_name(temporary_name(path.name))
            try:
                with temporary.open("xb") as file:
                    file.write(found or encoded(self._wanted))
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(path.parent)
        except (FileExistsError, FileNotFoundError):
            return False
        except OSError as error:
            self._remove_folders()
            raise self._unwritable(error) from None
        return found is None

    def _is_in_place(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self._plan.ledger.stat(), os.fstat(self._file.fileno()))
        return False

    def _join(self, created: bool, on_existing: str) -> None:
        world = self._locks.others()
        if world is None:
            if on_existing == "fail" and not created:
                raise unusable(self._plan.manifest, "exists already", "choose another output, or resume or overwrite")
            if on_existing == "overwrite" and not created:
                self._clear()
            self._recover()
            self._plan.remove_leftovers()
        else:
            self._check_company(world)
        if not self._locks.claim(self._worker):
            raise self._in_use(f"the {self._worker} is at work already" if self._worker.world > 1 else "")
        if world is not None:
            self._plan.remove_leftovers(self._worker.share([target.shard.rows for target in self._plan.targets]))

    def _check_company(self, world: int) -> None:
        """Refuse to join those who are there unless they share this very conversion, among as many workers."""
        lines, _ = self._read_lines(0)
        if self._worker.world == 1 or world == 1 or not lines or differing(lines[0], self._wanted):
            raise self._in_use("")
        if world != self._worker.world:
            raise self._in_use(f"{world} workers share it, and this is the {self._worker}")
        self._load()

    def _in_use(self, detail: str) -> DataError:
        reason = "is in use by another conversion" + (f" ({detail})" if detail else "")
        return unusable(self._plan.manifest, reason, "wait for it or choose another output")

    def _check_foreign(self) -> None:
        """Refuse files that nobody accounts for; a worker that has just arrived makes its manifest before a shard."""
        for target in self._plan.targets:
            if target.path.exists() and not self._plan.ledger.exists():
                reason = "exists already and no manifest says what it is"
                raise unusable(target.path, reason, "choose another output or on_existing='overwrite'")

    def _remove_unused(self) -> None:
        """Remove the manifest if nothing came of this conversion; only under the mutex.

        A shard that is in place without a line needs the manifest: it would look like somebody else's.
        """
        lines, _ = self._read_lines(0)
        alone = self._locks.others() is None and self._is_in_place()
        ours = len(lines) == 1 and not differing(lines[0], self._wanted)
        empty = not self.records and not any(target.path.exists() for target in self._plan.targets)
        if alone and ours and empty:
            self.records.clear()
            self._plan.ledger.unlink()
            if not self._is_local:
                self._plan.manifest.unlink(missing_ok=True)

    def _remove_folders(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break  # it is in use
        self._made = []

    def _clear(self) -> None:
        """Forget an earlier conversion and delete the shards that it listed; start with a first line of our own."""
        lines, _ = self._read_lines(0)
        records = (self.records.read(SHARD, index) for index in self.records.indices(SHARD))
        for line in (*lines, *(record for record in records if record)):
            name = str(line.get("shard", ""))
            if Path(name).name == name and format_of(Path(name)):
                (self._plan.folder / name).unlink(missing_ok=True)
        self.records.clear()
        self._write_first_line()

    # What is there

    def _recover(self) -> None:
        """Take over what an earlier run finished; cut the manifest after the last shard that is still there.

        Only the first worker to arrive does this: nobody else is writing.
        """
        self.records.remove_temporary()
        if not self._read_lines(0)[0]:
            content = self._content()
            torn = b"\n" not in content and (content.startswith(_BEGINNING) or _BEGINNING.startswith(content))
            if not torn:
                raise unusable(self._plan.manifest, "is not the manifest of a conversion", START_OVER)
            self.records.clear()
            self._write_first_line()
        self._load()
        kept = self._still_there()
        self._end = len(encoded(self._header)) + sum(len(encoded(line)) for line in self._lines[:kept])
        self._lines = self._lines[:kept]
        self._file.truncate(self._end)
        for index in self.records.indices(SHARD):
            record = self.records.read(SHARD, index)
            if index < kept or record is None or not fits(self._plan, index, record):
                self.records.remove(SHARD, index)
        self._merge()

    def _load(self) -> None:
        """Read the manifest from its beginning and check that it is that of this conversion."""
        lines, self._end = self._read_lines(0)
        self._header, self._lines = lines[0], lines[1:]
        check_same(self._plan, lines, self._wanted)

    def _still_there(self) -> int:
        """How many shards from the first on are in place with the recorded size."""
        if CALIBRATED not in self._header:
            return 0
        most = min(len(self._lines), len(self._plan.targets))
        return next((index for index in range(most) if not fits(self._plan, index, self._lines[index])), most)

    # Reading and writing, under the mutex

    @contextmanager
    def _mutex(self) -> Iterator[None]:
        try:
            with self._locks.mutex():
                yield
        except OSError as error:
            raise self._unwritable(error) from None

    def _content(self, start: int = 0) -> bytes:
        self._file.seek(start)
        return self._file.read()

    def _read_lines(self, start: int) -> tuple[list[dict[str, Any]], int]:
        return parse(self._content(start), start)

    def _catch_up(self) -> None:
        """Read what other workers have appended; what one was killed at is cut off."""
        if CALIBRATED not in self._header:
            self._load()  # the first line grows once
        lines, self._end = self._read_lines(self._end)
        self._lines += lines
        if self._end < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(self._end)

    def _merge(self) -> None:
        """Move records whose turn has come into the manifest."""
        waiting = self.records.indices(SHARD)
        ready: list[dict[str, Any]] = []
        while (index := len(self._lines) + len(ready)) in waiting:
            record = self.records.read(SHARD, index)
            if record is None:
                break
            ready.append(record)
        first = len(self._lines)
        if ready:
            self._append(ready)
            for index in range(first, len(self._lines)):
                self.records.remove(SHARD, index)
            self.records.remove_if_empty()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._put(b"".join(map(encoded, lines)))
        self._lines += lines

    def _write_first_line(self) -> None:
        self._file.truncate(0)
        self._end = 0
        self._put(encoded(self._wanted))

    def _put(self, content: bytes) -> None:
        """Write at the end of what is known, and flush to disk."""
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.pwrite(self._file.fileno(), rest, self._end + len(content) - len(rest)) :]
            os.fsync(self._file.fileno())
            if not self._is_local:
                put_bytes_atomically(self._plan.manifest, self._content())
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise unusable(self._plan.manifest, reason, "check the space and run again to resume") from None
        self._end += len(content)

    def _unwritable(self, error: OSError) -> DataError:
        return unusable(self._plan.manifest, f"cannot be written ({error.strerror})", "check the space and permissions")
