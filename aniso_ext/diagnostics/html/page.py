"""A study as one page: sections of sentences, tables and figures, put into the template."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aniso_ext
from aniso_ext.diagnostics.findings import Finding
from aniso_ext.diagnostics.html import tables
from aniso_ext.diagnostics.html.pictures import Picture
from aniso_ext.diagnostics.html.tables import Table
from aniso_ext.diagnostics.metrics import GAP_METRICS, METHOD_METRICS, Metric

if TYPE_CHECKING:
    from jinja2 import Environment

    from aniso_ext.diagnostics.study import Measured, Study

GOOD = {"paired", "compatible", "anisotropic", "holds", "favoured", "enough", "measured"}
BAD = {"unpaired", "incompatible", "flat", "isotropic", "fails"}
OPEN = {"undecided", "undefined", "few", "weak", "partly"}
SYMBOLS = {
    "G_mu": "G<sub>μ</sub>",
    "G_Sigma": "G<sub>Σ</sub>",
    "C_lambda": "C<sub>λ</sub>",
    "O_q": "O<sub>q</sub>",
    "D_center": "D<sub>center</sub>",
    "R_res": "R<sub>res</sub>",
    "R_res (distance)": "R<sub>res</sub> (distance)",
    "A_r": "A<sub>r</sub>",
    "d_eff/D": "d<sub>eff</sub>/D",
    "eta_U": "η<sub>U</sub>",
    "Delta_mu": "Δ<sub>μ</sub>",
    "Phi": "Φ",
    "Psi": "Ψ",
    "Omega": "Ω",
    "M_Z": "M<sub>Z</sub>",
    "M_X": "M<sub>X</sub>",
}
_NAMED = re.compile(
    r"(?<![\w&-])(?:"
    + "|".join(re.escape(name) for name in sorted(SYMBOLS, key=len, reverse=True) if "_" in name or "/" in name)
    + r"|O_(\d+))(?![\w-])"
)
"""Names of numbers in a sentence; plain words such as Phi stay words."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; the first table comes before the explanations and figures."""

    id: str
    title: str
    lead: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    findings: tuple[dict[str, str], ...] = ()
    metrics: tuple[Metric, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    code: str = ""
    code_label: str = ""


def study_page(study: Study, *, figures: bool = True) -> str:
    """The page of a study.

    Raises:
        AnisoError: ``figures`` without matplotlib.
    """
    measured = study.measured
    sections = [
        Section("verdict", "Verdict", findings=shown(study.verdict.findings)),
        _gap_section(study, figures),
        _methods_section(study, figures),
        *_oracle_section(study),
        *_phases_section(study, figures),
        *_rows_section(study, figures),
        measured_section(measured, study.origin.command, study.origin.methods),
    ]
    return render(
        kind="Diagnostics of a modality gap",
        title=study.title,
        opening=opening(study),
        sections=sections,
        footer=f"Measured {measured.date} with aniso_ext {measured.versions.get('aniso_ext', '')}. This page loads "
        "nothing from anywhere.",
    )


def opening(study: Study) -> str:
    """Rows, width and methods in a line."""
    measured = study.measured
    judged = "all of them" if measured.judged == measured.rows else f"{measured.judged:,} drawn from them"
    methods = len(study.methods) - 1
    count = "no method" if not methods else "one method" if methods == 1 else f"{methods} methods"
    text = (
        f"{measured.rows:,} pairs of width {measured.width:,}; {count} beside the source as it is, judged on {judged}."
    )
    return f"{text} {tables.sampled_queries(study.methods)}".rstrip()


def shown(findings: Sequence[Finding]) -> tuple[dict[str, str], ...]:
    """Findings with the tone of their outcome."""
    return tuple({**asdict(one), "tone": tone(one.outcome)} for one in findings)


def tone(outcome: str) -> str:
    """Whether an outcome is good news, bad news, or open; empty for what is neither."""
    return "good" if outcome in GOOD else "bad" if outcome in BAD else "open" if outcome in OPEN else ""


def _gap_section(study: Study, figures: bool) -> Section:
    from aniso_ext.diagnostics.html.drawings import gap_pictures

    gap = study.gap
    more = [tables.energy_table(gap)] + ([tables.overlap_table(gap)] if gap.overlap else [])
    lead = "A pair is x (target) and y (source); r is what is left of x − y once both means agree."
    return Section(
        "gap", "The gap", lead=(lead,), warnings=gap.warnings, metrics=GAP_METRICS,
        tables=(tables.gap_table(gap), *more), pictures=tuple(gap_pictures(gap)) if figures else (),
    )  # fmt: skip


def _methods_section(study: Study, figures: bool) -> Section:
    from aniso_ext.diagnostics.html.drawings import method_pictures

    texts = unique(text for report in study.methods.values() for text in report.warnings)
    first = next(iter(study.methods.values()))
    bound = (
        f"Once the means agree exactly, Phi of unit rows cannot exceed {first.phi_bound:.3f} here, whatever the method "
        "(Cauchy–Schwarz on the centred rows). While Delta_mu is above 0 a method has a bound of its own, a tick in "
        "the figure of Phi."
    )
    return Section(
        "stand-ins", "The stand-ins", lead=(bound,), warnings=texts, metrics=METHOD_METRICS,
        tables=(tables.methods_table(study.methods), tables.score_table(study.methods)),
        pictures=tuple(method_pictures(study.methods, study.oracle)) if figures else (),
    )  # fmt: skip


def _oracle_section(study: Study) -> list[Section]:
    if study.oracle is None:
        return []
    lead = (
        "The oracle is given the pairs it is judged on: from the mean shift (α = 0) it walks along the K "
        "strongest directions of the residual to the "
        "target (α = 1). It shows what correcting K directions could be worth, and is no method for unpaired data."
    )
    return [
        Section(
            "oracle",
            "What a correction could be worth",
            lead=(lead,),
            warnings=study.oracle.warnings,
            tables=(tables.oracle_table(study.oracle),),
        )
    ]


def _phases_section(study: Study, figures: bool) -> list[Section]:
    from aniso_ext.diagnostics.html.drawings import phase_pictures

    phases = study.phases
    if phases is None:
        return []
    lead = (
        f"A frame of rank {phases.rank} pairs its directions into {phases.rank // 2} blocks; in each a row has a "
        "radius and an angle, its phase. "
        "Shown are the blocks with the most target energy."
    )
    pictures = tuple(phase_pictures(phases)) if figures else ()
    return [
        Section(
            "phases",
            "Phases and radii",
            lead=(lead,),
            warnings=phases.warnings,
            tables=(tables.phases_table(phases),),
            pictures=pictures,
        )
    ]


def _rows_section(study: Study, figures: bool) -> list[Section]:
    from aniso_ext.diagnostics.html.drawings import row_pictures

    projection, corrections = study.projection, study.corrections
    if corrections is None and (projection is None or not figures):
        return []
    found = () if corrections is None else (tables.corrections_table(corrections),)
    texts = () if corrections is None else corrections.warnings
    return [
        Section(
            "rows",
            "Single rows",
            warnings=texts,
            tables=found,
            pictures=tuple(row_pictures(projection, corrections)) if figures else (),
        )
    ]


def measured_section(measured: Measured, command: str, methods: dict[str, str]) -> Section:
    """What was measured with what, and the command that does it again."""
    options = asdict(measured.options)
    facts = [
        ("date", measured.date),
        ("pairs", f"{measured.rows:,}, of which stand-ins are judged on {measured.judged:,}"),
        ("neighbours", f"of {measured.queries:,} pairs among all that are judged"),
        *((name.replace("_", " "), _option(value)) for name, value in options.items()),
        *(
            (f"version of {name}" if name not in ("processor",) else name, value)
            for name, value in measured.versions.items()
        ),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in measured.seconds.items()),
    ]
    found = [tables.plain_table("What was measured, and how", ("what", "value"), facts)]
    if methods:
        found.append(tables.plain_table("Where the methods came from", ("method", "from"), methods.items()))
    lead = (
        "Intervals hold 95 % of what resampled pairs give."
        if measured.options.bootstrap
        else "Intervals were not asked for."
    )
    return Section(
        "measured", "How it was measured", lead=(lead, "The command that repeats this report stands at the "
            "end."), tables=tuple(found),
        code=command, code_label="Command that repeats this report",
    )  # fmt: skip


def _option(value: Any) -> str:
    if value is None:
        return "by default"
    return (
        ("yes" if value else "no")
        if isinstance(value, bool)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def unique(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text once, in order."""
    return tuple(dict.fromkeys(texts))


def render(**values: Any) -> str:
    """The page template with everything escaped that is not its own."""
    here = Path(__file__).parent
    script = "\n" + (here / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    from markupsafe import Markup

    page = (
        environment()
        .get_template("page.html.j2")
        .render(
            version=aniso_ext.__version__,
            style=Markup((here / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            **values,
        )
    )
    return page.lstrip("\n")


@cache
def environment() -> Environment:
    """Templates of this folder, autoescaped; an undefined name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["symbol"] = _symbol
    found.filters["symbols"] = _symbols
    return found


def _symbol(text: str) -> str:
    """A name as a symbol where it is that of a number, else escaped."""
    from markupsafe import Markup, escape

    return _symbols(text) if _NAMED.fullmatch(text) else Markup(SYMBOLS.get(text) or escape(text))


def _symbols(text: str) -> str:
    """A sentence, escaped, with the names of numbers set as symbols."""
    from markupsafe import Markup, escape

    return Markup(_NAMED.sub(lambda found: SYMBOLS.get(found[0]) or f"O<sub>{found[1]}</sub>", str(escape(text))))
