"""Which output file belongs to which input shard."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from aniso_ext.data import EmbeddingSet, Shard
from aniso_ext.data.clip_retrieval import METADATA, metadata_files
from aniso_ext.data.columns import ColumnShard
from aniso_ext.data.folder import KINDS, SUFFIXES, format_of
from aniso_ext.data.locations import Location, to_location
from aniso_ext.data.shards import unusable
from aniso_ext.data.sinks import TABLES
from aniso_ext.errors import InputError

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Target:
    """One output file and the shard it comes from."""

    shard: Shard
    path: Location
    format: str

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Plan:
    """All output files of a conversion, and its manifest beside them.

    ``metadata`` are the files of a clip-retrieval folder that go along as they are: where from, where to.
    """

    targets: tuple[Target, ...]
    folder: Location
    manifest: Location
    stored_dtype: str
    metadata: tuple[tuple[Location, Location], ...] = ()

    @property
    def ledger(self) -> Path:
        """The local file that is locked and written while a conversion runs: the manifest itself, where it is local.

        That of a remote output lies in a folder of the user's and is copied to its place at every change.
        """
        if isinstance(self.manifest, Path):
            return self.manifest
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        key = hashlib.sha256(str(self.manifest).encode()).hexdigest()[:32]
        return state / "aniso_ext" / "conversions" / key / self.manifest.name

    def remove_leftovers(self, indices: Sequence[int] | None = None) -> None:
        """Delete temporary files of killed runs: of some shards, or of all, the metadata and the manifest.

        Only for shards that no living worker may be writing.
        """
        if indices is None:
            places = {self.manifest, *(target.path for target in self.targets), *(copy for _, copy in self.metadata)}
        else:
            places = {self.targets[index].path for index in indices}
        names = {(place.parent, place.name) for place in places}
        for folder in {place.parent for place in places}:
            for path in folder.glob(".*.tmp"):
                name, _, token = path.name[1:].removesuffix(".tmp").rpartition(".")
                if token and (folder, name) in names:
                    path.unlink(missing_ok=True)


def plan_outputs(
    embeddings: EmbeddingSet,
    output: str | os.PathLike[str] | Location,
    stored_dtype: str,
    format: str | None = None,
) -> Plan:
    """One output for each shard, with its name and format; a single shard may also go to one named file.

    The half of a clip-retrieval folder that was opened by its root goes to the same half of ``output``, and its
    metadata goes along.

    Args:
        embeddings: the input.
        output: a folder, or a file with a known suffix; a path or an fsspec URL.
        stored_dtype: dtype of the output files.
        format: npy, parquet, safetensors or arrow; by default that of each shard, or of the suffix of ``output``.

    Raises:
        DataError: the output is the input, lies in it, or is no folder.
        InputError: several shards for one file or name, or a format that cannot hold the dtype.
    """
    output = to_location(output)
    if format is not None and format not in SUFFIXES:
        raise InputError(f"format must be one of {', '.join(SUFFIXES)}, got {format!r}")
    metadata: tuple[tuple[Location, Location], ...] = ()
    if format_of(output) is not None and not output.is_dir():
        _check_single(embeddings, output, format)
        _check_is_folder(output.parent)
        paths = [output]
        folder, manifest = output.parent, output.with_name(f"{output.name}.{MANIFEST}")
    else:
        _check_is_folder(output)
        folder = output if embeddings.half is None else output / embeddings.half
        paths = [folder / _file_name(shard, format) for shard in embeddings.shards]
        manifest = folder / MANIFEST
        if embeddings.half is not None and embeddings.folder is not None:
            files = metadata_files(embeddings.folder)
            metadata = tuple((file, output / METADATA / file.name) for file in files)
    targets = [Target(shard, path, str(format_of(path))) for shard, path in zip(embeddings.shards, paths, strict=True)]
    _check_targets(targets, stored_dtype)
    _check_folder(embeddings, folder)
    _say_what_stays_behind(targets)
    return Plan(tuple(targets), folder, manifest, stored_dtype, metadata)


def _check_is_folder(place: Location) -> None:
    """Refuse a folder that is, or lies below, a file."""
    existing = next((above for above in (place, *place.parents) if above.exists()), place)
    if existing.exists() and not existing.is_dir():
        raise unusable(existing, "is not a folder", "pass a folder, or a file with a known suffix")


def _check_single(embeddings: EmbeddingSet, output: Location, format: str | None) -> None:
    if len(embeddings.shards) > 1:
        raise InputError(f"{output} is one file, but the input has {len(embeddings.shards)} shards: pass a folder")
    if format is not None and format != format_of(output):
        raise InputError(f"{output} does not have the suffix of format {format}: pass {SUFFIXES[format]}, or a folder")


def _file_name(shard: Shard, format: str | None) -> str:
    if format is None and shard.path is None and shard.stored_dtype == "bfloat16":
        format = "safetensors"
    if format is None or format == format_of(PurePath(shard.name)):
        return shard.name
    return PurePath(shard.name).stem + SUFFIXES[format]


def _check_targets(targets: Sequence[Target], stored_dtype: str) -> None:
    sources: dict[str, str] = {}
    for target in targets:
        if target.shard.path is not None and target.shard.path.resolve() == target.path.resolve():
            raise unusable(target.path, "is both input and output", "convert into another folder")
        if stored_dtype == "bfloat16" and target.format != "safetensors":
            raise InputError(f"{target.path}: {target.format} cannot hold bfloat16: choose another dtype or format")
        if target.name in sources:
            both = f"{sources[target.name]} and {target.shard.name}"
            raise InputError(f"{both} would both become {target.name}: rename one of them")
        sources[target.name] = target.shard.name


def _check_folder(embeddings: EmbeddingSet, folder: Location) -> None:
    """Refuse an output that would become part of its own input, or of the layout around it."""
    source = embeddings.folder
    if source is not None and source.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise unusable(folder, f"lies inside the input {source}", "convert into a folder outside of it")
    halves = [half for half in KINDS.values() if (folder / half).is_dir()]
    if halves:
        reason = f"has the clip-retrieval layout ({' and '.join(halves)}), and shards beside it would hide that"
        raise unusable(folder, reason, "choose another folder, or convert the root of such a layout")


def _say_what_stays_behind(targets: Sequence[Target]) -> None:
    """Warn of columns that the output format has no place for."""
    for target in targets:
        shard = target.shard
        if isinstance(shard, ColumnShard) and target.format not in TABLES:
            others = [name for name in shard.schema().names if name != shard.column]
            if others:
                listed = ", ".join(others)
                warnings.warn(
                    f"{shard.name}: {target.format} holds embeddings only, the columns {listed} are not carried along: "
                    "format='parquet' keeps them",
                    UserWarning,
                    stacklevel=4,
                )
                return
