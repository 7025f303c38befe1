"""Embedding sets behind URLs: the same rows, fingerprints and files as on the disk, by bounded range requests."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

import aniso_ext as aniso
from aniso_ext.convert import convert_embeddings
from aniso_ext.data import EmbeddingWriter, open_embeddings, read_metadata, write_clip_retrieval
from aniso_ext.data import ranged as ranged_module
from aniso_ext.data.locations import RemotePath, to_location
from aniso_ext.errors import DataError

ROWS = np.random.default_rng(0).standard_normal((57, 5)).astype(np.float32)
SUFFIXES = [".npy", ".parquet", ".safetensors", ".arrow"]


@pytest.fixture
def url() -> Iterator[str]:
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    place = to_location(name)
    assert isinstance(place, RemotePath)
    if place.exists():
        place.filesystem.rm(place.key, recursive=True)


def upload(local: Path, url: str) -> None:
    place = to_location(url)
    assert isinstance(place, RemotePath)
    place.filesystem.put(str(local), place.key, recursive=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_remote_file_is_the_local_file(tmp_path: Path, url: str, suffix: str) -> None:
    for place in (tmp_path / f"x{suffix}", f"{url}/x{suffix}", f"file://{tmp_path}/y{suffix}"):
        with EmbeddingWriter(place) as writer:
            writer.write(ROWS[:20])
            writer.write(ROWS[20:])
    content = (tmp_path / f"x{suffix}").read_bytes()
    assert to_location(f"{url}/x{suffix}").read_bytes() == (tmp_path / f"y{suffix}").read_bytes() == content
    assert [entry.name for entry in to_location(url).iterdir()] == [f"x{suffix}"]
    near, far = open_embeddings(tmp_path / f"x{suffix}"), open_embeddings(url)
    assert repr(near) == repr(far) and near.fingerprint() == far.fingerprint()
    assert [len(batch) for batch in far.iter_batches(10)] == [10, 10, 10, 10, 10, 7]
    assert np.array_equal(far.numpy(), ROWS)
    assert np.array_equal(far.read([56, 0, 3, 3]), ROWS[[56, 0, 3, 3]])
    assert np.array_equal(open_embeddings(Path(f"{url}/x{suffix}")).numpy(), ROWS)  # as a command line gives it


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_to_a_url_is_all_or_nothing(url: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), EmbeddingWriter(f"{url}/deep/x{suffix}") as writer:
        writer.write(ROWS)
        raise RuntimeError("stop")
    assert not to_location(url).exists()
    with EmbeddingWriter(f"{url}/x{suffix}") as writer:
        writer.write(ROWS)
        assert not to_location(f"{url}/x{suffix}").exists()
    before = to_location(f"{url}/x{suffix}").read_bytes()
    with pytest.raises(DataError, match=r"exists already"):
        EmbeddingWriter(f"{url}/x{suffix}")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("quota exceeded")

    monkeypatch.setattr(MemoryFileSystem, "mv", refuse)
    with pytest.raises(DataError, match=rf"x{suffix}: cannot be written \(quota exceeded\): check"):  # noqa: SIM117
        with EmbeddingWriter(f"{url}/x{suffix}", overwrite=True) as writer:
            writer.write(ROWS[:1])
    assert [entry.name for entry in to_location(url).iterdir()] == [f"x{suffix}"]
    assert to_location(f"{url}/x{suffix}").read_bytes() == before


def test_the_clip_retrieval_layout_behind_a_url(tmp_path: Path, url: str) -> None:
    files = write_clip_retrieval(
        f"{url}/set", image=ROWS, text=-ROWS, metadata={"caption": list(map(str, range(57)))}, rows_per_shard=30
    )
    assert len(files) == 6
    assert np.array_equal(open_embeddings(f"{url}/set", kind="image").numpy(), ROWS)
    assert np.array_equal(open_embeddings(f"{url}/set/text_emb").numpy(), -ROWS)
    assert read_metadata(f"{url}/set", rows=57).column("caption").to_pylist() == list(map(str, range(57)))
    with pytest.raises(DataError, match="exists already"):
        write_clip_retrieval(f"{url}/set", image=ROWS)
    with pytest.raises(DataError, match="overflows float16"):
        write_clip_retrieval(f"{url}/other", image=ROWS, text=ROWS * 1e6, dtype="float16")
    assert not to_location(f"{url}/other").exists()


def test_a_remote_corpus_is_read_once_in_bounded_pieces(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.zeros((60_000, 128), np.float16)  # 15 MB
    for suffix in (".npy", ".safetensors", ".parquet"):
        with EmbeddingWriter(f"{url}/x{suffix}") as writer:
            writer.write(rows)
    taken: list[int] = []
    original = MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        content = original(self, path, start, end, **options)
        taken.append(len(content))
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    for suffix in (".npy", ".safetensors", ".parquet"):
        taken.clear()
        opened = open_embeddings(f"{url}/x{suffix}")
        assert sum(len(batch) for batch in opened.iter_batches(4000)) == 60_000
        assert max(taken) <= 4 << 20
        assert sum(taken) < 1.7 * opened.shards[0].nbytes  # the rows, and the header or footer with what was read ahead


@settings(max_examples=60, deadline=None)
@given(data=st.data(), fortran=st.booleans())
def test_ranges_are_numpy_indexing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, fortran: bool
) -> None:
    path = tmp_path_factory.mktemp("ranged") / "x.npy"
    np.save(path, np.asfortranarray(ROWS) if fortran else ROWS)
    name = f"memory://{uuid.uuid4().hex}/x.npy"
    upload(path, name)
    rows = data.draw(st.one_of(st.slices(57), st.lists(st.integers(0, 56), max_size=12)))
    batch = data.draw(st.integers(1, 60))
    with pytest.MonkeyPatch.context() as patch:
        for limit, values in (("_GAP_BYTES", [0, 20, 100]), ("_REQUEST_BYTES", [1, 60, 10_000]), ("_REQUESTS", [1, 3])):
            patch.setattr(ranged_module, limit, data.draw(st.sampled_from(values)))
        opened = open_embeddings(name)
        assert np.array_equal(opened.read(rows), ROWS[np.array(rows, dtype=int) if isinstance(rows, list) else rows])
        assert np.array_equal(np.concatenate(list(opened.iter_batches(batch))), ROWS)


def test_what_goes_wrong_far_away_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"gone\.npy: does not exist: check the path"):
        open_embeddings(f"{url}/gone.npy")
    with pytest.raises(DataError, match=r"Protocol not known: nosuch\): pass a path or a URL that fsspec knows"):
        open_embeddings("nosuch://bucket/x.npy")
    with EmbeddingWriter(f"{url}/x.npy") as writer:
        writer.write(ROWS)
    opened = open_embeddings(f"{url}/x.npy")

    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("connection reset")  # a library's own error, not an OSError

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(DataError, match=r"x\.npy: cannot be read \(RuntimeError: connection reset\): check the"):
        opened.numpy()
    monkeypatch.setattr(MemoryFileSystem, "info", broken)
    with pytest.raises(DataError, match=r"x\.npy: cannot be reached \(RuntimeError: connection reset\): check"):
        open_embeddings(f"{url}/x.npy")


def test_conversion_reads_urls_and_file_urls(tmp_path: Path, url: str) -> None:
    from aniso_ext.align import make_aligner

    aligner = make_aligner("mean_shift").fit(ROWS, -ROWS)
    for number, part in enumerate(np.array_split(ROWS, 3)):
        with EmbeddingWriter(f"{url}/in/part_{number}.npy") as writer:
            writer.write(part)
    report = convert_embeddings(aligner, f"{url}/in", f"file://{tmp_path}/out")
    assert report.outputs == tuple(str(tmp_path / "out" / f"part_{number}.npy") for number in range(3))
    assert np.array_equal(open_embeddings(tmp_path / "out").numpy(), aligner.transform(ROWS))


def test_a_conversion_to_a_remote_place_resumes_and_ends_as_a_local_one(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is at its place after every shard; what runs is locked on this machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "in").mkdir()
    rows = np.random.default_rng(0).standard_normal((3, 40, 4)).astype(np.float32)
    for index, part in enumerate(rows):
        np.save(tmp_path / "in" / f"part_{index}.npy", part)
    aligner = aniso.make_aligner("mean_shift").fit(rows[0], rows[1])
    convert_embeddings(aligner, tmp_path / "in", tmp_path / "out", batch_rows=16)

    def stop_in_the_second_shard(done: int, total: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_embeddings(aligner, tmp_path / "in", url, batch_rows=16, progress=stop_in_the_second_shard)
    folder = to_location(url)
    assert sorted(place.name for place in folder.iterdir()) == ["manifest.jsonl", "part_0.npy"]
    assert len((folder / "manifest.jsonl").read_bytes().splitlines()) == 2
    shutil.rmtree(tmp_path / "state")  # as on another machine
    report = convert_embeddings(aligner, tmp_path / "in", url, batch_rows=16)
    assert report.resumed_shards == 1
    for place in (tmp_path / "out").iterdir():
        assert (folder / place.name).read_bytes() == place.read_bytes()
    assert len(list(folder.iterdir())) == 4
    with pytest.raises(DataError, match="cannot be locked at a remote place: let workers share a local folder"):
        convert_embeddings(aligner, tmp_path / "in", url, batch_rows=16, worker=(0, 2))
