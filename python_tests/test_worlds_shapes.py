"""The shapes world: pictures show the facts, captions and answers are true, files are what training reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from aniso_ext.data import EncoderRecord, open_embeddings, read_metadata
from aniso_ext.errors import InputError
from aniso_ext.worlds.shapes import DualEncoderOptions, Scene, ShapesWorld, build_world
from aniso_ext.worlds.shapes.questions import KINDS
from aniso_ext.worlds.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Item
from aniso_ext.worlds.shapes.world import SPLITS

WORLD = ShapesWorld(seed=5)
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
RGB = {
    "red": (214, 39, 40), "orange": (255, 140, 20), "yellow": (245, 222, 50), "green": (44, 150, 60),
    "cyan": (60, 205, 215), "blue": (40, 70, 205), "purple": (130, 50, 170), "pink": (245, 130, 190),
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return WORLD.scenes(600, split="test")


def singular(noun: str) -> str:
    return (
        noun.removesuffix("es") if noun.endswith("crosses") else noun.removesuffix("s") if noun[-2:] != "ss" else noun
    )


def items_of(scene: Scene, noun: str) -> list[Item]:
    """The items that a noun such as "red rings", "ring" or "red items" speaks of."""
    words = singular(noun).split()
    return [item for item in scene.items if all(word in (item.kind.colour, item.kind.shape, "item") for word in words)]


def middle(items: list[Item]) -> tuple[float, float]:
    return sum(item.row for item in items) / len(items), sum(item.column for item in items) / len(items)


def holds(first: list[Item], where: str, second: list[Item]) -> bool:
    """In that direction, and not 0.7 times as far across it."""
    (y, x), (v, u) = middle(first), middle(second)
    if where in ("above", "below"):
        across, along = abs(x - u), abs(y - v)
    else:
        across, along = abs(y - v), abs(x - u)
    if across > 0.7 * along:
        return False
    return {"above": y < v, "below": y > v, "left of": x < u, "right of": x > u}[where]


def test_a_scene_depends_on_seed_split_and_number_alone() -> None:
    later = WORLD.scenes(3, split="test", start=4)
    assert later == WORLD.scenes(7, split="test")[4:]
    assert np.array_equal(WORLD.render(later[0]), WORLD.render(WORLD.scenes(1, split="test", start=4)[0]))
    drawn = {split: [scene.items for scene in WORLD.scenes(50, split=split)] for split in SPLITS}
    drawn["other seed"] = [scene.items for scene in ShapesWorld(seed=6).scenes(50, split="test")]
    assert len({repr(items) for items in drawn.values()}) == len(drawn)
    with pytest.raises(InputError, match="split must be one of"):
        WORLD.scenes(1, split="nowhere")


def test_scenes_are_varied_and_their_items_are_apart(scenes: list[Scene]) -> None:
    counts = Counter(len(scene.items) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 600 / 4 - 5 * np.sqrt(600 * 3 / 16)
    assert {item.kind.shape for scene in scenes for item in scene.items} == set(SHAPES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    for scene in scenes:
        assert len({(item.row, item.column) for item in scene.items}) == len(scene.items)
        kinds = {item.kind for item in scene.items}
        assert len({(kind.shape, kind.colour) for kind in kinds}) == len(kinds)


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """Pixels of each 4-connected region."""
    left, found = {tuple(pixel) for pixel in np.argwhere(mask).tolist()}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            row, column = stack.pop()
            region.append((row, column))
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(np.array(region))
    return found


def nearest_colour(pixels: np.ndarray) -> str:
    """The name of the most saturated pixel under a light that may be 15 % weaker or 10 % stronger."""
    pixel = pixels[np.argmax(pixels.max(axis=1) - pixels.min(axis=1))]
    lights = np.linspace(0.85, 1.1, 26)[:, None]
    return min(RGB, key=lambda name: np.linalg.norm(np.clip(lights * RGB[name], 0, 255) - pixel, axis=1).min())


def test_pictures_show_as_many_regions_as_items_with_their_colours_in_their_cells(scenes: list[Scene]) -> None:
    looked_at = 0
    for scene in scenes:
        if scene.background not in ("black", "white") or any(item.kind.texture != "plain" for item in scene.items):
            continue
        looked_at += 1
        picture = WORLD.render(scene).astype(float)
        # the background is as good as grey, whatever its light; every colour has channels at least 60 apart
        coloured = picture.max(axis=2) - picture.min(axis=2) > 45
        found = regions(coloured)
        assert len(found) == len(scene.items), scene
        seen = Counter()
        for region in found:
            row, column = region.mean(axis=0) // (64 / 3)
            seen[(int(row), int(column), nearest_colour(picture[tuple(region.T)]))] += 1
        assert seen == Counter((item.row, item.column, item.kind.colour) for item in scene.items), scene
    assert looked_at > 30


def test_size_and_texture_change_the_picture_as_they_should() -> None:
    areas: dict[str, list[int]] = {"small": [], "large": []}
    for scene in WORLD.scenes(400, split="train_image"):
        (item, *others) = scene.items
        if not others and scene.background == "white" and item.kind.shape == "square":
            picture = WORLD.render(scene).astype(int)
            areas[item.kind.size].append(int((picture.max(axis=2) - picture.min(axis=2) > 25).sum()))
    assert max(areas["small"]) < min(areas["large"])
    assert {picture.shape for picture in (ShapesWorld(size=96).render(scene) for scene in WORLD.scenes(3))} == {
        (96, 96, 3)
    }


def test_captions_name_every_item_and_no_other(scenes: list[Scene]) -> None:
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    phrase = rf"\b(an?|two|three|four) (small|large) (?:(striped|dotted) )?({colour}) ({shape})(?:s|es)?\b"
    varied = 0
    for scene in scenes:
        captions = WORLD.captions(scene, 5)
        assert captions[0] == WORLD.captions(scene)[0]
        assert len(set(captions)) == len(captions)
        varied += len(captions) == 5
        said = Counter((item.kind.size, item.kind.texture, item.kind.colour, item.kind.shape) for item in scene.items)
        for caption in captions:
            heard = Counter()
            for number, size, texture, hue, form in re.findall(phrase, caption):
                heard[(size, texture or "plain", hue, form)] += NUMBERS[number]
            assert heard == said, caption
            assert re.search(rf"(on|against) (a )?{scene.background}\b", caption), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption
            for where in ("above", "below", "left of", "right of"):
                if f" {where} " in caption:
                    before, after = caption.split(f" {where} ")
                    nouns = [re.search(rf"({colour}) ({shape})", part) for part in (before, after)]
                    assert holds(*(items_of(scene, nouns[0][0]), where, items_of(scene, nouns[1][0])))  # type: ignore[index]
    assert varied > len(scenes) / 2


def truth(scene: Scene, question: str) -> str:
    """The answer from the items alone."""
    if question == "What colour is the background?":
        return scene.background
    if question == "How many shapes are there?":
        return ["one", "two", "three", "four"][len(scene.items) - 1]
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        return ["one", "two", "three", "four"][len(items_of(scene, found[1])) - 1]
    if found := re.fullmatch(r"What (colour|shape|size) (?:is|are) the (.+)\?", question):
        (answer,) = {getattr(item.kind, found[1]) for item in items_of(scene, found[2])}
        return answer
    if found := re.fullmatch(r"What texture (?:does|do) the (.+) have\?", question):
        (answer,) = {item.kind.texture for item in items_of(scene, found[1])}
        return answer
    if found := re.fullmatch(r"Where (?:is|are) the (.+), seen from the (.+)\?", question):
        first, second = items_of(scene, found[1]), items_of(scene, found[2])
        (answer,) = (where for where in ("above", "below", "left of", "right of") if holds(first, where, second))
        return answer
    if found := re.fullmatch(r"Is there an? (.+)\?", question):
        return "yes" if items_of(scene, found[1]) else "no"
    found = re.fullmatch(r"(?:Is|Are) the (.+) (above|below|left of|right of) the (.+)\?", question)
    assert found, question
    return "yes" if holds(items_of(scene, found[1]), found[2], items_of(scene, found[3])) else "no"


def asked(scenes: list[Scene], kind: str) -> Iterator[tuple[Scene, dict]]:
    for scene in scenes:
        for question in WORLD.questions(scene, kinds=(kind,), each=3):
            assert question["id"] == scene.id and question["kind"] == kind
            yield scene, question


@pytest.mark.parametrize("kind", ["attribute", "yes_no", "multiple_choice"])
def test_answers_are_what_the_items_say(scenes: list[Scene], kind: str) -> None:
    attributes = Counter()
    for scene, question in asked(scenes, kind):
        assert question["answer"] == truth(scene, question["question"]), question
        attributes[question["attribute"]] += 1
        if kind == "multiple_choice":
            assert question["answer"] in question["choices"]
            assert 2 <= len(set(question["choices"])) == len(question["choices"]) <= 4
    expected = {"relation", "existence"} if kind == "yes_no" else {
        "background", "count", "colour", "shape", "size", "texture", "relation"
    }  # fmt: skip
    assert set(attributes) == expected
    assert min(attributes.values()) > 20


def test_yes_and_no_are_equally_likely(scenes: list[Scene]) -> None:
    answers = [question["answer"] == "yes" for _, question in asked(scenes, "yes_no")]
    assert abs(np.mean(answers) - 0.5) < 5 * 0.5 / np.sqrt(len(answers))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("open_clip") is None:
        pytest.skip("needs the extra encode")
    folder = tmp_path_factory.mktemp("world") / "world"
    options = DualEncoderOptions(steps=2, batch_rows=16, width=32, text_width=32)
    build_world(folder, seed=3, train_texts=40, train_images=30, held_out=20, pictures=5, options=options)
    return folder


def test_a_built_world_holds_what_training_and_evaluation_read(built: Path) -> None:
    world = ShapesWorld(seed=3)
    sizes = {"train_text": 40, "train_image": 30, "test": 20}
    sides = {"train_text": ("text",), "train_image": ("image",), "test": ("text", "image")}
    for split, rows in sizes.items():
        scenes = world.scenes(rows, split=split)
        metadata = read_metadata(built / split, rows=rows)
        assert metadata.column("id").to_pylist() == [scene.id for scene in scenes]
        assert lines(built / split / "captions.jsonl") == metadata.to_pylist()
        for side in sides[split]:
            embeddings = open_embeddings(built / split, kind=side)
            assert (embeddings.rows, embeddings.width) == (rows, 32)
            assert np.abs(np.linalg.norm(embeddings.numpy(), axis=1) - 1).max() < 1e-5
        assert EncoderRecord.read(built / split / "encoder.json").width == 32
    records = {(built / split / "encoder.json").read_text() for split in sizes}
    assert len(records) == 1
    assert not {path.name for path in (built / "train_text").iterdir()} & {"img_emb", "questions.jsonl"}
    assert len(list((built / "test" / "pictures").iterdir())) == 5


def test_conversations_have_one_turn_an_id_of_their_own_and_the_embedding_of_their_scene(built: Path) -> None:
    for split in ("train_text", "train_image"):
        found = lines(built / split / "conversations.jsonl")
        ids = set(read_metadata(built / split).column("id").to_pylist())
        assert len({line["id"] for line in found}) == len(found)
        assert {line["embedding"] for line in found} == ids
        for line in found:
            human, answer = line["conversations"]
            assert (human["from"], answer["from"]) == ("human", "gpt")
            assert human["value"].startswith("<image>\n") and human["value"].count("<image>") == 1
            assert answer["value"]


def test_questions_are_about_held_out_scenes_and_of_every_kind(built: Path) -> None:
    found = lines(built / "test" / "questions.jsonl")
    assert {line["id"] for line in found} == set(read_metadata(built / "test").column("id").to_pylist())
    assert {line["kind"] for line in found} == set(KINDS)
    for line in found:
        assert (line["kind"] == "caption") == ("references" in line)
        assert (line["kind"] == "multiple_choice") == ("choices" in line)


def test_a_world_is_not_built_over_other_files(built: Path) -> None:
    with pytest.raises(InputError, match="not an empty folder"):
        build_world(built)
