"""A language model trained from scratch on texts and stand-ins alone, judged on embeddings of photos it never saw.

    python benchmarks/text_only_fashion.py --data FOLDER
    python benchmarks/text_only_fashion.py --data FOLDER --rows 300 --test-rows 40 --steps 4 --size tiny --device cpu

FOLDER has image.npy, text.npy and captions.jsonl (id, caption, split, articleType, baseColour, gender, usage), row by
row, such as fashion44k. For every arm and seed a small Llama is trained on titles and attribute questions of the train
split, with the arm's stand-ins of the *text* embeddings in place of images (`images` is the bound: real ones). It is
judged on *image* embeddings of the test split: CIDEr-D and BLEU of titles, and the four attributes, written out freely.
Aligners are fitted on the two sides of the train split, shuffled apart. 2 000 rows of the train split are kept from
training: their photos choose the level of the noise arm, and with `--noise each` or `--noise residual` that of every
method without pairs.
Results: OUT/ladder.md, .csv, .png, runs.csv of every level of noise, and a folder for each run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aniso_ext.bench.environment import facts
from aniso_ext.mllm.arms import LadderData, LadderModel, choose_arms, ladder_figure, run_ladder, write_runs
from aniso_ext.mllm.options import TrainOptions

ATTRIBUTES = {
    "articleType": "What kind of product is it?",
    "baseColour": "What is its colour?",
    "gender": "Who is it for?",
    "usage": "What is it used for?",
}
VALIDATION_ROWS = 2000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("text_only_fashion"))
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument(
        "--noise",
        choices=["each", "residual"],
        help="tune noise on the stand-ins of every method as well; residual: in the shape of their unpaired residual",
    )
    parser.add_argument(
        "--neighbours", type=int, default=0, metavar="K", help="mean of K target rows near each stand-in, its own not"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--tuning-seeds", type=int, metavar="N", help="choose levels of noise by the first N seeds only; default: all"
    )
    parser.add_argument("--rows", type=int, help="most rows of the train split")
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--size", default="10m", help="of the language model: tiny, 10m, 30m or 60m")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    return parser.parse_args()


def write_files(data: Path, folder: Path, most_rows: int | None, test_rows: int) -> LadderData:
    """Embeddings, conversations and questions of the two splits."""
    lines = [json.loads(text) for text in (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    splits = np.array([line["split"] for line in lines])
    train = np.flatnonzero(splits == "train")[:most_rows]
    test = np.flatnonzero(splits == "test")[:test_rows]
    folder.mkdir(parents=True, exist_ok=True)
    for name, side, rows in (("source", "text", train), ("target", "image", train), ("test", "image", test)):
        np.save(folder / f"{name}.npy", np.load(data / f"{side}.npy", mmap_mode="r")[rows])
    kept = min(VALIDATION_ROWS, len(train) // 4)
    random = np.random.default_rng(0)
    trained = [lines[row] for row in train[kept:]]
    write_lines(folder / "conversations.jsonl", [sample for line in trained for sample in samples(line, random)])
    write_lines(folder / "validation.jsonl", questions(lines[row] for row in train[:kept]))
    write_lines(folder / "questions.jsonl", questions(lines[row] for row in test))
    for name, rows in (("train", train), ("test", test)):
        write_lines(folder / f"{name}_ids.jsonl", [{"id": str(lines[row]["id"])} for row in rows])
    return LadderData(
        source=str(folder / "source.npy"),
        target=str(folder / "target.npy"),
        ids=str(folder / "train_ids.jsonl"),
        conversations=str(folder / "conversations.jsonl"),
        test=str(folder / "test.npy"),
        test_ids=str(folder / "test_ids.jsonl"),
        questions=str(folder / "questions.jsonl"),
        validation_questions=str(folder / "validation.jsonl"),
    )


def samples(line: dict[str, Any], random: np.random.Generator) -> list[dict[str, Any]]:
    """The title, and one of the attributes that are known, drawn by lot."""
    identity = str(line["id"])
    title = {"id": identity, "caption": line["caption"]}
    if not (known := [name for name in ATTRIBUTES if line[name]]):
        return [title]
    name = str(random.choice(known))
    turns = [{"from": "human", "value": ATTRIBUTES[name]}, {"from": "gpt", "value": str(line[name])}]
    return [title, {"id": f"{identity}:{name}", "embedding": identity, "conversations": turns}]


def questions(lines: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in lines:
        identity = str(line["id"])
        found.append({"id": identity, "kind": "caption", "references": [line["caption"]]})
        for name, asked in ATTRIBUTES.items():
            if answer := str(line[name] or ""):
                found.append(
                    {"id": identity, "kind": "attribute", "attribute": name, "question": asked, "answer": answer}
                )
    return found


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    given = arguments()
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    data = write_files(given.data, given.out / "data", given.rows, given.test_rows)
    options = TrainOptions(
        stages=("full",),
        learning_rate=given.rate,
        max_steps=given.steps,
        global_batch=given.batch,
        device_batch=given.batch,
        warmup=0.05,
        weight_decay=0.05,
        max_length=64,
        on_long="truncate",
        log_every=20,
        save_every=10**6,
        device=given.device,
    )

    def show(done: int, total: int, name: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {done}/{total}  {name}", flush=True)

    ladder = run_ladder(
        data,
        choose_arms(given.arms, noise=given.noise, neighbours=given.neighbours),
        output=given.out,
        model=LadderModel(size=given.size),
        options=options,
        seeds=given.seeds,
        tuning_seeds=given.tuning_seeds,
        jobs=given.jobs,
        batch_size=512,
        fit_options={"device": given.device},
        progress=show,
    )
    names = ("cider_d", "bleu_4", "attribute", *(f"attribute:{name}" for name in ATTRIBUTES))
    text = "\n".join([ladder.table(), "", *(ladder.verdict(name) for name in names)])
    (given.out / "ladder.md").write_text(text + "\n", encoding="utf-8")
    ladder.write_csv(given.out / "ladder.csv")
    write_runs(given.out, given.out / "runs.csv", {**facts(device), "command": " ".join(map(shlex.quote, sys.argv))})
    ladder_figure(ladder).savefig(given.out / "ladder.png", dpi=160)
    print(text, file=sys.stdout)


if __name__ == "__main__":
    main()
