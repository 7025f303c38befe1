"""Where files lie: a path of this machine, or a URL that fsspec can open.

A :data:`Location` is a :class:`pathlib.Path` or a :class:`RemotePath`, which has pathlib's names for what is needed
here, so the rest of the package does not ask where bytes are. ``file://`` URLs become plain paths. Everything that goes
wrong at a remote place is an :class:`OSError`, as it is at a local one.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BufferedReader, FileIO, RawIOBase
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from aniso_ext.errors import DataError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(/+)", re.IGNORECASE)
_LOCAL = ("file", "local")
_READ_AHEAD = 4 << 20


class Status(NamedTuple):
    """The part of :class:`os.stat_result` that every place knows."""

    st_size: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL; immutable, hashable, and may be sent to other processes.

    Attributes:
        filesystem: the fsspec filesystem.
        key: the path within it.
    """

    filesystem: Any = field(repr=False)
    key: str

    def __str__(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.key))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.filesystem, f"{self.key.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.key.rstrip("/").rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        return PurePath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.filesystem, self.key.rstrip("/").rpartition("/")[0])

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """The folders above, innermost first."""
        above, place = [], self
        while place.key.strip("/"):
            place = place.parent
            above.append(place)
        return tuple(above)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def resolve(self) -> RemotePath:
        """The place itself: there are no links."""
        return self

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def stat(self) -> Status:
        with _as_oserror(self):
            size = self.filesystem.info(self.key).get("size")
        if size is None:
            raise OSError(errno.ENOTSUP, "the server does not tell its size", str(self))
        return Status(int(size))

    def iterdir(self) -> Iterator[RemotePath]:
        with _as_oserror(self):
            self.filesystem.invalidate_cache(self.key)
            names = self.filesystem.ls(self.key, detail=False)
        places = (RemotePath(self.filesystem, str(name).rstrip("/")) for name in names)
        # object stores list a folder that was made as an entry of itself
        return (place for place in places if place.key.strip("/") != self.key.strip("/"))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Entries of the folder whose names fit; nothing if there is no folder."""
        with suppress(FileNotFoundError):
            yield from [entry for entry in self.iterdir() if fnmatchcase(entry.name, pattern)]

    def open(self, mode: str = "rb") -> Any:
        """A new file object: ``rb`` reads by ranges, ``wb`` becomes visible when it is closed."""
        if mode == "rb":
            return BufferedReader(_RangeFile(self), _READ_AHEAD)
        with _as_oserror(self):
            return self.filesystem.open(self.key, mode)

    def read_bytes(self) -> bytes:
        with _as_oserror(self):
            return bytes(self.filesystem.cat_file(self.key))

    def read_ranges(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        """The bytes of several ranges [start, stop), fetched together where the filesystem can."""
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        with _as_oserror(self):
            return list(self.filesystem.cat_ranges([self.key] * len(ranges), starts, stops, on_error="raise"))

    def mkdir(self, *, exist_ok: bool = False) -> None:
        with _as_oserror(self):
            self.filesystem.makedirs(self.key, exist_ok=exist_ok)

    def rmdir(self) -> None:
        with _as_oserror(self):
            self.filesystem.rmdir(self.key)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _as_oserror(self):
                self.filesystem.rm_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def upload(self, file: Path) -> None:
        """Take over the bytes of a local file: under a hidden name first, then moved."""
        hidden = self.with_name(temporary_name(self.name))
        try:
            with _as_oserror(self):
                self.filesystem.put_file(os.fspath(file), hidden.key)
                self.filesystem.mv(hidden.key, self.key)
        except BaseException:
            with suppress(OSError):
                hidden.unlink(missing_ok=True)
            raise

    def _kind(self) -> str | None:
        try:
            with _as_oserror(self):
                self.filesystem.invalidate_cache(self.key)
                return str(self.filesystem.info(self.key)["type"])
        except FileNotFoundError:
            return None


Location = Path | RemotePath


def to_location(place: str | os.PathLike[str] | RemotePath) -> Location:
    """The place that a path or URL means.

    Raises:
        DataError: a protocol that fsspec does not know, or whose library is not installed.
    """
    if isinstance(place, RemotePath):
        return place
    text = os.fspath(place)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return Path(text)
    protocol, slashes = scheme.group(1).lower(), scheme.group(2)
    if slashes == "/":
        # pathlib merges slashes, and command lines hand out paths; a local name wins, and a string is taken literally
        if not isinstance(place, PurePath) or Path(text).exists():
            return Path(text)
        text = f"{protocol}://{'/' if protocol in _LOCAL else ''}{text[scheme.end() :]}"
    from fsspec.core import url_to_fs

    try:
        filesystem, key = url_to_fs(text)
    except ImportError as error:
        raise _no_protocol(text, f"needs a library that is not installed ({error})", "install it") from None
    except ValueError as error:
        raise _no_protocol(text, f"cannot be opened ({error})", "pass a path or a URL that fsspec knows") from None
    except Exception as error:  # whatever the library of the protocol raises without credentials or network
        raise _no_protocol(text, f"cannot be opened ({error})", "check the URL and the credentials") from None
    return Path(key) if protocol in _LOCAL else RemotePath(filesystem, key)


def is_place(value: Any) -> bool:
    """Whether a value is a path or URL, in contrast to an array."""
    return isinstance(value, (str, os.PathLike, RemotePath))


def open_unbuffered(place: Location) -> RawIOBase:
    """The file for long consecutive reads straight into the caller's memory."""
    return FileIO(place, "r") if isinstance(place, Path) else _RangeFile(place)


def why(error: OSError) -> str:
    """The reason of a failed file operation in a few words."""
    return " ".join((error.strerror or str(error) or type(error).__name__).split())[:100]


def temporary_name(name: str) -> str:
    """A hidden name that no reader takes for a shard."""
    return f".{name}.{os.urandom(6).hex()}.tmp"


def make_folders(folder: Location) -> list[Location]:
    """Make a folder and its missing parents; the ones made come back, innermost first."""
    missing: list[Location] = []
    place = folder
    while not place.exists() and place.name:
        missing.append(place)
        place = place.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
    return missing


def remove_folders(made: list[Location]) -> None:
    """Remove folders that :func:`make_folders` made, as far as nobody has put anything there."""
    for folder in made:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue  # object stores have no empty folders
        except OSError:
            return


class Draft:
    """A local file that becomes visible at its place only when it is whole; a context manager that cleans up.

    For a local place the file lies beside it under a hidden name, is synced and renamed. For a remote one it lies in
    the folder for temporary files and is uploaded under a hidden name, then moved.

    Attributes:
        path: where to write.
    """

    def __init__(self, place: Location) -> None:
        self._place = place
        if isinstance(place, Path):
            self.path = place.with_name(temporary_name(place.name))
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        else:
            from tempfile import mkstemp

            descriptor, name = mkstemp(prefix="aniso-", suffix=place.suffix)
            os.close(descriptor)
            self.path = Path(name)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def publish(self) -> None:
        """Put the file in place, instead of what may be there."""
        if isinstance(self._place, Path):
            sync(self.path)
            os.replace(self.path, self._place)
            sync(self._place.parent)
        else:
            self._place.upload(self.path)
            self.discard()

    def discard(self) -> None:
        """Remove the file if it was not published."""
        self.path.unlink(missing_ok=True)


def put_bytes_atomically(place: Location, content: bytes) -> None:
    """Write a small file that is whole or not there, replacing what is there."""
    with Draft(place) as draft:
        draft.path.write_bytes(content)
        draft.publish()


def create_exclusively(place: Location, content: bytes) -> bool:
    """Write a small file unless there is one already; whether it was written.

    Local files are created atomically with their content. Remote ones are as exclusive as the filesystem's ``create``
    mode: atomic on object stores with conditional writes, a check before the write elsewhere.
    """
    try:
        if isinstance(place, Path):
            with Draft(place) as draft:
                draft.path.write_bytes(content)
                sync(draft.path)
                os.link(draft.path, place)
                sync(place.parent)
        else:
            if place.exists():
                return False
            with _as_oserror(place):
                place.filesystem.pipe_file(place.key, content, mode="create")
    except FileExistsError:
        return False
    return True


def sync(path: Path) -> None:
    """Flush a local file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RangeFile(RawIOBase):
    """Reads by range requests with a position of its own, so that any number of them may share a filesystem."""

    def __init__(self, place: RemotePath) -> None:
        self._place, self._size, self._position = place, place.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        with _as_oserror(self._place):
            content = self._place.filesystem.cat_file(self._place.key, start=self._position, end=stop)
        if len(content) > stop - self._position:
            raise OSError(errno.ENOTSUP, "the server sends more than the range asked for", str(self._place))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


@contextmanager
def _as_oserror(place: RemotePath) -> Iterator[None]:
    """Filesystems raise what their libraries raise; callers handle OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(place)) from error


def _no_protocol(url: str, reason: str, remedy: str) -> DataError:
    return DataError(" ".join(f"{url}: {reason}: {remedy}".split()))
