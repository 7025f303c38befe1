"""Studies as pages and texts: templates with autoescape, figures inside, no request to anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from aniso_ext.data.whole_file import replace_file
from aniso_ext.diagnostics.html.page import study_page
from aniso_ext.diagnostics.html.text import study_markdown, study_summary, study_text

if TYPE_CHECKING:
    from aniso_ext.diagnostics.study import Study

__all__ = ["save", "study_markdown", "study_page", "study_summary", "study_text"]


def save(study: Study, folder: Path, *, figures: bool) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``report.md``; each appears whole."""
    texts = {
        "report.html": study_page(study, figures=figures),
        "report.json": json.dumps(study.to_dict(), indent=1, allow_nan=False) + "\n",
        "report.md": study_markdown(study),
    }
    for name, text in texts.items():
        replace_file(folder / name, text.encode("utf-8"))
    return [folder / name for name in texts]
