"""Questions about embeddings, from JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aniso_ext.errors import DataError
from aniso_ext.mllm.data.conversations import CAPTION_PROMPT
from aniso_ext.mllm.data.json_lines import read_json_lines

KINDS = ("caption", "multiple_choice", "yes_no", "attribute")


@dataclass(frozen=True)
class Question:
    """One thing to ask about one embedding.

    Attributes:
        id: of the embedding.
        kind: ``caption``, ``multiple_choice``, ``yes_no`` or ``attribute``.
        question: what the user says; ``<image>`` is put before it.
        answer: the right one; empty for captions.
        choices: of a multiple choice, or of an attribute whose values are known.
        references: captions by people.
        attribute: which one is asked for.
    """

    id: str
    kind: str
    question: str
    answer: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    attribute: str = ""


def read_questions(source: Any) -> list[Question]:
    """Questions from a JSONL file, or from an iterable of such records.

    A record has {"id", "kind"}; "question" (of captions "Describe the image."); "answer", or for captions "references";
    for multiple choice "choices" with the answer among them; for attributes "attribute", and "choices" if it has any.

    Raises:
        DataError: a record that cannot be used; the message names it and says what to do.

    Example:
        >>> read_questions([{"id": "7", "kind": "yes_no", "question": "Is it red?", "answer": "yes"}])[0].answer
        'yes'
    """
    questions = [_question(record, place) for place, record in _records(source)]
    if not questions:
        raise DataError("there are no questions: the file is empty")
    return questions


def _records(source: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise DataError(f"{path} is not a file: pass a .jsonl file of questions")
        return ((f"{path}: line {number}", record) for number, record in read_json_lines(path))
    return ((f"question {number}", record) for number, record in enumerate(source, 1))


def _question(record: Any, place: str) -> Question:
    if not isinstance(record, Mapping) or "id" not in record:
        raise DataError(f"{place} has no id: each question needs one, to find its embedding")
    name = f"{place} (id {record['id']!r})"
    kind = record.get("kind")
    if kind not in KINDS:
        raise DataError(f"{name} has the kind {kind!r}: choose {', '.join(KINDS)}")
    for listed in ("choices", "references"):
        if not isinstance(record.get(listed) or [], (list, tuple)):
            raise DataError(f"{name} has {listed} {record[listed]!r}: write a list of texts")
    question = Question(
        id=str(record["id"]),
        kind=str(kind),
        question=_text(record, "question") or (CAPTION_PROMPT if kind == "caption" else ""),
        answer=_text(record, "answer"),
        choices=tuple(map(str, record.get("choices") or ())),
        references=tuple(map(str, record.get("references") or ())),
        attribute=_text(record, "attribute"),
    )
    missing = _missing(question)
    if missing:
        raise DataError(f"{name} {missing}")
    return question


def _text(record: Mapping[str, Any], name: str) -> str:
    """An entry as a text; true and false as yes and no."""
    value = record.get(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _missing(question: Question) -> str | None:
    if not question.question:
        return "asks nothing: give it a question"
    if question.kind == "caption":
        return None if question.references else "has no references: captions are judged by those of people"
    if not question.answer:
        return "has no answer: give the right one"
    if question.kind == "yes_no" and question.answer.lower() not in ("yes", "no"):
        return f"has the answer {question.answer!r}: yes or no is due"
    if question.kind == "multiple_choice" and not question.choices:
        return "has no choices: list them"
    if len(set(question.choices)) != len(question.choices):
        return f"has a choice twice, {', '.join(question.choices)}: list each once"
    if question.choices and question.answer not in question.choices:
        return f"has the answer {question.answer!r}, which is none of its choices"
    if question.kind == "attribute" and not question.attribute:
        return "does not say which attribute it asks for"
    return None
