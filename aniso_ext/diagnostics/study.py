"""Everything that is measured of a pair of sets and its stand-ins, in one value that prints, saves and is read back."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import aniso_ext
from aniso_ext.diagnostics.alignment import AlignmentReport, alignment
from aniso_ext.diagnostics.choice import IDENTITY
from aniso_ext.diagnostics.corrections import CorrectionReport, corrections
from aniso_ext.diagnostics.gap import GapReport, gap
from aniso_ext.diagnostics.judged import Clock, JudgedRows, quietly
from aniso_ext.diagnostics.oracle import OraclePathReport, oracle_path
from aniso_ext.diagnostics.phases import PhaseReport, phase_report
from aniso_ext.diagnostics.projection import ProjectionReport, projection
from aniso_ext.diagnostics.records import from_plain, read_json, to_plain
from aniso_ext.diagnostics.report import Report, emit
from aniso_ext.diagnostics.rows import choose_rows, open_paired
from aniso_ext.diagnostics.sampled import query_count
from aniso_ext.diagnostics.verdict import Verdict, verdict
from aniso_ext.errors import DataError, InputError

if TYPE_CHECKING:
    from aniso_ext.ops import Frame

FORMAT = "aniso_ext.study"
VERSION = 1
RESERVED = (IDENTITY, "source", "target")
PLANE_ROWS = 2_000


@dataclass(frozen=True)
class StudyOptions:
    """What is measured, on how many rows.

    Attributes:
        k: neighbours of omega and mixing.
        max_pairs: pairs that stand-ins are judged on, drawn with ``seed`` if there are more; the gap is of all pairs.
        seed: of all draws.
        bootstrap: resamples behind each interval; 0 for none.
        device: torch device of the neighbour searches; None leaves the choice to the functions.
        oracle: walk the paired oracle path, on at most ``oracle_pairs`` pairs.
        rows: project rows, look at phases (with a frame) and at the sizes of corrections, on at most ``row_pairs``.
        max_queries: pairs whose neighbours are searched, among all that are judged; None is all up to 1M, and 10^12
            over their number beyond.
    """

    k: int = 20
    max_pairs: int | None = 10_000
    seed: int = 0
    bootstrap: int = 200
    device: str | None = None
    oracle: bool = True
    oracle_pairs: int = 2_000
    rows: bool = True
    row_pairs: int = 4_000
    max_queries: int | None = None


@dataclass(frozen=True)
class Origin:
    """Names of what is measured, and how to measure it again.

    Attributes:
        source, target: names of the sets for people.
        command: the exact command that repeats the study; of a call in Python it is made from the options.
        methods: where each method came from, by its name.
    """

    source: str = "source"
    target: str = "target"
    command: str = ""
    methods: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was measured, when, with what, and how long each step took; ``queries`` 0 is taken for all ``judged``."""

    rows: int
    judged: int
    width: int
    options: StudyOptions
    date: str
    versions: dict[str, str]
    seconds: dict[str, float]
    queries: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", self.queries or self.judged)


@dataclass(frozen=True)
class Study(Report):
    """The result of :func:`study`.

    Attributes:
        gap: of all pairs.
        methods: alignment of each method on the judged pairs, ``identity`` first.
        oracle, phases, projection, corrections: further reports, None where they were not asked for or have no meaning.
        origin, measured: what was measured and how.
        warnings: what the numbers cannot bear, all reports together.
    """

    gap: GapReport
    methods: dict[str, AlignmentReport]
    oracle: OraclePathReport | None
    phases: PhaseReport | None
    projection: ProjectionReport | None
    corrections: CorrectionReport | None
    origin: Origin
    measured: Measured
    warnings: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Both sets by name."""
        return f"{self.origin.source} → {self.origin.target}"

    @property
    def verdict(self) -> Verdict:
        """What the numbers say, with the rule behind each sentence."""
        return verdict(self.gap, self.methods, self.oracle)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values; ``methods`` is a list in order, each with its ``name``, and the verdict is included."""
        values = {
            name: to_plain(getattr(self, name)) for name in ("gap", "oracle", "phases", "projection", "corrections")
        }
        methods = [{"name": name, **to_plain(report)} for name, report in self.methods.items()]
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.origin.source,
            "target": self.origin.target,
            "command_to_repeat": self.origin.command,
            "verdict": to_plain(self.verdict.findings),
            "methods": methods,
            **values,
            "origin": to_plain(self.origin),
            "measured": to_plain(self.measured),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """What :meth:`to_dict` was made of.

        Raises:
            DataError: it is not the record of a study, or a field is missing or wrong; the message names the field.
        """
        if values.get("format") != FORMAT:
            raise DataError("this is no report of a study: give the report.json that aniso diagnose wrote")
        if values.get("version") != VERSION:
            raise DataError(
                f"this report has version {values.get('version')}, read is {VERSION}: measure again with this library"
            )
        methods = values.get("methods")
        if not isinstance(methods, list) or not all(isinstance(row, Mapping) and "name" in row for row in methods):
            raise DataError("methods must be a list of named reports: write the report again")
        return from_plain(cls, {**values, "methods": {row["name"]: row for row in methods}})

    @classmethod
    def from_json(cls, source: str | PathLike[str]) -> Study:
        """A study from the text of its JSON, from a ``report.json``, or from the folder that holds one.

        Raises:
            DataError: there is none, or it cannot be used; the message names the file.
        """
        return read_json(source, cls.from_dict)

    def to_html(self, *, figures: bool = True) -> str:
        """The report as one HTML page that loads nothing from anywhere.

        Raises:
            AnisoError: ``figures`` without matplotlib.
        """
        from aniso_ext.diagnostics.html import study_page

        return study_page(self, figures=figures)

    def to_markdown(self) -> str:
        """Verdict, gap and one line a method."""
        from aniso_ext.diagnostics.html import study_markdown

        return study_markdown(self)

    def save(self, folder: str | PathLike[str], *, figures: bool = True) -> list[Path]:
        """Write ``report.html``, ``report.json`` and ``report.md`` into a folder, made if need be; their paths.

        Raises:
            DataError: a file cannot be written.
            AnisoError: ``figures`` without matplotlib.
        """
        from aniso_ext.diagnostics.html import save

        return save(self, Path(folder), figures=figures)

    def __str__(self) -> str:
        from aniso_ext.diagnostics.html import study_text

        return study_text(self)

    def _repr_html_(self) -> str:
        from aniso_ext.diagnostics.html import study_summary

        return study_summary(self)


def study(
    source: Any,
    target: Any,
    *,
    methods: Mapping[str, Any] | None = None,
    frame: Frame | None = None,
    initial: Mapping[str, Any] | None = None,
    bounds: Mapping[str, float] | None = None,
    options: StudyOptions | None = None,
    origin: Origin | None = None,
    progress: Callable[[str], AbstractContextManager[None]] | None = None,
) -> Study:
    """Measure a gap, every method that is to close it, and what a correction could be worth, on held-out pairs.

    Args:
        source, target: [N, D] arrays or tensors, opened embedding sets, or paths; row i of both belongs to pair i. The
            gap reads all rows in pieces; everything else only the judged ones.
        methods: stand-ins by name: [N, D] in any of these forms, or a function such as ``aligner.transform`` that
            makes them of the judged source rows. ``identity`` is added.
        frame: a fitted frame, for the phases of its blocks and for ``eta_u``.
        initial: where the correction of a method starts, by its name, in the forms of ``methods``: the closed form.
        bounds: the largest length of a correction from there, by the name of the method.
        options: see :class:`StudyOptions`.
        origin: names for people, and the command that repeats the study.
        progress: called with what is done next; what it returns is entered for as long as it is done.

    Raises:
        InputError: rows, widths, dtypes, names or options do not fit, n <= k, or a non-finite row.

    Warns:
        DiagnosticsWarning: what the numbers cannot bear; the texts are also in ``warnings`` of the study.

    Example:
        >>> import numpy as np
        >>> from aniso_ext import diagnostics, worlds
        >>> y, x = worlds.simulate_gap(600, world=worlds.GapWorld.small(24), seed=0)
        >>> shift = lambda rows: rows - y.mean(axis=0) + x.mean(axis=0)
        >>> quick = diagnostics.StudyOptions(k=5, bootstrap=0, oracle=False)
        >>> found = diagnostics.study(y, x, methods={"shift": shift}, options=quick)
        >>> list(found.methods), found.verdict["composition"].outcome
        (['identity', 'shift'], 'residual')
    """
    options, origin = options or StudyOptions(), origin or Origin()
    given = dict(methods or {})
    _check_names(given, initial, bounds)
    clock = Clock(progress or (lambda text: nullcontext()))
    ys, _xs = open_paired(minimum=max(3, options.k + 1), source=source, target=target)
    chosen = choose_rows(ys.count, options.max_pairs, options.seed)
    judged = ys.count if chosen is None else len(chosen)
    queries = query_count(judged, options.max_queries)
    rows = JudgedRows(source, ys.count, ys.width, chosen, in_place=queries < judged)
    for name, value in given.items():
        rows.check(name, value)
    y, x = rows.source, rows.read(target)

    shared: dict[str, Any] = {"seed": options.seed, "bootstrap": options.bootstrap, "device": options.device}
    with clock.step("gap", f"measuring the gap of {ys.count:,} pairs"), quietly():
        measured_gap = gap(source, target, basis=None if frame is None else frame.basis, **shared)
    stand_ins, starts = {}, {}
    for name, value in given.items():
        with clock.step("stand-ins", f"making the stand-ins of {name}"):
            stand_ins[name] = rows.stand_ins(name, value)
            if initial is not None and name in initial:
                starts[name] = rows.stand_ins(f"initial of {name}", initial[name])
    reports = {}
    for name, z in {IDENTITY: y, **stand_ins}.items():
        with clock.step("alignment", f"judging {name}"), quietly():
            found = alignment(y, x, z, k=options.k, max_pairs=None, max_queries=queries, **shared)
        texts = tuple(text.replace("transformed has", f"{name}: the result has", 1) for text in found.warnings)
        reports[name] = replace(found, n_available=ys.count, warnings=texts)
    oracle = None
    if options.oracle and ys.count > options.k:
        with clock.step("oracle path", "walking the oracle path"), quietly():
            oracle = oracle_path(
                y,
                x,
                k=options.k,
                max_pairs=max(options.oracle_pairs, options.k + 1),
                seed=options.seed,
                device=options.device,
            )
    phases = projected = sizes = None
    if options.rows:
        with clock.step("rows", "looking at the rows"), quietly():
            phases, projected, sizes = _rows_of(ys.width, y, x, stand_ins, frame, starts, bounds or {}, options)
    said: list[str] = [
        text
        for one in (measured_gap, *reports.values(), oracle, phases, projected, sizes)
        for text in getattr(one, "warnings", ())
    ]
    warnings = tuple(dict.fromkeys(said))
    emit(warnings)
    record = Measured(
        rows=ys.count,
        judged=rows.count,
        width=ys.width,
        options=options,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        versions=_versions(),
        seconds={name: round(value, 3) for name, value in clock.seconds.items()},
        queries=queries,
    )
    if not origin.command:
        origin = replace(origin, command=_python_command(given, options))
    return Study(measured_gap, reports, oracle, phases, projected, sizes, origin, record, warnings)


def _rows_of(
    width: int,
    y: Any,
    x: Any,
    stand_ins: Mapping[str, Any],
    frame: Frame | None,
    starts: Mapping[str, Any],
    bounds: Mapping[str, float],
    options: StudyOptions,
) -> tuple[PhaseReport | None, ProjectionReport | None, CorrectionReport | None]:
    """What is said of rows: phases in the blocks of a frame, a plane, sizes of corrections; None where none can be."""
    chosen: dict[str, Any] = {"max_rows": options.row_pairs, "seed": options.seed}
    phases = None if frame is None else phase_report(y, x, stand_ins, frame, **chosen)
    plane = (
        projection(y, x, stand_ins, max_rows=min(PLANE_ROWS, options.row_pairs), seed=options.seed)
        if width > 1
        else None
    )
    known = {name: bounds[name] for name in starts if name in bounds}
    return phases, plane, corrections(y, stand_ins, initial=starts, bounds=known) if stand_ins else None


def _check_names(
    methods: Mapping[str, Any], initial: Mapping[str, Any] | None, bounds: Mapping[str, float] | None
) -> None:
    for name in methods:
        if name in RESERVED or not name:
            raise InputError(
                f"a method may not be called {name!r}: {IDENTITY} is added, and that name is taken; choose another"
            )
    for what, names in (("initial", initial or {}), ("bounds", bounds or {})):
        for name in names:
            if name not in methods:
                raise InputError(f"{what} has {name!r}, which is no method: there are {', '.join(methods) or 'none'}")


def _versions() -> dict[str, str]:
    return {
        "aniso_ext": aniso_ext.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _python_command(methods: Mapping[str, Any], options: StudyOptions) -> str:
    changed = [
        f"{one.name}={getattr(options, one.name)!r}"
        for one in fields(options)
        if getattr(options, one.name) != one.default
    ]
    given = ", ".join(f"{name!r}: ..." for name in methods)
    return (
        f"diagnostics.study(source, target, methods={{{given}}}, "
        f"options=diagnostics.StudyOptions({', '.join(changed)}))"
    )
