"""Which output file belongs to which input shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aniso_ext.data import EmbeddingSet, Shard
from aniso_ext.data.folder import format_of
from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Target:
    """One output file and the shard it comes from."""

    shard: Shard
    path: Path
    format: str

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Plan:
    """All output files of a conversion, and its manifest beside them."""

    targets: tuple[Target, ...]
    folder: Path
    manifest: Path
    stored_dtype: str

    def remove_leftovers(self, indices: Sequence[int] | None = None) -> None:
        """Delete temporary files of killed runs: of some shards, or of all and of the manifest.

        Only for shards that no living worker may be writing.
        """
        names = {target.name for target in self.targets} if indices is None else set()
        names |= {self.targets[index].name for index in indices or ()}
        if indices is None:
            names.add(self.manifest.name)
        for path in self.folder.glob(".*.tmp"):
            name, _, token = path.name[1:].removesuffix(".tmp").rpartition(".")
            if name in names and token:
                path.unlink(missing_ok=True)


def plan_outputs(embeddings: EmbeddingSet, output: Path, stored_dtype: str) -> Plan:
    """One output for each shard, with its name and format; a single shard may also go to one named file.

    Raises:
        DataError: the output is the input.
        InputError: several shards for one file, or a format that cannot hold the dtype.
    """
    if format_of(output) is not None and not output.is_dir():
        if len(embeddings.shards) > 1:
            raise InputError(f"{output} is one file, but the input has {len(embeddings.shards)} shards: pass a folder")
        paths = [output]
        folder, manifest = output.parent, output.with_name(f"{output.name}.{MANIFEST}")
    else:
        if output.exists() and not output.is_dir():
            raise unusable(output, "is not a folder", "pass a folder, or a file with a known suffix")
        paths = [output / _file_name(shard) for shard in embeddings.shards]
        folder, manifest = output, output / MANIFEST
    targets = [Target(shard, path, str(format_of(path))) for shard, path in zip(embeddings.shards, paths, strict=True)]
    for target in targets:
        if target.shard.path is not None and target.shard.path.resolve() == target.path.resolve():
            raise unusable(target.path, "is both input and output", "convert into another folder")
        if stored_dtype == "bfloat16" and target.format != "safetensors":
            raise InputError(f"{target.path}: {target.format} cannot hold bfloat16: choose another dtype")
    return Plan(tuple(targets), folder, manifest, stored_dtype)


def _file_name(shard: Shard) -> str:
    if shard.path is None and shard.stored_dtype == "bfloat16":
        return "embeddings.safetensors"
    return shard.name
