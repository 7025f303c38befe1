"""The shapes of ``aniso demo``: pictures, an encoder, its gap, stand-ins, and language models trained on text alone."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.cli.console import Result, output, progress_bar, say
from aniso_ext.cli.demo_gap import small_stages
from aniso_ext.cli.demo_story import MARK, show_ladder, verdicts, write_ladder
from aniso_ext.cli.report import alignment_table, judge, without_energy_curve
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.mllm.arms import Arm, Ladder, LadderData

FOLDER = Path("demo_output")
ARMS_SHOWN = (
    "blind",
    "identity",
    "identity-neighbours",
    "noise",
    "mean_shift",
    "realign",
    "initialisation",
    "anisoalign",
    "anisoalign-neighbours",
    "images",
)
ATTRIBUTES = ("background", "count", "colour", "size", "texture")
"""What the pictures' embeddings show; shapes and directions are too fine for so small an encoder."""
KINDS = ("caption", "attribute", "multiple_choice")
_MOST_ITEMS, _QUESTIONS_EACH, _RANK = 2, 3, 32
_PROJECTOR_GAIN = 6.0
"""How much a shift of the embeddings harms a model that was trained without it: next to nothing with a gain of 1, see
docs/shapes.md."""
_MOST_JOBS = 8
_PARTS = ("world", "bound", "stand_ins", "ladder", "README.md", "ladder.csv", "ladder.png")


def default_jobs() -> int:
    """A language model for each core, within reason."""
    return min(_MOST_JOBS, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class ShapesDemo:
    """Sizes of the demo.

    Attributes:
        folder: for all that is made.
        seed: of the world, the encoder and the fits.
        scenes: to learn from, by text and as many others by picture; a tenth of them, 200 at most, for validation.
        encoder_steps, steps: of the dual encoder and of each language model.
        seeds: language models of each arm.
        arms: by name.
        jobs: language models at a time.
    """

    folder: Path = FOLDER
    seed: int = 0
    scenes: int = 3_000
    encoder_steps: int = 600
    steps: int = 400
    seeds: int = 3
    arms: tuple[str, ...] = ARMS_SHOWN
    jobs: int = field(default_factory=default_jobs)

    @property
    def validation(self) -> int:
        return min(200, self.scenes // 10)

    @property
    def test(self) -> int:
        """Pairs that methods are judged on."""
        return min(1_000, self.scenes // 3)

    @property
    def asked(self) -> int:
        """Of them, those that language models are judged on."""
        return min(300, self.test)


def shapes_demo(demo: ShapesDemo) -> Result:
    """Run the whole story, saying what happens on the way."""
    from aniso_ext.mllm.arms import choose_arms
    from aniso_ext.mllm.library import say_errors_alone

    say_errors_alone()
    arms = choose_arms(demo.arms)
    started = time.perf_counter()
    _make_room(demo.folder)
    console = output()
    with one_thread():
        world = build(demo, console)
        gap = _gap(demo, console)
        methods = fit(demo, arms, console)
        ladder = train_arms(demo, arms, console)
    judged = verdicts(ladder)
    data = {
        "command": "demo",
        "world": "shapes",
        "seed": demo.seed,
        "built": world,
        "gap": gap,
        "methods": methods,
        "scores": ladder.scores,
        "chosen": ladder.chosen,
        "margins": judged,
        "seconds": round(time.perf_counter() - started, 1),
        "out": str(demo.folder),
    }
    write_ladder(demo, ladder, judged, data)

    def show(console: Console) -> None:
        show_ladder(demo, ladder, judged, console)

    return Result(data, show)


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small gain little from a second thread, and on busy cores the two spend minutes on waiting."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _make_room(folder: Path) -> None:
    """An empty place; what an earlier demo left there is replaced, other files are never touched."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise InputError(f"{folder} is not empty and not of an earlier demo: name a new folder with --out")
    for name in _PARTS:
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("{}\n", encoding="utf-8")


@contextmanager
def _timed(console: Console, number: int, title: str) -> Iterator[None]:
    say(console, f"[{number}/5] {title}")
    started = time.perf_counter()
    yield
    say(console, f"      {time.perf_counter() - started:.0f} s\n")


def build(demo: ShapesDemo, console: Console) -> dict[str, Any]:
    """World and encoder, and the pictures of the training scenes, which only validation and the bound read."""
    import numpy as np

    from aniso_ext.worlds.shapes import DualEncoder, DualEncoderOptions, ShapesWorld, build_world

    # small batches and the temperature at which CLIP ends leave each modality in a narrow cone, as in large encoders
    options = DualEncoderOptions(
        text_width=64,
        context_length=32,
        steps=demo.encoder_steps,
        batch_rows=16,
        learning_rate=1.5e-3,
        logit_scale=100.0,
        seed=demo.seed,
    )
    folder = demo.folder / "world"
    with _timed(console, 1, "A world: pictures of one or two shapes, captions, questions, and a dual encoder"):
        with progress_bar("encoder") as update:
            found = build_world(
                folder,
                seed=demo.seed,
                train_texts=demo.scenes,
                train_images=demo.scenes,
                held_out=demo.test,
                questions_each=_QUESTIONS_EACH,
                most_items=_MOST_ITEMS,
                kinds=KINDS,
                attributes=ATTRIBUTES,
                options=options,
                progress=update,
            )
        world = ShapesWorld(seed=demo.seed, most_items=_MOST_ITEMS)
        scenes = world.scenes(demo.scenes, split="train_text")
        pictures = world.embed_images(DualEncoder.load(folder / "encoder"), scenes)
        (demo.folder / "bound").mkdir()
        np.save(demo.folder / "bound" / "img_emb.npy", pictures)
        scene = world.scenes(1, split="test")[0]
        question = world.questions(scene, kinds=("attribute",), attributes=ATTRIBUTES)[0]
        for line in (
            f"{demo.scenes:,} scenes known by their texts, {demo.scenes:,} others by their pictures, {demo.test} pairs "
            "for the test",
            f"such as test/pictures/{scene.id}.png: {world.captions(scene)[0]}.",
            f"{question['question']} {question['answer']}.",
            f"encoder of open_clip's classes, {demo.encoder_steps} contrastive steps from random weights: of "
            f"{demo.test} pictures the own one is among the ten nearest to {found['recall_at_10']:.0%} of the captions",
        ):
            say(console, f"      {line}")
    return found


def _gap(demo: ShapesDemo, console: Console) -> dict[str, Any]:
    from aniso_ext import diagnostics

    test = demo.folder / "world" / "test"
    with _timed(console, 2, "The gap, which training put there by itself"):
        report = diagnostics.gap(test / "text_emb", test / "img_emb")
        for line in without_energy_curve(report).splitlines():
            say(console, f"      {line}")
    return dict(report.to_dict())


def fit(demo: ShapesDemo, arms: Sequence[Arm], console: Console) -> list[dict[str, Any]]:
    """Fit each method of the arms on texts and on pictures of other scenes; convert and judge the test texts."""
    from aniso_ext.align import make_aligner
    from aniso_ext.convert import convert_embeddings

    world, rows = demo.folder / "world", []
    test = world / "test"
    fitted = {arm.aligner: arm for arm in arms if arm.aligner is not None}
    with _timed(console, 3, "Stand-ins: fitted without pairs, converted from file to file, judged on the test pairs"):
        rows.append(judge("identity", test / "text_emb", test / "img_emb", test / "text_emb", k=20, seed=demo.seed))
        with progress_bar("methods") as update:
            for done, (key, arm) in enumerate(fitted.items()):
                update(done, len(fitted))
                assert arm.method is not None
                aligner = make_aligner(arm.method, **arm.options)
                given = {"rank": _RANK, "seed": demo.seed, **small_stages()}
                known = aligner.parameter_names()
                aligner.set_params(**{name: value for name, value in given.items() if name in known})
                aligner.fit(world / "train_text" / "text_emb", world / "train_image" / "img_emb")
                aligner.save_pretrained(demo.folder / "ladder" / "aligners" / key)
                name = arm.name.removesuffix("-neighbours")
                place = demo.folder / "stand_ins" / name
                convert_embeddings(aligner, test / "text_emb", place)
                rows.append(judge(name, test / "text_emb", test / "img_emb", place, k=20, seed=demo.seed))
        console.print(alignment_table(rows))
    return rows


def train_arms(demo: ShapesDemo, arms: Sequence[Arm], console: Console) -> Ladder:
    from aniso_ext.mllm import TrainOptions
    from aniso_ext.mllm.arms import LadderModel, run_ladder

    options = TrainOptions(
        stages=("full",),
        learning_rate=4e-3,
        warmup=0.05,
        max_steps=demo.steps,
        global_batch=32,
        device_batch=32,
        packing=True,
        max_length=64,
        on_long="truncate",
        log_every=20,
        save_every=10**6,
        device="cpu",
    )
    count = len(arms) + (demo.seeds - 1) * len({arm.tuned or arm.name for arm in arms})
    title = f"Language models: {count} runs of the same small Llama, each from random weights, {demo.jobs} at a time"
    with _timed(console, 4, title):
        say(
            console,
            "      each learns captions and answers, with a token for the embedding of a text; only the arm images",
        )
        say(console, "      learns from pictures of the same scenes; all are judged on embeddings of pictures")
        with progress_bar("language models") as update:
            return run_ladder(
                _ladder_data(demo),
                arms,
                output=demo.folder / "ladder",
                model=LadderModel(size="tiny", vocab_size=600, initializer_range=0.08, projector_gain=_PROJECTOR_GAIN),
                options=options,
                seeds=range(demo.seeds),
                tuning_seeds=1,
                jobs=demo.jobs,
                max_new_tokens=32,
                progress=lambda done, total, name: update(done, total),
            )


def _ladder_data(demo: ShapesDemo) -> LadderData:
    """Conversations without the validation scenes, whose questions choose the level of noise."""
    from aniso_ext.mllm.arms import LadderData
    from aniso_ext.worlds.shapes import ShapesWorld

    train, test, own = demo.folder / "world" / "train_text", demo.folder / "world" / "test", demo.folder / "ladder"
    world = ShapesWorld(seed=demo.seed, most_items=_MOST_ITEMS)
    kept = world.scenes(demo.validation, split="train_text")
    names = {scene.id for scene in kept}
    lines = (train / "conversations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    trained = [line for line in lines if json.loads(line)["embedding"] not in names]
    asked = [one for scene in kept for one in world.questions(scene, kinds=KINDS, each=1, attributes=ATTRIBUTES)]
    own.mkdir(exist_ok=True)
    shown = {scene.id for scene in world.scenes(demo.asked, split="test")}
    lines = (test / "questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (own / "questions.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["id"] in shown), encoding="utf-8"
    )
    (own / "conversations.jsonl").write_text("".join(trained), encoding="utf-8")
    (own / "validation.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    return LadderData(
        source=str(train / "text_emb"),
        target=str(demo.folder / "bound" / "img_emb.npy"),
        ids=str(train / "captions.jsonl"),
        conversations=str(own / "conversations.jsonl"),
        test=str(test / "img_emb"),
        test_ids=str(test / "captions.jsonl"),
        questions=str(own / "questions.jsonl"),
        validation_questions=str(own / "validation.jsonl"),
        unpaired=str(demo.folder / "world" / "train_image" / "img_emb"),
    )
