"""JSON lines, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aniso_ext.errors import DataError


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and object of each line that is not empty.

    Raises:
        DataError: a line is no JSON object; the message names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise DataError(f"{path}: line {number} is not JSON ({error}): mend or remove it") from None
            if not isinstance(value, dict):
                raise DataError(f"{path}: line {number} is not an object: write {{\"id\": ..., ...}}")
            yield number, value
