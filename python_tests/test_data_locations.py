"""Locations: the same operations on a local path, a file:// URL and a memory:// URL, with the same outcome."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aniso_ext.data.locations import (
    Draft,
    Location,
    RemotePath,
    create_exclusively,
    make_folders,
    open_unbuffered,
    put_bytes_atomically,
    remove_folders,
    to_location,
)
from aniso_ext.errors import DataError


@pytest.fixture(params=["local", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """A folder that is not there yet."""
    if request.param == "memory":
        place = to_location(f"memory://{uuid.uuid4().hex}/root")
        assert isinstance(place, RemotePath)
        yield place
        if place.exists():
            place.filesystem.rm(place.key, recursive=True)
    else:
        yield to_location(tmp_path / "root" if request.param == "local" else f"file://{tmp_path}/root")


def names(folder: Location) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_names_are_pathlibs(root: Location) -> None:
    place = root / "sub" / "emb_0.npy"
    assert (place.name, place.suffix, place.stem, place.parent) == ("emb_0.npy", ".npy", "emb_0", root / "sub")
    assert place.with_name("b.npy") == root / "sub" / "b.npy"
    assert root in place.parents and place not in root.parents
    assert str(place).endswith("root/sub/emb_0.npy")
    assert len({place, root / "sub" / "emb_0.npy"}) == 1
    assert pickle.loads(pickle.dumps(place)) == place


def test_files_appear_whole_and_are_listed(root: Location) -> None:
    made = make_folders(root / "a")
    assert [folder.name for folder in made][:2] == ["a", "root"]
    place = root / "a" / "x.bin"
    assert not place.exists()
    put_bytes_atomically(place, b"0123456789")
    put_bytes_atomically(place, b"abcdefghij")
    assert names(root / "a") == ["x.bin"]
    assert place.is_file() and not place.is_dir() and (root / "a").is_dir()
    assert (place.stat().st_size, place.read_bytes()) == (10, b"abcdefghij")
    with place.open("rb") as file:
        file.seek(3)
        assert (file.read(4), file.tell(), file.read(), file.read(1)) == (b"defg", 7, b"hij", b"")
    with open_unbuffered(place) as raw:
        buffer = bytearray(4)
        raw.seek(8)
        assert (raw.readinto(buffer), bytes(buffer[:2]), raw.readinto(buffer)) == (2, b"ij", 0)
    assert [entry.name for entry in (root / "a").glob("*.bin")] == ["x.bin"]
    assert list((root / "gone").glob("*")) == []
    place.unlink()
    place.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        place.unlink()
    remove_folders(made)
    assert not root.exists()


def test_folders_that_are_in_use_stay(root: Location) -> None:
    made = make_folders(root / "a" / "b")
    put_bytes_atomically(root / "a" / "kept", b"1")
    remove_folders(made)
    assert names(root) == ["a"] and names(root / "a") == ["kept"]


def test_a_draft_that_is_not_published_leaves_nothing(root: Location) -> None:
    make_folders(root)
    with pytest.raises(RuntimeError), Draft(root / "x") as draft:
        draft.path.write_bytes(b"half")
        raise RuntimeError("stop")
    assert names(root) == [] and not draft.path.exists()


def test_an_upload_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    root = to_location(f"memory://{uuid.uuid4().hex}")
    assert isinstance(root, RemotePath)
    put_bytes_atomically(root / "x", b"old")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(type(root.filesystem), "mv", refuse)
    with pytest.raises(OSError, match="quota exceeded"):
        put_bytes_atomically(root / "x", b"new")
    assert names(root) == ["x"] and (root / "x").read_bytes() == b"old"


def test_exactly_one_creates(root: Location) -> None:
    make_folders(root)
    if isinstance(root, RemotePath):  # the check of fsspec's memory filesystem is not atomic between threads
        made = [create_exclusively(root / "lock", str(owner).encode()) for owner in range(4)]
    else:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda owner: create_exclusively(root / "lock", str(owner).encode()), range(64)))
    assert made.count(True) == 1
    assert (root / "lock").read_bytes() == str(made.index(True)).encode()
    assert names(root) == ["lock"]


def test_what_is_a_url_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_location("file:///tmp/x.npy") == to_location(Path("file:///tmp/x.npy")) == Path("/tmp/x.npy")
    assert to_location("data/x.npy") == Path("data/x.npy")
    assert to_location("memory:/x") == Path("memory:/x")  # a string with one slash is no URL
    assert to_location(Path("memory://b/x.npy")) == to_location("memory://b/x.npy")  # pathlib has merged the slashes
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory:" / "b").mkdir(parents=True)
    assert to_location(Path("memory://b")) == Path("memory:/b")  # but a folder of that name wins
    with pytest.raises(DataError, match=r"nosuch://x: cannot be opened \(Protocol not known: nosuch\): pass a path"):
        to_location("nosuch://x")
