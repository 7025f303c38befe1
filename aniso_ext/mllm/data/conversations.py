"""Conversations of the LLaVA kind and plain captions, from files that are streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aniso_ext.errors import DataError
from aniso_ext.mllm.data.json_lines import read_json_lines

IMAGE = "<image>"
CAPTION_PROMPT = "Describe the image."
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        id: of the sample.
        embedding: id of its embedding.
        messages: turns as chat templates take them; ``<image>`` is once in the first turn of the user.
    """

    id: str
    embedding: str
    messages: tuple[dict[str, str], ...]


def read_conversations(source: Any) -> Iterator[Conversation]:
    """Samples in the order of the file.

    Args:
        source: a ``.jsonl`` file, which is streamed; a ``.json`` file with a list; or an iterable of such records:
            {"id", "conversations": [{"from": "human" or "gpt", "value"}, ...]}, with "image" or "embedding" where the
            id of the embedding is another, or {"id", "caption"}.

    Raises:
        DataError: a record that cannot be used; the message names it and says what to do.

    Example:
        >>> next(read_conversations([{"id": "7", "caption": "a red circle"}])).messages[0]["content"]
        '<image>\\nDescribe the image.'
    """
    for place, record in _records(source):
        yield _conversation(record, place)


def _records(source: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, (str, os.PathLike)):
        yield from _listed(source, "conversations")
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path} is not a file: pass a .jsonl or .json file of conversations or captions")
    if path.suffix != ".json":
        yield from ((f"{path}: line {number}", record) for number, record in read_json_lines(path))
        return
    try:
        listed = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}): JSON lines have the suffix .jsonl") from None
    if not isinstance(listed, list):
        raise DataError(f"{path} is not a list of conversations: write [{{\"id\": ..., ...}}, ...]")
    yield from _listed(listed, str(path))


def _listed(records: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records, 1):
        yield f"{name}: record {number}", record


def _conversation(record: Any, place: str) -> Conversation:
    if not isinstance(record, Mapping) or "id" not in record:
        raise DataError(f"{place} has no id: each sample needs one, to find its embedding")
    name = str(record["id"])
    where = f"sample {name!r} ({place})"
    if "caption" in record and "conversations" not in record:
        turns: Any = [{"from": "human", "value": CAPTION_PROMPT}, {"from": "gpt", "value": record["caption"]}]
    else:
        turns = record.get("conversations")
    embedding = record.get("embedding", record.get("image", name))
    return Conversation(name, str(embedding), tuple(_with_image(_messages(turns, where), where)))


def _messages(turns: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} has no turns: write \"conversations\": [...] or \"caption\": \"...\"")
    messages = []
    for number, turn in enumerate(turns, 1):
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        if role is None or not isinstance(turn.get("value"), str):
            known = ", ".join(sorted(_ROLES))
            raise DataError(f'{where}: turn {number} must be {{"from": one of {known}, "value": text}}')
        if not turn["value"].strip() and role != "system":
            raise DataError(f"{where}: turn {number} is empty: write a text or remove the sample")
        messages.append({"role": role, "content": turn["value"]})
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise DataError(f"{where} has no turn of the user: the image stands there")
    if roles[-1] != "assistant":
        raise DataError(f"{where} does not end with a turn of the assistant: there would be nothing to learn from")
    return messages


def _with_image(messages: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    first = next(message for message in messages if message["role"] == "user")
    count = sum(message["content"].count(IMAGE) for message in messages)
    if count == 0:
        first["content"] = f"{IMAGE}\n{first['content']}"
    elif count > 1 or IMAGE not in first["content"]:
        raise DataError(
            f"{where} has {IMAGE} {count} time(s), not once in its first turn of the user: a sample has one embedding"
        )
    return messages
