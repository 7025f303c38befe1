"""Reports as plain JSON values and back, by their annotations."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from aniso_ext.errors import DataError

Record = TypeVar("Record")
JSON_NAME = "report.json"


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, texts and numbers of a report; a number that is not finite becomes None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return to_plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: type[Record], value: Any, place: str = "") -> Record:
    """The dataclass that :func:`to_plain` was given.

    Raises:
        DataError: a field is missing or is of another kind; the message has its place.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{place or kind.__name__} must be an object, got {_short(value)}: write the report again")
    hints = _hints(cast("Any", kind))
    found = {}
    for name, hint in hints.items():
        if name in value:
            found[name] = _read(hint, value[name], f"{place}.{name}" if place else name)
    try:
        return kind(**found)
    except TypeError:
        missing = ", ".join(name for name in hints if name not in value)
        raise DataError(f"{place or kind.__name__} lacks {missing}: write the report again") from None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _read(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _read(next(one for one in arguments if one is not type(None)), value, place)
    if is_dataclass(hint):
        return from_plain(hint, value, place)  # type: ignore[arg-type]
    if hint is Any:
        return value
    try:
        return _read_value(hint, origin, arguments, value, place)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place} cannot be {_short(value)}: write the report again") from None


def _read_value(hint: Any, origin: Any, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
    if hint is float:
        if isinstance(value, (str, bool)):
            raise ValueError
        return math.nan if value is None else float(value)
    if hint in (int, str, bool):
        if type(value) is not hint:
            raise ValueError
        return value
    if hint is np.ndarray or origin is np.ndarray:
        array = np.array(value)
        return array.astype(float) if array.dtype == object else array
    if hasattr(hint, "_fields"):
        named = get_type_hints(hint)
        return hint(*(_read(named[name], item, place) for name, item in zip(hint._fields, value, strict=True)))
    if origin is tuple:
        kinds = arguments if arguments[-1] is not ... else (arguments[0],) * len(value)
        return tuple(_read(one, item, f"{place}[{i}]") for i, (one, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is list:
        return [_read(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    key_kind, item_kind = arguments
    return {key_kind(key): _read(item_kind, item, f"{place}[{key}]") for key, item in value.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(source: str | PathLike[str], build: Callable[[Mapping[str, Any]], Record]) -> Record:
    """What ``build`` makes of the text of a JSON object, of a file, or of the ``report.json`` in a folder.

    Raises:
        DataError: it is not there, is no JSON object, or ``build`` refuses it; the message names the file.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return build(_parse(source, "the text"))
    path = Path(source)
    path = path / JSON_NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: is not there: give a folder that aniso diagnose wrote, or its {JSON_NAME}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}): check the file and its permissions") from None
    try:
        return build(_parse(text, "it"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _parse(text: str, what: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is no JSON ({error}): measure again") from None
    if not isinstance(value, Mapping):
        raise DataError(f"{what} is no JSON object: measure again")
    return value
