"""``aniso ladder``: one model, trained on the stand-ins of every method, judged alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.mllm import TrainOptions
    from aniso_ext.mllm.arms import LadderData, LadderModel

_HEADLINES = ("cider_d", "attribute", "multiple_choice", "yes_no")


@command
def ladder(
    source: Annotated[Path, typer.Option("--source", metavar="DIR", help="Source embeddings of the training split.")],
    target: Annotated[Path, typer.Option("--target", metavar="DIR", help="Target embeddings of the same, row by row.")],
    ids: Annotated[Path, typer.Option("--ids", metavar="PATH", help="Ids of those rows, .jsonl or .parquet.")],
    conversations: Annotated[Path, typer.Option("--conversations", metavar="FILE", help="What is trained on.")],
    test: Annotated[Path, typer.Option("--test", metavar="DIR", help="Target embeddings to be judged on.")],
    test_ids: Annotated[Path, typer.Option("--test-ids", metavar="PATH", help="Their ids.")],
    questions: Annotated[Path, typer.Option("--questions", metavar="FILE", help="What is asked of them.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for runs, table and figure.")],
    validation_questions: Annotated[
        Path | None,
        typer.Option("--validation-questions", metavar="FILE", help="Of the training split; choose levels of noise."),
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", metavar="NAME", help="May be given again.", show_default="all")
    ] = None,
    noise: Annotated[
        Literal["each", "residual"] | None,
        typer.Option(
            "--noise",
            help="each: tune noise on the stand-ins of every method as well; residual: noise in the shape of what they "
            "miss of the target, estimated without pairs.",
        ),
    ] = None,
    neighbours: Annotated[
        int,
        typer.Option(
            "--neighbours",
            min=0,
            metavar="K",
            help="The mean of K target rows of other things near each stand-in takes its place.",
            show_default="none",
        ),
    ] = 0,
    unpaired: Annotated[
        Path | None,
        typer.Option(
            "--unpaired",
            metavar="DIR",
            help="Target embeddings of other things, among which neighbours are found.",
            show_default="the half of --target that does not hold a row's own",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="Runs of each arm.")] = 3,
    tuning_seeds: Annotated[
        int | None,
        typer.Option(
            "--tuning-seeds", min=1, metavar="N", help="Runs by which levels of noise are chosen.", show_default="all"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="Runs at a time.")] = 1,
    family: Annotated[Literal["llama", "qwen2"], typer.Option("--family", help="Of the language model.")] = "llama",
    size: Annotated[
        Literal["tiny", "10m", "30m", "60m", "1b"], typer.Option("--size", help="Of the language model.")
    ] = "10m",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of every run.")] = 400,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples of a step.")] = 256,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = 1e-3,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Most tokens of a sample.")] = 128,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Device.", show_default="a GPU if there is one")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a small language model from scratch for every arm, and judge it on real target embeddings.

    Arms: blind, identity, noise (its level chosen on the validation questions), mean_shift, c3_code, c3_paper, realign,
    initialisation, anisoalign, anisoalign-tuned (its refiner trained along), and images, the bound. Samples, order,
    budget and start are the same for all. Finished runs are taken over. Writes ladder.md, ladder.csv and ladder.png.

    \b
    Example:
      aniso ladder --source text_emb --target img_emb --ids metadata --conversations train.jsonl --test test/img_emb
        --test-ids test/metadata --questions test/questions.jsonl --out ladder --arm identity --arm images
    """
    from aniso_ext.mllm import TrainOptions
    from aniso_ext.mllm.arms import LadderData, LadderModel

    data = LadderData(
        source=str(source),
        target=str(target),
        ids=str(ids),
        conversations=str(conversations),
        test=str(test),
        test_ids=str(test_ids),
        questions=str(questions),
        validation_questions=None if validation_questions is None else str(validation_questions),
        unpaired=None if unpaired is None else str(unpaired),
    )
    options = TrainOptions(
        stages=("full",),
        learning_rate=rate,
        max_steps=steps,
        global_batch=batch,
        device_batch=batch,
        max_length=max_length,
        on_long="truncate",
        log_every=10,
        save_every=10**6,
        device=device,
    )
    return climb(
        data,
        arms,
        noise=noise,
        neighbours=neighbours,
        model=LadderModel(family=family, size=size),
        options=options,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        jobs=jobs,
        out=out,
    )


def climb(
    data: LadderData,
    arms: list[str] | None,
    *,
    noise: str | None = None,
    neighbours: int = 0,
    model: LadderModel,
    options: TrainOptions,
    seeds: int = 3,
    tuning_seeds: int | None = None,
    jobs: int = 1,
    out: Path,
) -> Result:
    """Run the arms, write table and figure, and show them."""
    from aniso_ext.mllm.arms import choose_arms, ladder_figure, run_ladder
    from aniso_ext.mllm.library import say_errors_alone

    say_errors_alone()
    chosen = choose_arms(arms, noise=noise, neighbours=neighbours)
    with progress_bar("runs") as update:
        found = run_ladder(
            data,
            chosen,
            output=out,
            model=model,
            options=options,
            seeds=range(seeds),
            tuning_seeds=tuning_seeds,
            jobs=jobs,
            progress=lambda done, total, name: update(done, total),
        )
    table = found.table()
    verdicts = [found.verdict(name) for name in _HEADLINES if name in found.names]
    (out / "ladder.md").write_text("\n".join([table, "", *verdicts]) + "\n", encoding="utf-8")
    found.write_csv(out / "ladder.csv")
    ladder_figure(found).savefig(out / "ladder.png", dpi=160)

    def show(console: Console) -> None:
        for line in [*table.splitlines(), *verdicts]:
            say(console, line)
        say(console, f"{out}: ladder.md, ladder.csv, ladder.png")

    return Result({"command": "ladder", "scores": found.scores, "chosen": found.chosen, "out": str(out)}, show)
