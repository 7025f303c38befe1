"""``aniso diagnose``: measure the gap between paired embeddings and what aligners do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, say, spinner
from aniso_ext.cli.report import alignment_table, judge, markdown, write_report
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from aniso_ext.data import EmbeddingSet


@command
def diagnose(
    source: Annotated[Path, typer.Option("--source", metavar="DIR", help="Source embeddings of held-out pairs.")],
    target: Annotated[
        Path, typer.Option("--target", metavar="DIR", help="Target embeddings; row i belongs to source row i.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for report.json and report.md.")],
    aligner: Annotated[
        list[Path] | None,
        typer.Option(
            "--aligner", metavar="ALIGNER", help="Aligner to judge; several after one option, or the option repeated."
        ),
    ] = None,
    transformed: Annotated[
        list[Path] | None,
        typer.Option(
            "--transformed",
            metavar="DIR",
            help="Stand-ins to judge that aniso convert (or anything else) made. Repeatable.",
        ),
    ] = None,
    more_aligners: Annotated[list[Path] | None, typer.Argument(metavar="ALIGNER", hidden=True)] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of Omega, M_Z and M_X.")] = 20,
    max_pairs: Annotated[
        int,
        typer.Option("--max-pairs", min=2, metavar="N", help="Pairs to judge stand-ins on, drawn if there are more."),
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Measure the gap between two PAIRED sets, and how well stand-ins close it.

    Use pairs that no aligner was fitted on. The first line of the table, identity, is the source as it is.

    \b
    Examples:
      aniso diagnose --source text_test --target img_test --out report
      aniso diagnose --source text_test --target img_test --aligner ours theirs --out report
    """
    if more_aligners and not aligner:
        raise typer.BadParameter(f"unexpected argument {str(more_aligners[0])!r}: aligners follow --aligner")
    aligners = [*(aligner or []), *(more_aligners or [])]

    from aniso_ext import diagnostics
    from aniso_ext.data import open_embeddings

    pair = Pair(open_embeddings(source), open_embeddings(target), max_pairs, seed)
    candidates = [(path, open_embeddings(path)) for path in transformed or []]
    for path, candidate in candidates:
        _check_shape(path, candidate, pair)
    with spinner(f"measuring the gap of {pair.rows:,} pairs"):
        gap = diagnostics.gap(pair.source_set, pair.target_set)

    methods: list[dict[str, Any]] = []

    def add(name: str, path: Path | None, stand_ins: np.ndarray) -> None:
        name = name if all(row["name"] != name for row in methods) else f"{name} ({path})"
        with spinner(f"judging {name}"):
            row = judge(name, pair.source, pair.target, stand_ins, k=k, max_pairs=max_pairs, seed=seed)
        methods.append({**row, "path": path})

    add("identity", None, pair.source)
    for path in aligners:
        add(*_transform(path, pair))
    for path, candidate in candidates:
        add(path.name, path, pair.read(candidate))

    report = {
        "command": "diagnose",
        "source": str(source),
        "target": str(target),
        "gap": gap.to_dict(),
        "methods": methods,
    }
    written = write_report(out, report, markdown(f"Modality gap of {source} and {target}", gap, methods))

    def show(console: Console) -> None:
        say(console, str(gap))
        console.print()
        console.print(alignment_table(methods))
        say(console, f"\n{len(pair.source):,} pairs, k = {k}; written: {written[0]}, {written[1].name}")

    return Result({**report, "files": written}, show)


class Pair:
    """Two sets whose rows correspond, and the rows of them that stand-ins are judged on."""

    def __init__(self, source: EmbeddingSet, target: EmbeddingSet, max_pairs: int, seed: int) -> None:
        import numpy as np

        if len(source) != len(target) or source.width != target.width:
            raise InputError(
                f"diagnosis needs pairs: the source has {len(source):,} rows of width {source.width}, the target "
                f"{len(target):,} of width {target.width}; give two sets whose rows correspond"
            )
        self.source_set, self.target_set, self.rows = source, target, len(source)
        self._chosen: np.ndarray | None = None
        if self.rows > max_pairs:
            self._chosen = np.sort(np.random.default_rng(seed).choice(self.rows, max_pairs, replace=False))
        self.source, self.target = self.read(source), self.read(target)

    def read(self, embeddings: EmbeddingSet) -> np.ndarray:
        """The judged rows of a set."""
        return embeddings.numpy() if self._chosen is None else embeddings.read(self._chosen)


def _transform(path: Path, pair: Pair) -> tuple[str, Path, np.ndarray]:
    from aniso_ext.align import load_aligner

    model = load_aligner(path)
    with spinner(f"transforming with {model.method}"):
        return model.method, path, model.transform(pair.source)


def _check_shape(path: Path, candidate: EmbeddingSet, pair: Pair) -> None:
    if len(candidate) != pair.rows or candidate.width != pair.source_set.width:
        raise InputError(
            f"{path} has {len(candidate):,} rows of width {candidate.width}, the pairs are {pair.rows:,} of width "
            f"{pair.source_set.width}: give the stand-ins of exactly these source rows"
        )
