"""From images and captions on disk to embedding sets in the clip-retrieval layout, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from aniso_ext.data import EmbeddingWriter
from aniso_ext.data.clip_retrieval import METADATA
from aniso_ext.data.dtypes import stored_name
from aniso_ext.data.folder import KINDS
from aniso_ext.data.whole_file import replace_file
from aniso_ext.encode.batches import Batch, Decoding, load_batches
from aniso_ext.encode.encoder import Encoder
from aniso_ext.encode.inputs import Samples, read_samples
from aniso_ext.encode.manifest import ON_EXISTING, Manifest
from aniso_ext.errors import DataError, InputError, StoppedError

ON_BAD = ("skip", "fail")
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out: its row in the input, its id, the image it names, and why."""

    row: int
    id: str
    image: str | None
    reason: str


@dataclass(frozen=True)
class EmbedReport:
    """What a run has done, earlier runs that it resumed included."""

    samples: int
    rows: int
    shards: int
    resumed_shards: int
    sides: tuple[str, ...]
    encoder: str
    width: int
    dtype: str
    precision: str
    bad: tuple[BadSample, ...]
    output: str
    manifest: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def embed_files(
    encoder: Encoder,
    output: str | Path,
    *,
    images: str | Path | None = None,
    captions: str | Path | None = None,
    batch_rows: int = 256,
    workers: int = 2,
    rows_per_shard: int = 65_536,
    dtype: Any = "float16",
    on_bad: str = "skip",
    on_existing: str = "resume",
    stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> EmbedReport:
    """Embed images, captions or both into ``img_emb/``, ``text_emb/``, ``metadata/`` and ``encoder.json``.

    Shards appear whole; a stopped run goes on with the next one and ends with the same bytes. A sample that is bad on
    one side is left out on both, so that rows stay paired.

    Args:
        encoder: see :meth:`Encoder.load`.
        output: folder, made if missing.
        images, captions: see :func:`aniso_ext.encode.inputs.read_samples`.
        batch_rows: samples that the model sees at a time.
        workers: processes that decode and tokenize; 0 does it in this one.
        rows_per_shard: samples of the input that become one shard, before bad ones are left out.
        dtype: stored dtype, float16 or float32.
        on_bad: ``skip`` unreadable images and missing captions, or ``fail`` at the first.
        on_existing: ``resume``, ``overwrite`` or ``fail``.
        stop: asked before each shard; once it says True, the run ends with :class:`StoppedError`.
        progress: called with (samples done, samples).

    Raises:
        DataError: an input or output cannot be used, nothing usable is in the input, or a resume does not fit what is
            there.
        InputError: an option is impossible.
        StoppedError: ``stop`` said so.
    """
    started = time.perf_counter()
    _check_options(batch_rows, workers, rows_per_shard, on_bad, on_existing)
    samples = read_samples(images, captions)
    given = (("image", samples.images), ("text", samples.captions))
    sides = [side for side, column in given if column is not None]
    header = {
        "encoder": encoder.record.name,
        "input": samples.fingerprint(),
        "samples": len(samples),
        "sides": sides,
        "width": encoder.record.width,
        "dtype": stored_name(dtype),
        "precision": encoder.precision,
        "batch_rows": batch_rows,
        "rows_per_shard": rows_per_shard,
        "on_bad": on_bad,
    }
    with Manifest(Path(output), header, on_existing) as manifest:
        resumed = len(manifest.shards)
        run = _Run(encoder, samples, manifest, header, workers, progress)
        run.execute(stop or (lambda: False))
        lines = manifest.shards
        encoder.record.write(manifest.folder)
    return EmbedReport(
        samples=len(samples),
        rows=sum(line["rows"] for line in lines),
        shards=len(lines),
        resumed_shards=resumed,
        sides=tuple(sides),
        encoder=encoder.record.name,
        width=encoder.record.width,
        dtype=str(header["dtype"]),
        precision=encoder.precision,
        bad=tuple(BadSample(**bad) for line in lines for bad in line["bad"]),
        output=str(output),
        manifest=str(manifest.path),
        seconds=time.perf_counter() - started,
    )


def _check_options(batch_rows: int, workers: int, rows_per_shard: int, on_bad: str, on_existing: str) -> None:
    for name, value, least in (
        ("batch_rows", batch_rows, 1),
        ("workers", workers, 0),
        ("rows_per_shard", rows_per_shard, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    for name, choice, choices in (("on_bad", on_bad, ON_BAD), ("on_existing", on_existing, ON_EXISTING)):
        if choice not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")


@dataclass
class _Run:
    """The shards that are left to do."""

    encoder: Encoder
    samples: Samples
    manifest: Manifest
    header: dict[str, Any]
    workers: int
    progress: Progress | None
    done: int = field(default=0, init=False)

    def execute(self, stop: Callable[[], bool]) -> None:
        size, batch_rows = self.header["rows_per_shard"], self.header["batch_rows"]
        starts = range(0, len(self.samples), size)
        left = [range(start, min(start + size, len(self.samples))) for start in starts][len(self.manifest.shards) :]
        self._advance(len(self.samples) - sum(map(len, left)))
        cut = [[list(rows[first : first + batch_rows]) for first in range(0, len(rows), batch_rows)] for rows in left]
        decoding = Decoding(self.samples, self.encoder.transform, self.encoder.tokenizer)
        pinned = self.encoder.device.startswith("cuda")
        batches = [rows for shard in cut for rows in shard]
        loaded = load_batches(decoding, batches, workers=self.workers, pin_memory=pinned)
        for number, shard in enumerate(cut, start=len(self.manifest.shards)):
            if stop():
                raise StoppedError(f"stopped after {number} shard(s): run the same command again to go on")
            self.manifest.add(self._shard(number, (next(loaded) for _ in shard)))
        if not any(line["rows"] for line in self.manifest.shards):
            first = self.manifest.shards[0]["bad"][0]
            raise DataError(
                f"none of the {len(self.samples)} samples can be used; the first, {first['id']!r}: {first['reason']}"
            )

    def _shard(self, number: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """Write the files of one shard; its line of the manifest comes back."""
        folder, width = self.manifest.folder, self.encoder.record.width
        paths = {side: folder / KINDS[side] / f"{KINDS[side]}_{number}.npy" for side in self.header["sides"]}
        kept: list[int] = []
        sizes: list[tuple[int, int]] = []
        bad: dict[int, str] = {}
        with ExitStack() as stack:
            writers = {
                side: EmbeddingWriter(path, dtype=self.header["dtype"], width=width, overwrite=True)
                for side, path in paths.items()
            }
            for writer in writers.values():
                stack.callback(writer.abort)
            for batch in batches:
                rows, keep = self._encoded(batch)
                faults = {**batch.bad, **{row: "embedding is not finite" for row in _others(batch.rows, keep)}}
                self._check_bad(faults)
                bad.update(faults)
                for side, writer in writers.items():
                    writer.write(rows[side])
                kept += [batch.rows[index] for index in keep]
                sizes += [batch.sizes[index] for index in keep] if batch.sizes else []
                self._advance(len(batch.rows) + len(batch.bad))
            files = []
            if kept:
                for side, writer in writers.items():
                    writer.close()
                    files.append(paths[side])
                files.append(self._metadata(number, kept, sizes))
        named = [
            {"row": row, "id": self.samples.ids[row], "image": self._image(row), "reason": bad[row]}
            for row in sorted(bad)
        ]
        sized = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return {"shard": number, "rows": len(kept), "files": sized, "bad": named}

    def _encoded(self, batch: Batch) -> tuple[dict[str, np.ndarray], list[int]]:
        """Unit rows of both sides, and which rows of the batch they are: all that came out finite."""
        rows: dict[str, np.ndarray] = {}
        if batch.images is not None:
            rows["image"] = self.encoder.encode_images(batch.images).numpy()
        if batch.tokens is not None:
            rows["text"] = self.encoder.encode_texts(batch.tokens).numpy()
        if not rows:
            empty = np.empty((0, self.encoder.record.width), np.float32)
            return dict.fromkeys(self.header["sides"], empty), []
        finite = np.logical_and.reduce([np.isfinite(side).all(axis=1) for side in rows.values()])
        keep = np.flatnonzero(finite)
        return {side: values[keep] for side, values in rows.items()}, keep.tolist()

    def _check_bad(self, bad: dict[int, str]) -> None:
        if bad and self.header["on_bad"] == "fail":
            row = min(bad)
            image = self._image(row)
            where = "" if image is None else f" ({image})"
            raise DataError(
                f"sample {self.samples.ids[row]!r}{where}, row {row}: {bad[row]}: mend it, or leave bad samples out "
                "with on_bad='skip'"
            )

    def _metadata(self, number: int, rows: list[int], sizes: list[tuple[int, int]]) -> Path:
        columns: dict[str, list[Any]] = {"id": [self.samples.ids[row] for row in rows]}
        if self.samples.captions is not None:
            columns["caption"] = [self.samples.captions[row] for row in rows]
        if self.samples.images is not None:
            columns["image"] = [self._image(row) for row in rows]
            columns["width"], columns["height"] = map(list, zip(*sizes, strict=True))
        path = self.manifest.folder / METADATA / f"{METADATA}_{number}.parquet"
        replace_file(path, _parquet(columns))
        return path

    def _image(self, row: int) -> str | None:
        return None if self.samples.images is None else self.samples.images[row]

    def _advance(self, samples: int) -> None:
        self.done += samples
        if self.progress is not None:
            self.progress(self.done, len(self.samples))


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), sink)
    return bytes(sink.getvalue())


def _others(rows: list[int], keep: list[int]) -> list[int]:
    kept = set(keep)
    return [row for index, row in enumerate(rows) if index not in kept]
