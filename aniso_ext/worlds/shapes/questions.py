"""Questions about a scene with the answers that its facts give, in the format that evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aniso_ext.errors import InputError
from aniso_ext.worlds.shapes.grammar import NUMBERS, captions, counted, plural, relation
from aniso_ext.worlds.shapes.scenes import BACKGROUNDS, COLOURS, MOST_ITEMS, SHAPES, SIZES, TEXTURES, Group, Scene

KINDS = ("attribute", "yes_no", "multiple_choice", "caption")
CAPTION_PROMPT = "Describe the image."
_SALT_QUESTION = 3
_CHOICES = 4
_REFERENCES = 5

_VALUES: dict[str, Sequence[str]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "texture": TEXTURES,
    "background": BACKGROUNDS,
    "count": NUMBERS[1 : MOST_ITEMS + 1],
    "relation": ("above", "below", "left of", "right of"),
}
"""The answers that there can be, by attribute."""

Fact = tuple[str, str, str]
"""attribute, question, answer"""


def questions(
    scene: Scene, *, kinds: Sequence[str] = KINDS, each: int = 1, attributes: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """``each`` questions of each kind: dicts with id, kind, question, answer, and choices, attribute or references.

    An attribute question has one word for an answer; a multiple-choice question is one with up to four choices; yes and
    no are equally likely; the caption question has up to five references and is asked once. ``attributes`` are those
    that attribute and multiple-choice questions are about, all by default.
    """
    if unknown := sorted(set(attributes or ()) - set(_VALUES)):
        raise InputError(f"attributes must be some of {', '.join(_VALUES)}, got {unknown[0]!r}")
    random = scene.generator(_SALT_QUESTION)
    asked: list[dict[str, Any]] = []
    facts = [fact for fact in _facts(scene) if attributes is None or fact[0] in attributes]
    for kind in kinds:
        if kind == "caption":
            references = captions(scene, _REFERENCES)
            asked.append({"question": CAPTION_PROMPT, "answer": references[0], "references": references, "kind": kind})
        elif kind == "yes_no":
            asked += [_yes_no(scene, bool(random.integers(2)), random) for _ in range(each)]
        else:
            asked += [_from_fact(fact, kind, random) for fact in _some(facts, each, random)]
    return [{"id": scene.id, **question} for question in asked]


def _some(facts: Sequence[Fact], count: int, random: np.random.Generator) -> list[Fact]:
    """Facts of different attributes as far as there are any, so that no attribute crowds out the others."""
    chosen: list[Fact] = []
    left = list(facts)
    while left and len(chosen) < count:
        fresh = [fact for fact in left if fact[0] not in {other[0] for other in chosen}] or left
        attributes = sorted({fact[0] for fact in fresh})
        attribute = attributes[int(random.integers(len(attributes)))]
        candidates = [fact for fact in fresh if fact[0] == attribute]
        chosen.append(candidates[int(random.integers(len(candidates)))])
        left.remove(chosen[-1])
    return chosen


def _facts(scene: Scene) -> Iterator[Fact]:
    groups = scene.groups
    yield "background", "What colour is the background?", scene.background
    yield "count", "How many shapes are there?", NUMBERS[len(scene.items)]
    for group in groups:
        kind, many = group.kind, len(group.items) > 1
        be, the_kind = ("are" if many else "is"), _definite(group)
        if _unique(groups, "shape", kind.shape):
            yield "colour", f"What colour {be} the {plural(kind.shape) if many else kind.shape}?", kind.colour
        if _unique(groups, "colour", kind.colour):
            yield "shape", f"What shape {be} the {kind.colour} {'items' if many else 'item'}?", kind.shape
        yield "size", f"What size {be} the {the_kind}?", kind.size
        yield "texture", f"What texture {'do' if many else 'does'} the {the_kind} have?", kind.texture
        if many:
            yield "count", f"How many {plural(kind.name)} are there?", NUMBERS[len(group.items)]
    for first in groups:
        for second in groups:
            if first is not second and (where := relation(first, second)) is not None:
                be = "are" if len(first.items) > 1 else "is"
                question = f"Where {be} the {_definite(first)}, seen from the {_definite(second)}?"
                yield "relation", question, where


def _definite(group: Group) -> str:
    return plural(group.kind.name) if len(group.items) > 1 else group.kind.name


def _unique(groups: Sequence[Group], attribute: str, value: str) -> bool:
    return sum(getattr(group.kind, attribute) == value for group in groups) == 1


def _from_fact(fact: Fact, kind: str, random: np.random.Generator) -> dict[str, Any]:
    attribute, question, answer = fact
    asked = {"question": question, "answer": answer, "kind": kind, "attribute": attribute}
    if kind != "multiple_choice":
        return asked
    others = [value for value in _VALUES[attribute] if value != answer]
    wrong = random.permutation(others)[: _CHOICES - 1].tolist()
    return {**asked, "choices": random.permutation([answer, *wrong]).tolist()}


def _yes_no(scene: Scene, truth: bool, random: np.random.Generator) -> dict[str, Any]:
    group = scene.groups[int(random.integers(len(scene.groups)))]
    related = [other for other in scene.groups if other is not group and relation(group, other) is not None]
    if related and random.random() < 0.4:
        other = related[int(random.integers(len(related)))]
        first, second = (group, other) if truth else (other, group)
        be = "Are" if len(first.items) > 1 else "Is"
        question = f"{be} the {_definite(first)} {relation(group, other)} the {_definite(second)}?"
        attribute = "relation"
    else:
        kind = group.kind
        present = {other.kind.name for other in scene.groups}
        while not truth and kind.name in present:
            shape, colour = str(random.choice(SHAPES)), str(random.choice(COLOURS))
            kind = replace(kind, **({"shape": shape} if random.integers(2) else {"colour": colour}))
        question, attribute = f"Is there {counted(kind.name, 1)}?", "existence"
    return {"question": question, "answer": "yes" if truth else "no", "kind": "yes_no", "attribute": attribute}
