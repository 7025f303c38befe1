"""A world on disk, in the formats that fitting, training and evaluation read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aniso_ext.data import write_clip_retrieval
from aniso_ext.data.whole_file import replace_file
from aniso_ext.errors import InputError
from aniso_ext.worlds.shapes.questions import CAPTION_PROMPT, KINDS
from aniso_ext.worlds.shapes.scenes import MOST_ITEMS, Scene
from aniso_ext.worlds.shapes.world import ShapesWorld

if TYPE_CHECKING:
    from aniso_ext.worlds.shapes.dual_encoder import DualEncoder, DualEncoderOptions

IMAGE_TOKEN = "<image>"
_TRAINED_KINDS = ("attribute", "yes_no")


def build_world(
    folder: str | Path,
    *,
    seed: int = 0,
    train_texts: int = 6_000,
    train_images: int = 6_000,
    held_out: int = 1_000,
    questions_each: int = 2,
    pictures: int = 16,
    most_items: int = MOST_ITEMS,
    kinds: Sequence[str] = KINDS,
    attributes: Sequence[str] | None = None,
    encoder: DualEncoder | None = None,
    options: DualEncoderOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train an encoder and write a whole world with it.

    ``encoder/`` is an open_clip folder. ``train_text/`` has ``text_emb/``, ``train_image/`` has ``img_emb/`` of *other*
    scenes, ``test/`` has both of the same scenes, row by row. Each has ``metadata/`` (id, caption), ``encoder.json``
    and ``captions.jsonl``; the training folders have ``conversations.jsonl``, ``test/`` has ``questions.jsonl`` and
    ``pictures/``.

    Args:
        folder: new or empty.
        seed: of the scenes and of the encoder.
        train_texts, train_images, held_out: scenes of each split.
        questions_each: questions of each kind about a scene, in conversations and in questions.
        pictures: held-out scenes whose pictures are written as PNG, the first ones.
        most_items: of a scene.
        kinds, attributes: what is asked; conversations have a caption and of the kinds those with an answer in words.
        encoder: one that is trained already.
        options: of the training otherwise.
        progress: called with (step, steps) of the training.

    Returns:
        The content of ``world.json``: seed, sizes, encoder, and held-out retrieval and centroid gap.

    Raises:
        InputError: the folder has something in it.
    """
    from dataclasses import replace

    from aniso_ext.worlds.shapes.dual_encoder import DualEncoderOptions

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: name a new one")
    world = ShapesWorld(seed=seed, most_items=most_items)
    asked = {"each": questions_each, "attributes": attributes}
    chosen = options or replace(DualEncoderOptions(), seed=seed)
    trained = encoder or world.train_dual_encoder(options=chosen, progress=progress)
    trained.save(folder / "encoder")
    record = trained.record()
    found: dict[str, np.ndarray] = {}
    for split, count, sides in (
        ("train_text", train_texts, ("text",)),
        ("train_image", train_images, ("image",)),
        ("test", held_out, ("text", "image")),
    ):
        scenes = world.scenes(count, split=split)
        rows = {side: _embed(world, trained, scenes, side) for side in sides}
        _write_split(folder / split, world, scenes, rows)
        record.write(folder / split)
        found = rows
        if split == "test":
            _write_lines(folder / split / "questions.jsonl", _asked(world, scenes, {**asked, "kinds": kinds}))
            _write_pictures(folder / split / "pictures", world, scenes[:pictures])
        else:
            trained_kinds = [kind for kind in _TRAINED_KINDS if kind in kinds]
            lines = _conversations(world, scenes, {**asked, "kinds": trained_kinds})
            _write_lines(folder / split / "conversations.jsonl", lines)
    summary = {
        "seed": seed,
        "train_texts": train_texts,
        "train_images": train_images,
        "held_out": held_out,
        "questions_each": questions_each,
        "most_items": most_items,
        "encoder": record.name,
        "training": asdict(chosen) if encoder is None else None,
        **retrieval(found["text"], found["image"]),
    }
    replace_file(folder / "world.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def retrieval(texts: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Recall of the own image at 1 and 10 among all, and the distance of the two centroids."""
    similarity = texts @ images.T
    ranks = (similarity > np.diag(similarity)[:, None]).sum(axis=1)
    return {
        "recall_at_1": float((ranks < 1).mean()),
        "recall_at_10": float((ranks < 10).mean()),
        "g_mu": float(np.linalg.norm(texts.mean(axis=0) - images.mean(axis=0))),
    }


def conversation(scene: Scene, number: int, question: str, answer: str) -> dict[str, Any]:
    """One turn about a scene in LLaVA's form; several about one scene share its embedding."""
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"{scene.id}_{number}", "embedding": scene.id, "conversations": turns}


def _embed(world: ShapesWorld, encoder: DualEncoder, scenes: Sequence[Scene], side: str) -> np.ndarray:
    return world.embed_texts(encoder, scenes) if side == "text" else world.embed_images(encoder, scenes)


def _write_split(folder: Path, world: ShapesWorld, scenes: Sequence[Scene], rows: Mapping[str, np.ndarray]) -> None:
    ids, captions = [scene.id for scene in scenes], [world.captions(scene)[0] for scene in scenes]
    write_clip_retrieval(
        folder, image=rows.get("image"), text=rows.get("text"), metadata={"id": ids, "caption": captions}
    )
    lines = ({"id": id, "caption": caption} for id, caption in zip(ids, captions, strict=True))
    _write_lines(folder / "captions.jsonl", lines)


def _conversations(
    world: ShapesWorld, scenes: Sequence[Scene], options: Mapping[str, Any]
) -> Iterable[dict[str, Any]]:
    for scene in scenes:
        asked = world.questions(scene, **options)
        pairs = [(CAPTION_PROMPT, world.captions(scene)[0])]
        pairs += [(question["question"], question["answer"]) for question in asked]
        for number, (question, answer) in enumerate(pairs):
            yield conversation(scene, number, question, answer)


def _asked(world: ShapesWorld, scenes: Sequence[Scene], options: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for scene in scenes:
        yield from world.questions(scene, **options)


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _write_pictures(folder: Path, world: ShapesWorld, scenes: Sequence[Scene]) -> None:
    from PIL import Image

    folder.mkdir()
    for scene in scenes:
        Image.fromarray(world.render(scene)).save(folder / f"{scene.id}.png")
