"""``aniso diagnose``: measure a gap and what aligners do about it, or compare finished reports."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, say, spinner
from aniso_ext.cli.report import alignment_table, check_device, without_energy_curve
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.align import Aligner
    from aniso_ext.data import EmbeddingSet
    from aniso_ext.diagnostics import Study, StudyOptions


@command
def diagnose(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for report.html, report.json and report.md.")
    ],
    source: Annotated[
        Path | None, typer.Option("--source", metavar="DIR", help="Source embeddings of held-out pairs.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--target", metavar="DIR", help="Target embeddings; row i belongs to source row i.")
    ] = None,
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
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="REPORT",
            help="Finished reports to set side by side instead of measuring; several after one option, or repeated.",
        ),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="MORE", hidden=True)] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of Omega, M_Z and M_X.")] = 20,
    max_pairs: Annotated[
        int,
        typer.Option("--max-pairs", min=2, metavar="N", help="Pairs to judge stand-ins on, drawn if there are more."),
    ] = 10_000,
    max_queries: Annotated[
        int | None,
        typer.Option(
            "--max-queries",
            min=2,
            metavar="N",
            help="Pairs, drawn if there are more, whose neighbours are searched among all that are judged.",
            show_default="all up to 1,000,000, beyond that 10^12 / pairs",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of all draws.")] = 0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, metavar="N", help="Resamples behind each interval; 0 for none.")
    ] = 200,
    oracle: Annotated[
        bool,
        typer.Option("--oracle/--no-oracle", help="Also walk the paired path that shows what a correction is worth."),
    ] = True,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw figures into the page.")] = True,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="DEVICE", help="Where to compute: cpu or cuda.", show_default="a GPU where there is one"
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Measure the gap between two PAIRED sets, and how well stand-ins close it.

    Use pairs that no aligner was fitted on. The first line of the table, identity, is the source as it is. With
    --compare, finished reports of several aligners, encoders or data sets become one page.

    \b
    Examples:
      aniso diagnose --source text_test --target img_test --out report
      aniso diagnose --source text_test --target img_test --aligner ours theirs --out report
      aniso diagnose --compare report_a report_b --out compared
    """
    reports, aligners = list(compare or []), list(aligner or [])
    if more and not (reports or aligners):
        raise typer.BadParameter(f"unexpected argument {str(more[0])!r}: aligners follow --aligner, reports --compare")
    if reports:
        if aligners or transformed or source is not None or target is not None:
            raise typer.BadParameter(
                "it reads finished reports: give no --source, --target, --aligner or --transformed with it",
                param_hint="--compare",
            )
        return _compared([*reports, *(more or [])], out, figures)
    if source is None or target is None:
        missing = "--source" if source is None else "--target"
        raise typer.BadParameter("pairs need both --source and --target (or give --compare)", param_hint=missing)
    check_device(device)

    from aniso_ext.diagnostics import StudyOptions

    options = StudyOptions(
        k=k, max_pairs=max_pairs, seed=seed, bootstrap=bootstrap, device=device, oracle=oracle, max_queries=max_queries
    )
    chosen = Chosen(source, target, [*aligners, *(more or [])], transformed or [])
    study = chosen.measure(options, _command(chosen, options, out, figures))
    drawn = figures and _can_draw()
    with spinner("writing the report"):
        written = study.save(out, figures=drawn)

    def show(console: Console) -> None:
        from aniso_ext.diagnostics.html import opening

        say(console, f"{study.title}: {opening(study)}\n")
        say(console, without_energy_curve(study.gap))
        console.print()
        console.print(alignment_table([{"name": name, **row.to_dict()} for name, row in study.methods.items()]))
        say(console, f"\n{study.measured.judged:,} pairs, k = {k}\n\nVerdict")
        for finding in study.verdict.findings:
            say(console, f"- {finding.sentence}")
        say(console, f"\nwritten: {written[0]}, {', '.join(path.name for path in written[1:])}")

    return Result({**study.to_dict(), "command": "diagnose", "files": written}, show)


class Chosen:
    """The sets and methods of a command line, opened; what cannot be used is found before anything is measured."""

    def __init__(self, source: Path, target: Path, aligners: Sequence[Path], stand_ins: Sequence[Path]) -> None:
        from aniso_ext.align import load_aligner
        from aniso_ext.data import open_embeddings

        self.source, self.target = source, target
        self.pair = open_embeddings(source), open_embeddings(target)
        y, x = self.pair
        if len(y) != len(x) or y.width != x.width:
            raise InputError(
                f"diagnosis needs pairs: the source has {len(y):,} rows of width {y.width}, the target {len(x):,} of "
                f"width {x.width}; give two sets whose rows correspond"
            )
        self.stand_ins = [(path, open_embeddings(path)) for path in stand_ins]
        for path, found in self.stand_ins:
            _check_shape(path, found, y)
        self.aligners = [(path, load_aligner(path)) for path in aligners]
        for path, model in self.aligners:
            if model.width != y.width:
                raise InputError(
                    f"{path} was fitted at width {model.width}, the pairs have width {y.width}: give an aligner of "
                    "their encoder"
                )

    def measure(self, options: StudyOptions, command: str) -> Study:
        """The study of all methods, with the frame and the start of a refined aligner where there is one."""
        from aniso_ext import diagnostics

        methods: dict[str, Any] = {}
        initial: dict[str, Any] = {}
        bounds: dict[str, float] = {}
        frames: list[tuple[bool, Any]] = []
        sources: dict[str, str] = {}
        kinds = {_unrefined(model) for _, model in self.aligners if hasattr(model, "frame_")}
        for path, model in self.aligners:
            closed = "_closed_form" if hasattr(model, "frame_") and _unrefined(model) and len(kinds) > 1 else ""
            name = self._name(model.method + closed, path, methods)
            methods[name], sources[name] = model.transform, str(path)
            if hasattr(model, "frame_"):
                frames.append((_unrefined(model), model.frame_))
                if not _unrefined(model):
                    initial[name] = model.closed_form().transform  # type: ignore[attr-defined]
                    bounds[name] = float(model.summary_["eps_eff_largest"])
        for path, found in self.stand_ins:
            name = self._name(path.name, path, methods)
            methods[name], sources[name] = found, str(path)
        frame = min(frames, key=lambda one: one[0])[1] if frames else None
        origin = diagnostics.Origin(str(self.source), str(self.target), command, sources)
        return diagnostics.study(
            *self.pair, methods=methods, frame=frame, initial=initial, bounds=bounds, options=options, origin=origin,
            progress=spinner,
        )  # fmt: skip

    @staticmethod
    def _name(wanted: str, path: Path, taken: dict[str, Any]) -> str:
        from aniso_ext.diagnostics.study import RESERVED

        if wanted not in taken and wanted not in RESERVED:
            return wanted
        name, count = f"{wanted} ({path})", 2
        while name in taken:
            name, count = f"{wanted} ({path}, {count})", count + 1
        return name


def _unrefined(model: Aligner) -> bool:
    return getattr(model, "refiner_", None) is None


def _check_shape(path: Path, found: EmbeddingSet, source: EmbeddingSet) -> None:
    if len(found) != len(source) or found.width != source.width:
        raise InputError(
            f"{path} has {len(found):,} rows of width {found.width}, the pairs are {len(source):,} of width "
            f"{source.width}: give the stand-ins of exactly these source rows"
        )


def _command(chosen: Chosen, options: StudyOptions, out: Path, figures: bool) -> str:
    """The command line that measures the same again, with every option that decides a number."""
    words = ["aniso", "diagnose", "--source", str(chosen.source), "--target", str(chosen.target)]
    for path, _ in chosen.aligners:
        words += ["--aligner", str(path)]
    for path, _ in chosen.stand_ins:
        words += ["--transformed", str(path)]
    words += ["--k", str(options.k), "--max-pairs", str(options.max_pairs), "--seed", str(options.seed)]
    words += ["--bootstrap", str(options.bootstrap)]
    words += ["--max-queries", str(options.max_queries)] if options.max_queries is not None else []
    words += ["--device", options.device] if options.device is not None else []
    words += [] if options.oracle else ["--no-oracle"]
    words += [] if figures else ["--no-figures"]
    return shlex.join([*words, "--out", str(out)])


def _can_draw() -> bool:
    """Whether matplotlib is there; a report without figures is better than none."""
    import importlib.util
    import warnings

    if importlib.util.find_spec("matplotlib") is not None:
        return True
    warnings.warn("the page has no figures: they need matplotlib, the extra `plots`", UserWarning, stacklevel=2)
    return False


def _compared(reports: Sequence[Path], out: Path, figures: bool) -> Result:
    from aniso_ext import diagnostics

    command = shlex.join(["aniso", "diagnose", "--compare", *map(str, reports), "--out", str(out)])
    comparison = replace(diagnostics.compare(reports), command=command)
    with spinner("writing the comparison"):
        written = comparison.save(out, figures=figures and _can_draw())

    def show(console: Console) -> None:
        say(console, f"{comparison}\n\nwritten: {written[0]}, {', '.join(path.name for path in written[1:])}")

    return Result({**comparison.to_dict(), "command": "diagnose", "files": written}, show)
