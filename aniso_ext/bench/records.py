"""Results as files: a CSV with its facts in comment lines, JSON, and the comparison of two runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aniso_ext.errors import DataError

MEASURED, FAILED = "measured", "failed"


@dataclass
class Measurement:
    """One variant of one case. Empty fields were not measured or mean nothing there."""

    case: str
    operation: str
    format: str
    D: int
    R: int
    K: int
    complement: str
    rows: int
    variant: str
    ours: bool
    status: str
    reason: str = ""
    error: float | None = None
    ns_per_row: float | None = None
    p20: float | None = None
    p80: float | None = None
    bytes_per_row: int = 0
    flop_per_row: int = 0
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    floor_ns: float | None = None
    over_floor: float | None = None  # time as a multiple of the floor
    speedup_eager: float | None = None  # time of eager over this one
    speedup_compiled: float | None = None
    goal_ns: float | None = None
    met: bool | None = None


@dataclass
class Latency:
    """One way to call one batch, microseconds from the call to the result."""

    case: str
    rows: int
    variant: str
    us: float
    p20: float
    p80: float


@dataclass
class Run:
    """All that a run found; ``facts`` and ``ceilings`` are the header of its files."""

    facts: dict[str, str]
    ceilings: dict[str, float]
    kernels: list[Measurement] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)

    @property
    def header(self) -> dict[str, str]:
        return {**self.facts, **{f"ceiling {name}": f"{value:.5g}" for name, value in self.ceilings.items()}}

    @property
    def failed(self) -> list[Measurement]:
        return [row for row in self.kernels if row.status == FAILED]


def write(run: Run, folder: Path, name: str) -> list[Path]:
    """``NAME_kernels.csv``, ``NAME_latency.csv`` and ``NAME_bench.json``; tables without rows are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, rows in (("kernels", run.kernels), ("latency", run.latency)):
        if rows:
            written.append(folder / f"{name}_{part}.csv")
            write_table(written[-1], run.header, [asdict(row) for row in rows])
    written.append(folder / f"{name}_bench.json")
    written[-1].write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")
    return written


def write_table(path: Path, header: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in header.items())
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def read_table(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Header and rows of a CSV that :func:`write_table` wrote.

    Raises:
        DataError: the file has no table.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    header = dict(comment.split(": ", 1) for comment in comments if ": " in comment)
    rows = list(csv.DictReader(line for line in lines if line and not line.startswith("#")))
    if not rows or None in rows[0]:
        raise DataError(f"{path} has no table of `aniso bench kernels`")
    return header, rows


def number(text: str) -> float | None:
    """A cell as a number, None where it is empty."""
    return float(text) if text else None


@dataclass(frozen=True)
class Ratio:
    """One variant of one case in two runs; ``ratio`` below 1 means that the second is faster."""

    case: str
    variant: str
    first_ns: float
    second_ns: float
    ratio: float


def compare(first: Path, second: Path) -> tuple[list[Ratio], list[str]]:
    """Variants that both files measured, and the names of those that one of them has alone.

    Raises:
        DataError: a file is no table of kernels, or the two share nothing.
    """
    times = []
    for path in (first, second):
        rows = read_table(path)[1]
        if not {"case", "variant", "ns_per_row"} <= rows[0].keys():
            raise DataError(f"{path} has no times of kernels: compare two files that end in _kernels.csv")
        times.append({(row["case"], row["variant"]): float(row["ns_per_row"]) for row in rows if row["ns_per_row"]})
    shared = [key for key in times[0] if key in times[1]]
    if not shared:
        raise DataError(f"{first} and {second} share no variant of a case")
    ratios = [Ratio(*key, times[0][key], times[1][key], times[1][key] / times[0][key]) for key in shared]
    return ratios, [" ".join(key) for key in times[0].keys() ^ times[1].keys()]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
