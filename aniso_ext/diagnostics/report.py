"""What every diagnostic report shares: dictionaries, JSON, tables to read, for pandas and for notebooks."""

from __future__ import annotations

import html
import json
import math
import warnings as python_warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from aniso_ext.diagnostics.intervals import Interval
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import pandas

LEAST_RESAMPLES = 20
Line = tuple[str, float | str, str, Interval | None]
Table = tuple[str, list[str], list[list[str]], tuple[str, ...]]
"""Title, head, rows of text, warnings."""


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

    def to_pandas(self) -> pandas.DataFrame:
        """The numbers as a table: one row, a column a field, ``name_low`` and ``name_high`` where there are intervals.

        Spectra, curves and warnings are left to :meth:`to_dict`. Rows of several reports go into one table with
        ``pandas.concat``.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas needs pandas, which is not installed: pip install pandas") from None
        return pandas.DataFrame(self._records())

    def _records(self) -> list[dict[str, Any]]:
        """The rows of :meth:`to_pandas`."""
        return [scalars(self)]

    def _table(self) -> Table | None:
        """What is shown of the report; None for a report that writes itself in another way."""
        return None

    def __str__(self) -> str:
        table = self._table()
        return repr(self) if table is None else format_columns(*table)

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        table = self._table()
        if table is None:
            return f"<pre>{html.escape(str(self))}</pre>"
        title, head, rows, warnings = table
        lines = [f"<table><caption>{html.escape(title)}</caption>", f"<thead>{_html_row(head, 'th')}</thead><tbody>"]
        lines += [_html_row(row, "td") for row in rows]
        lines.append("</tbody></table>")
        lines += [f"<p>warning: {html.escape(text)}</p>" for text in warnings]
        return "\n".join(lines)


def _html_row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def scalars(report: Report) -> dict[str, Any]:
    """The plain numbers and texts of a report by field, with the bounds of its intervals behind each.

    ``name_query_error`` follows where a number is a mean over sampled queries.
    """
    intervals: dict[str, Interval] = getattr(report, "intervals", {})
    errors: dict[str, float] = getattr(report, "query_errors", {})
    found: dict[str, Any] = {}
    for name, value in vars(report).items():
        if isinstance(value, (int, float, str)):
            found[name] = value
            if name in intervals:
                found[f"{name}_low"], found[f"{name}_high"] = intervals[name]
            if name in errors:
                found[f"{name}_query_error"] = errors[name]
    return found


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


def format_interval(interval: Interval | None) -> str:
    """``[0.968, 0.979]``, or nothing."""
    return "" if interval is None else f"[{format_number(interval.low)}, {format_number(interval.high)}]"


def report_table(title: str, lines: Iterable[Line], warnings: tuple[str, ...] = ()) -> Table:
    """The table of lines of (name, value, meaning, interval)."""
    rows = [
        [name, value if isinstance(value, str) else format_number(value), format_interval(interval), note]
        for name, value, note, interval in lines
    ]
    head = ["", "value", "95 % interval", "meaning"]
    if not any(row[2] for row in rows):
        head.pop(2)
        for row in rows:
            row.pop(2)
    return title, head, rows, warnings


def format_columns(title: str, head: list[str], rows: list[list[str]], warnings: tuple[str, ...]) -> str:
    """Title, rows in aligned columns and warnings; the head is left to HTML, where columns have borders."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(head) - 1)]
    widths[1] = max(widths[1], 9)
    body = []
    for row in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:], strict=True))
        body.append("  ".join([f"  {row[0]:<{widths[0]}}", *numbers, row[-1]]).rstrip())
    return "\n".join([title, *body, *(f"  warning: {text}" for text in warnings)])


def checked_bootstrap(resamples: int) -> int:
    """The number of resamples, 0 or enough for the tails of an interval."""
    if resamples != 0 and resamples < LEAST_RESAMPLES:
        raise InputError(
            f"bootstrap = {resamples} resamples cannot show the tails of a 95 % interval: pass 0 (no intervals) or at "
            f"least {LEAST_RESAMPLES}; 200 is plenty"
        )
    return int(resamples)


def emit(warnings: Iterable[str]) -> None:
    """Raise each message as a :class:`DiagnosticsWarning` that points at the caller of the public function."""
    for text in warnings:
        python_warnings.warn(text, DiagnosticsWarning, stacklevel=3)
