"""Studies as pages and texts: templates with autoescape, figures inside, no request to anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.data.whole_file import replace_file
from aniso_ext.diagnostics.html.page import opening, study_page
from aniso_ext.diagnostics.html.text import study_markdown, study_summary, study_text
from aniso_ext.diagnostics.records import JSON_NAME

if TYPE_CHECKING:
    from aniso_ext.diagnostics.study import Study

__all__ = ["opening", "save", "study_markdown", "study_page", "study_summary", "study_text", "write"]


def save(study: Study, folder: Path, *, figures: bool) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``report.md``; each appears whole."""
    return write(
        folder,
        {
            "report.html": study_page(study, figures=figures),
            JSON_NAME: study.to_dict(),
            "report.md": study_markdown(study),
        },
    )


def write(folder: Path, contents: Mapping[str, Any]) -> list[Path]:
    """Texts, and values as JSON, as files of a folder; all are made before the first is written."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, indent=1, allow_nan=False) + "\n"
        for name, value in contents.items()
    }
    for name, text in texts.items():
        replace_file(folder / name, text.encode("utf-8"))
    return [folder / name for name in texts]
