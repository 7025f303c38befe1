"""Several studies side by side: other aligners, other encoders, other data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from aniso_ext.diagnostics.records import JSON_NAME, to_plain
from aniso_ext.diagnostics.report import Report
from aniso_ext.diagnostics.study import Study
from aniso_ext.errors import InputError

FORMAT = "aniso_ext.comparison"
VERSION = 1
TOPICS = ("composition", "premise", "method")


@dataclass(frozen=True)
class Comparison(Report):
    """Studies by name, in the order in which they were given; see :func:`compare`."""

    studies: dict[str, Study]
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Every study whole, with the names that tell them apart."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "command_to_repeat": self.command,
            "studies": [{"name": name, **study.to_dict()} for name, study in self.studies.items()],
        }

    def to_html(self, *, figures: bool = True) -> str:
        """Both tables and overlaid figures as one page that loads nothing from anywhere.

        Raises:
            AnisoError: ``figures`` without matplotlib.
        """
        from aniso_ext.diagnostics.html.comparison import comparison_page

        return comparison_page(self, figures=figures)

    def save(self, folder: str | PathLike[str], *, figures: bool = True) -> list[Path]:
        """Write ``report.html`` and ``report.json`` into a folder, made if need be; their paths.

        Raises:
            DataError: a file cannot be written.
            AnisoError: ``figures`` without matplotlib.
        """
        from aniso_ext.diagnostics.html import write

        return write(Path(folder), {"report.html": self.to_html(figures=figures), JSON_NAME: to_plain(self.to_dict())})

    def __str__(self) -> str:
        lines = [f"{len(self.studies)} studies"]
        for name, study in self.studies.items():
            lines += ["", f"{name}: {study.title}"]
            lines += [f"- {study.verdict[topic].sentence}" for topic in TOPICS]
        return "\n".join(lines)


def compare(studies: Sequence[Study | str | PathLike[str]] | Mapping[str, Study | str | PathLike[str]]) -> Comparison:
    """Set finished studies side by side.

    Args:
        studies: two or more, each a study, the folder that one was saved to, or its ``report.json``; by name, or in a
            list, where folders give the names.

    Raises:
        InputError: fewer than two.
        DataError: a report is missing or damaged; the message names the file.

    Example:
        >>> from aniso_ext import diagnostics, worlds
        >>> options = diagnostics.StudyOptions(k=5, bootstrap=0, oracle=False)
        >>> pairs = [worlds.simulate_gap(400, world=worlds.GapWorld.small(24), seed=seed) for seed in (0, 1)]
        >>> found = compare([diagnostics.study(y, x, options=options) for y, x in pairs])
        >>> list(found.studies)
        ['study 1', 'study 2']
    """
    given = list(studies.values()) if isinstance(studies, Mapping) else list(studies)
    if len(given) < 2:
        raise InputError(
            f"a comparison needs two studies or more, got {len(given)}: give the folders of finished reports"
        )
    names = list(studies) if isinstance(studies, Mapping) else _names(given)
    found = [one if isinstance(one, Study) else Study.from_json(one) for one in given]
    return Comparison(dict(zip(names, found, strict=True)))


def _names(given: Sequence[Study | str | PathLike[str]]) -> list[str]:
    """The last part of each path that tells it from the others; of a study its number."""
    paths = [None if isinstance(one, Study) else _folder(Path(one)) for one in given]
    shared = [path for path in paths if path is not None]
    names: list[str] = []
    for number, path in enumerate(paths, 1):
        name = f"study {number}" if path is None else _telling(path, shared)
        names.append(name if name not in names else f"{name} ({number})")
    return names


def _folder(path: Path) -> Path:
    return path.parent if path.name == JSON_NAME else path


def _telling(path: Path, others: Sequence[Path]) -> str:
    parts = Path(os.path.abspath(path)).parts
    same_end = [Path(os.path.abspath(other)).parts for other in others]
    for depth in range(1, len(parts)):
        if sum(other[-depth:] == parts[-depth:] for other in same_end) == 1:
            return "/".join(parts[-depth:])
    return str(path)
