"""What every diagnostic report shares: plain dictionaries, JSON, and a table that a person can read."""

from __future__ import annotations

import json
import math
import warnings as python_warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, cast


class DiagnosticsWarning(UserWarning):
    """A reported number means less than it seems to; the message says why."""


class Report:
    """Base of the frozen report dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values (lists instead of tuples, nested reports as dictionaries)."""
        return cast("dict[str, Any]", _plain(asdict(cast("Any", self))))

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON of :meth:`to_dict`; a number that is undefined (NaN) becomes ``null``."""
        return json.dumps(_without_nan(self.to_dict()), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_number(value: float) -> str:
    """Three decimals below 10, one above; ``undefined`` for NaN."""
    if math.isnan(value):
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def format_report(title: str, lines: Iterable[tuple[str, float | str, str]], warnings: Iterable[str] = ()) -> str:
    """A title, one aligned line for each (name, value, meaning), then the warnings."""
    shown = [(name, value if isinstance(value, str) else format_number(value), note) for name, value, note in lines]
    wide = max(len(name) for name, _, _ in shown)
    body = [f"  {name:<{wide}}  {value:>9}  {note}".rstrip() for name, value, note in shown]
    return "\n".join([title, *body, *(f"  warning: {text}" for text in warnings)])


def emit(warnings: Iterable[str]) -> None:
    """Raise each message as a :class:`DiagnosticsWarning` that points at the caller of the public function."""
    for text in warnings:
        python_warnings.warn(text, DiagnosticsWarning, stacklevel=3)
