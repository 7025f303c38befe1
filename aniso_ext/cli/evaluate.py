"""``aniso eval``: judge a trained model on real target embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say, spinner

if TYPE_CHECKING:
    from rich.console import Console


@command
def evaluate(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="Folder that aniso train wrote.")],
    embeddings: Annotated[Path, typer.Option("--embeddings", metavar="DIR", help="Target embeddings, e.g. of images.")],
    questions: Annotated[Path, typer.Option("--questions", metavar="FILE", help="JSON lines, see docs/mllm.md.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for predictions and scores.")],
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="PATH", help="Ids of the embeddings.", show_default="metadata beside them"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions at a time.")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 48,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Device.", show_default="a GPU if there is one")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Ask a trained model about real target embeddings, and score its answers.

    Captions are scored by CIDEr-D and BLEU; multiple choice, yes or no, and attributes by the share that is right.
    Writes predictions.jsonl, with every answer, and scores.json.

    \b
    Example:
      aniso eval --run run --embeddings test/img_emb --questions test/questions.jsonl --out results
    """
    import json as json_module

    import torch

    from aniso_ext.mllm.evaluation import evaluate as judge
    from aniso_ext.mllm.library import say_errors_alone
    from aniso_ext.mllm.loading import load_trained

    say_errors_alone()
    with spinner(f"loading {run}"):
        model, tokenizer = load_trained(run)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with progress_bar("asking") as update:
        report = judge(
            model,
            tokenizer,
            embeddings,
            questions,
            index=index,
            output=out,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=update,
        )
    (out / "scores.json").write_text(json_module.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")

    def show(console: Console) -> None:
        for line in str(report).splitlines():
            say(console, line)
        say(console, f"answers: {report.predictions}")

    return Result({"command": "eval", "run": str(run), **report.to_dict()}, show)
