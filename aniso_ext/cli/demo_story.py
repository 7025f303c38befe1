"""How the demo on shapes ends: a table with what its lines mean, what it says, and where everything is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.cli.console import say, to_jsonable

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.cli.demo_shapes import ShapesDemo
    from aniso_ext.mllm.arms import Ladder

MARK = "demo.json"
SCORES = ("cider_d", "attribute", "multiple_choice")
_MEANING = {
    "blind": "sees nothing: what can be guessed from the question",
    "identity": "trained on text embeddings as they are",
    "noise": "trained on text embeddings with noise, its level chosen on validation scenes",
    "mean_shift": "trained on text embeddings moved by the distance of the two means",
    "realign": "moved, scaled and moved again",
    "initialisation": "AnisoAlign's closed form",
    "anisoalign": "AnisoAlign with its two trained stages",
    "identity-neighbours": "trained on the mean of the five embeddings of other pictures that are nearest to the text",
    "anisoalign-neighbours": "the same of AnisoAlign's stand-in",
    "images": "the bound: trained on embeddings of pictures, which the others never see",
}


def verdicts(ladder: Ladder) -> list[dict[str, Any]]:
    """For each method and score: its lead over the better of blind and identity, and the spread of that over seeds."""
    found = []
    for arm in ladder.scores:
        if arm in ("blind", "identity", "images"):
            continue
        for name in (name for name in SCORES if name in ladder.names):
            over = "blind" if ladder.mean("blind", name) > ladder.mean("identity", name) else "identity"
            margin, spread = ladder.margin(arm, over, name)
            share = ladder.recovered(arm, name)
            found.append(
                {"arm": arm, "score": name, "over": over, "margin": margin, "spread": spread, "recovered": share}
            )
    return found


def _sentences(judged: Sequence[Mapping[str, Any]], seeds: int) -> list[str]:
    """Each score in a line: which methods are clearly better than the floors, and which are not."""
    lines = []
    for name in dict.fromkeys(one["score"] for one in judged):
        own = [one for one in judged if one["score"] == name]
        clear = [one for one in own if one["margin"] > one["spread"]]
        others = [one for one in own if one not in clear]
        told = ", ".join(f"{one['arm']} {one['margin']:+.2f}" for one in clear) or "none"
        line = f"{name}: better than {own[0]['over']} by more than the spread over {seeds} seeds: {told}"
        if others:
            line += "; not: " + ", ".join(f"{one['arm']} {one['margin']:+.2f}" for one in others)
        lines.append(
            line
            if seeds > 1
            else f"{name}: one seed, no spread; "
            + ", ".join(f"{one['arm']} {one['margin']:+.2f} over {one['over']}" for one in own)
        )
    return lines


def _example(demo: ShapesDemo, ladder: Ladder) -> list[str]:
    """What some arms say of the first picture of the test."""
    lines: list[str] = []
    for arm in ("blind", "identity", "anisoalign", "images"):
        if arm in ladder.scores:
            place = demo.folder / "ladder" / ladder.chosen.get(arm, arm) / "seed-0" / "predictions.jsonl"
            texts = place.read_text(encoding="utf-8").splitlines()
            said = next(one for one in map(json.loads, texts) if one["kind"] == "caption")
            lines = lines or [f"world/test/pictures/{said['id']}.png: {said['references'][0]}"]
            lines.append(f"  {arm}: {said['prediction']}")
    return lines


def _legend(ladder: Ladder) -> list[tuple[str, str]]:
    lines = []
    for arm in ladder.scores:
        level = ladder.chosen.get(arm, arm)
        text = _MEANING.get(arm, f"trained on the stand-ins of {arm}")
        lines.append((arm, text if level == arm else f"{text}: {level}"))
    return lines


def next_commands(folder: Path, program: str) -> list[str]:
    """Commands that go on from the demo, with the program as it was called, so that they can be pasted."""
    world, aligners = folder / "world", folder / "ladder" / "aligners"
    return [
        f"{program} diagnose --source {world}/test/text_emb --target {world}/test/img_emb --aligner "
        f"{' '.join(str(place) for place in sorted(aligners.iterdir()))} --out report",
        f"{program} train --model llama:tiny --source-embeddings {world}/train_text/text_emb --index "
        f"{world}/train_text/captions.jsonl --conversations {world}/train_text/conversations.jsonl --aligner "
        f"{sorted(aligners.iterdir())[0]} --max-steps 200 --output run",
        f"{program} demo --world gap",
    ]


def _program() -> str:
    """``aniso``, or the path by which it was started where that is no word of the PATH."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "aniso" and len(called.parts) > 1 and not shutil.which("aniso") else "aniso"


def write_ladder(demo: ShapesDemo, ladder: Ladder, judged: list[dict[str, Any]], data: Mapping[str, Any]) -> None:
    """README.md, ladder.csv, ladder.png and demo.json."""
    from aniso_ext.mllm.arms import ladder_figure

    lines = ["# The ladder of the demo", "", ladder.table(), ""]
    lines.append(
        f"Mean ± standard deviation over {demo.seeds} seeds, in brackets the share of the way from identity to images."
    )
    lines += ["", *(f"- {arm}: {text}." for arm, text in _legend(ladder)), ""]
    lines += [f"- {sentence}." for sentence in _sentences(judged, demo.seeds)]
    lines += ["", "```text", *_example(demo, ladder), "```", ""]
    (demo.folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    ladder.write_csv(demo.folder / "ladder.csv")
    ladder_figure(ladder, SCORES).savefig(demo.folder / "ladder.png", dpi=160)
    (demo.folder / MARK).write_text(json.dumps(to_jsonable(data), indent=2) + "\n", encoding="utf-8")


def show_ladder(demo: ShapesDemo, ladder: Ladder, judged: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The table, what its lines mean, what it says, and what to do next."""
    from rich.table import Table

    say(console, f"[5/5] The ladder: mean ± spread over {demo.seeds} seeds, on {demo.asked} pictures of the test\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm", no_wrap=True)
    for heading in ("captions (CIDEr-D)", "attributes right", "multiple choice right"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in ladder.scores:
        cells = []
        for name in SCORES:
            spread = "" if demo.seeds == 1 else f" ± {ladder.spread(arm, name):.2f}"
            cells.append(f"{ladder.mean(arm, name):.2f}{spread}")
        table.add_row(arm, *cells)
    console.print(table)
    console.print()
    for arm, text in _legend(ladder):
        say(console, f"{arm}: {text}")
    console.print()
    for line in [*_sentences(judged, demo.seeds), "", *_example(demo, ladder), ""]:
        say(console, line)
    say(console, f"written in {demo.folder}/: README.md (every score), ladder.png, ladder.csv, demo.json, world/,")
    say(console, "  stand_ins/, ladder/ARM/seed-S/predictions.jsonl (every answer)\nnext:")
    for line in next_commands(demo.folder, _program()):
        say(console, f"  {line}")
