"""Lines of a manifest: what they say, and whether they are those of a conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aniso_ext.convert.plan import Plan
from aniso_ext.convert.records import SHARD, RecordFolder
from aniso_ext.data.shards import unusable
from aniso_ext.errors import DataError

KIND = "aniso_ext.convert"
VERSION = 1
CALIBRATED = "calibrated"
START_OVER = "pass the same, or another output, or on_existing='overwrite'"


def read_recorded(plan: Plan, header: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """First line and lines of the shards, by index, that a conversion has recorded so far; nothing is changed.

    Raises:
        DataError: what is there belongs to another conversion.
    """
    try:
        place = plan.ledger if plan.ledger.exists() else plan.manifest
        lines, _ = parse(place.read_bytes(), 0)
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        raise unusable(plan.manifest, f"cannot be read ({error.strerror})", "check the permissions") from None
    if not lines:
        return {}, {}
    check_same(plan, lines, first_line(header))
    records = RecordFolder(plan.ledger)
    found = {index: records.read(SHARD, index) for index in records.indices(SHARD)}
    recorded = {**{index: line for index, line in found.items() if line}, **dict(enumerate(lines[1:]))}
    return lines[0], {index: recorded[index] for index in sorted(recorded)}


def first_line(header: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a conversion before its calibration."""
    return {"manifest": KIND, "version": VERSION, **header}


def parse(content: bytes, start: int) -> tuple[list[dict[str, Any]], int]:
    """The complete lines up to the first that is not a JSON object, and where they end, counted from ``start``."""
    lines: list[dict[str, Any]] = []
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
        start += len(text)
    return lines, start


def differing(header: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of a first line that are not the wanted ones: stored and wanted."""
    keys = [*wanted, *(key for key in header if key not in wanted and key != CALIBRATED)]
    pairs = {key: (header.get(key), wanted.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def check_same(plan: Plan, lines: list[dict[str, Any]], wanted: Mapping[str, Any]) -> None:
    """Raise the DataError that names the first difference to the conversion with this plan and first line."""
    for key, (stored, ours) in differing(lines[0], wanted).items():
        raise refusal(plan, key.replace("_", " "), stored, ours)
    for line, target in zip(lines[1:], plan.targets, strict=False):
        if line.get("shard") != target.name:
            raise refusal(plan, "shard", line.get("shard"), target.name)


def refusal(plan: Plan, what: str, stored: Any, wanted: Any) -> DataError:
    """The error of a manifest that belongs to another conversion."""
    return unusable(plan.manifest, f"was started with {what} {stored}, now it is {wanted}", START_OVER)


def fits(plan: Plan, index: int, line: Mapping[str, Any]) -> bool:
    """Whether a line is that of a shard which is in place with the recorded size."""
    if index >= len(plan.targets) or line.get("shard") != plan.targets[index].name:
        return False
    path = plan.targets[index].path
    return path.is_file() and path.stat().st_size == line.get("bytes")
