"""``aniso train``: a multimodal model on text and stand-ins."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, say, stage_bars
from aniso_ext.cli.processes import process_group
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.mllm import Correction, TrainOptions, TrainReport

_LADDER = "Comparison of arms"


@command
def train(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Folder or hub id of a language model, folder of a multimodal model to go on with, or FAMILY:SIZE "
            "(llama:tiny, qwen2:30m, ...) for random weights.",
        ),
    ],
    source_embeddings: Annotated[
        Path,
        typer.Option("--source-embeddings", metavar="DIR", help="Embeddings of the samples, usually of their texts."),
    ],
    conversations: Annotated[
        Path, typer.Option("--conversations", metavar="FILE", help="Conversations or captions, .json or .jsonl.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for the model, states and logs.")],
    aligner: Annotated[
        str,
        typer.Option(
            "--aligner",
            metavar="ALIGNER",
            help="What makes stand-ins: a folder that aniso fit wrote, a method to fit now, none, or noise:STD.",
        ),
    ] = "none",
    target_embeddings: Annotated[
        Path | None,
        typer.Option("--target-embeddings", metavar="DIR", help="What a method by name is fitted to; unpaired."),
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", min=0.0, metavar="STD", help="Gaussian noise on each stand-in, then a unit row.")
    ] = 0.0,
    noise_shape: Annotated[
        Literal["auto", "isotropic", "residual"],
        typer.Option(
            "--noise-shape",
            help="residual: in the shape of what the aligner's stand-ins miss of --target-embeddings; auto takes it "
            "where both are given.",
        ),
    ] = "auto",
    neighbours: Annotated[
        int, typer.Option("--neighbours", min=0, metavar="K", help="Stand-ins: the mean of K target rows near each.")
    ] = 0,
    train_refiner: Annotated[
        bool, typer.Option("--train-refiner", help="Let the loss tune the aligner's refiner, within its bounds.")
    ] = False,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            metavar="FILE",
            help="Ids in the order of the embeddings, .jsonl or .parquet.",
            show_default="the metadata beside the embeddings",
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's.")
    ] = None,
    visual_tokens: Annotated[int, typer.Option("--visual-tokens", min=1, metavar="T", help="Tokens of an image.")] = 1,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=262, metavar="N", help="Of the tokenizer of a FAMILY:SIZE, at most.")
    ] = 4096,
    stages: Annotated[
        Literal["projector", "full", "both"], typer.Option("--stages", help="Train the projector, everything, or both.")
    ] = "both",
    projector_learning_rate: Annotated[
        float, typer.Option("--projector-learning-rate", min=0.0, metavar="RATE", help="Peak of the first stage.")
    ] = 5e-4,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=0.0, metavar="RATE", help="Peak of the second stage.")
    ] = 1e-5,
    projector_epochs: Annotated[
        float, typer.Option("--projector-epochs", min=0.0, metavar="N", help="Passes of the first stage.")
    ] = 1.0,
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, metavar="N", help="Passes of the second stage.")] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, metavar="N", help="Steps of a stage, in place of its passes.")
    ] = None,
    global_batch: Annotated[
        int, typer.Option("--global-batch", min=1, metavar="N", help="Samples of a step, over all processes.")
    ] = 256,
    device_batch: Annotated[
        int, typer.Option("--device-batch", min=1, metavar="N", help="Rows that a device takes at a time, at most.")
    ] = 8,
    max_length: Annotated[
        int, typer.Option("--max-length", min=2, metavar="N", help="Tokens of a sample, and of a packed row, at most.")
    ] = 2048,
    on_long: Annotated[
        Literal["fail", "truncate", "skip"], typer.Option("--on-long", help="What to do with longer samples.")
    ] = "fail",
    packing: Annotated[
        bool, typer.Option("--packing", help="Several samples in a row, none of which sees another.")
    ] = False,
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="bfloat16 products over float32 weights.", show_default="on a GPU"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory: compute activations again.")
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option("--attention", metavar="NAME", help="sdpa, eager, flex_attention", show_default="the model's"),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the language model's layers; for long runs of even rows.")
    ] = False,
    lora_rank: Annotated[
        int,
        typer.Option("--lora-rank", min=0, metavar="R", help="Low-rank updates in the second stage, then merged."),
    ] = 0,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Under torchrun: shard the weights (FSDP2).")] = False,
    save_every: Annotated[
        int, typer.Option("--save-every", min=1, metavar="N", help="Steps between states to resume from.")
    ] = 500,
    log_every: Annotated[int, typer.Option("--log-every", min=1, metavar="N", help="Steps between logged losses.")] = 1,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", metavar="NAME", help="tensorboard or wandb, beside the JSON lines."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, metavar="N", help="Processes that prepare batches.")] = 0,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--device", help="Where to train.", show_default="a GPU where there is one"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything random.")] = 0,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            metavar="all|NAME,NAME",
            help="Instead of one model: the ladder, a model from scratch for each of these arms and three seeds.",
            rich_help_panel=_LADDER,
        ),
    ] = None,
    test_embeddings: Annotated[
        Path | None,
        typer.Option(
            "--test-embeddings",
            metavar="DIR",
            help="Target embeddings that the arms are judged on.",
            rich_help_panel=_LADDER,
        ),
    ] = None,
    test_index: Annotated[
        Path | None,
        typer.Option("--test-index", metavar="FILE", help="Their ids.", rich_help_panel=_LADDER),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", metavar="FILE", help="What is asked of them.", rich_help_panel=_LADDER),
    ] = None,
    validation_questions: Annotated[
        Path | None,
        typer.Option(
            "--validation-questions",
            metavar="FILE",
            help="Of the training split; choose levels of noise.",
            rich_help_panel=_LADDER,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state in --output.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a multimodal language model on text alone: stand-ins in place of images.

    Each sample's source embedding becomes a stand-in on the fly, a projector makes tokens of it, and a language model
    learns to say what the conversation says. First the projector is trained, then everything. At use the model takes
    embeddings of the target modality as they are.

    \b
    Examples:
      aniso train --model LLM --source-embeddings text_emb --conversations chat.jsonl --aligner aligner --output run
      aniso train --model llama:tiny --source-embeddings text.npy --index captions.jsonl \\
        --conversations captions.jsonl --aligner noise:0.05 --output run --device cpu
      torchrun --standalone --nproc-per-node 8 -m aniso_ext.cli train --fsdp --packing --model LLM ...

    --arms trains and judges every arm as aniso ladder does, with these options; --target-embeddings are then rows of
    the same things as --source-embeddings.

    A run that was stopped goes on with the same command and --resume, on the CPU to the bit.
    """
    from aniso_ext.mllm import TrainOptions

    options = TrainOptions(
        stages=("projector", "full") if stages == "both" else (stages,),
        projector_learning_rate=projector_learning_rate,
        learning_rate=learning_rate,
        projector_epochs=projector_epochs,
        epochs=epochs,
        max_steps=max_steps,
        global_batch=global_batch,
        device_batch=device_batch,
        max_length=max_length,
        on_long=on_long,
        packing=packing,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        compile=compile,
        train_refiner=train_refiner,
        lora_rank=lora_rank,
        fsdp=fsdp,
        save_every=save_every,
        log_every=log_every,
        report_to=tuple(report_to or ()),
        workers=workers,
        device=device,
        seed=seed,
    )
    if arms is not None:
        names = [name.strip() for name in arms.split(",") if name.strip()]
        needed: dict[str, Path | None] = {
            "target": target_embeddings,
            "ids": index,
            "test": test_embeddings,
            "test_ids": test_index,
            "questions": questions,
        }
        if aligner != "none" or noise or neighbours or train_refiner or resume:
            raise typer.BadParameter(
                "each arm has its own stand-ins and noise, and finished runs are taken over: leave --aligner, --noise, "
                "--neighbours, --train-refiner and --resume out",
                param_hint="--arms",
            )
        return _compare(names, model, vocab_size, source_embeddings, conversations, needed, validation_questions,
                        options, output)  # fmt: skip
    if output.exists() and not resume and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not empty: name a new folder, or pass --resume to go on with the run in it")
    correction = _correction(
        aligner, source_embeddings, target_embeddings, noise, noise_shape, neighbours, train_refiner
    )
    start = {
        "name": model,
        "visual_tokens": visual_tokens,
        "vocab_size": vocab_size,
        "chat_template": None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        "seed": seed,
    }
    report, first = _train(start, correction, source_embeddings, conversations, index, options, output, resume)
    if not first:
        raise typer.Exit(0)
    data = {"command": "train", "model": model, "aligner": aligner, "options": options.identity(), **vars(report)}

    def show(console: Console) -> None:
        say(console, f"{report.samples:,} samples, {report.tokens:,} tokens, {report.targets:,} of them targets")
        for what, ids in (("truncated", report.truncated), ("skipped", report.skipped)):
            if ids:
                say(console, f"{len(ids):,} samples {what}, the first of them {ids[0]!r}; all are in train_report.json")
        for stage in report.stages:
            moved = f"{stage.trained_parameters:,} parameters, {stage.steps} steps of {stage.rows_per_step} rows"
            losses = "" if stage.first_loss is None else f", loss {stage.first_loss:.4f} to {stage.last_loss:.4f}"
            say(console, f"{stage.name}: {moved}{losses}, {stage.seconds:.1f} s")
        say(console, f"{output}: model, tokenizer and log, after {report.seconds:.1f} s")

    return Result(data, show)


_NEEDED = {
    "target": "--target-embeddings",
    "ids": "--index",
    "test": "--test-embeddings",
    "test_ids": "--test-index",
    "questions": "--questions",
}


def _compare(
    names: list[str],
    model: str,
    vocab_size: int,
    source: Path,
    conversations: Path,
    needed: dict[str, Path | None],
    validation: Path | None,
    options: TrainOptions,
    output: Path,
) -> Result:
    """The ladder with the options of a training."""
    from aniso_ext.cli.ladder import climb
    from aniso_ext.mllm.arms import LadderData, LadderModel

    for name, path in needed.items():
        if path is None:
            raise typer.BadParameter("a comparison of arms needs it", param_hint=_NEEDED[name])
    family, colon, size = model.partition(":")
    if not colon or Path(model).exists():
        raise typer.BadParameter(
            f"arms are trained from scratch: {model!r} must be FAMILY:SIZE, e.g. llama:10m", param_hint="--model"
        )
    data = LadderData(
        source=str(source),
        conversations=str(conversations),
        validation_questions=None if validation is None else str(validation),
        **{name: str(path) for name, path in needed.items()},
    )
    return climb(
        data,
        names,
        model=LadderModel(family=family, size=size, vocab_size=vocab_size),
        options=options,
        out=output,
    )


def _correction(
    aligner: str, source: Path, target: Path | None, noise: float, shape: str, neighbours: int, train_refiner: bool
) -> Correction | None:
    from aniso_ext.align import list_aligners
    from aniso_ext.mllm import Correction

    if neighbours and target is None:
        raise typer.BadParameter("neighbours are rows of it", param_hint="--target-embeddings")
    kind, _, std = aligner.partition(":")
    if kind == "noise":
        try:
            noise = float(std)
        except ValueError:
            raise typer.BadParameter(f"{aligner!r} must be noise:STD, e.g. noise:0.1", param_hint="--aligner") from None
    elif aligner not in ("none", "identity"):
        if aligner in list_aligners() and target is None and not Path(aligner).is_dir():
            raise typer.BadParameter(f"{aligner} is fitted now and needs it", param_hint="--target-embeddings")
        if shape == "residual" and target is None:
            raise typer.BadParameter("noise of that shape is estimated from it", param_hint="--target-embeddings")
        if shape == "auto":
            shape = "isotropic" if target is None or neighbours else "residual"
        return Correction.from_aligner(
            aligner,
            source=source,
            target=target,
            noise_std=noise,
            noise_shape=shape,
            neighbours=neighbours,
            trainable=train_refiner,
        )
    if shape == "residual":
        raise typer.BadParameter("the residual is that of an aligner: pass --aligner", param_hint="--noise-shape")
    if train_refiner:
        raise typer.BadParameter("only an anisoalign has a refiner to train", param_hint="--train-refiner")
    if neighbours:
        return Correction.nearest(source, target, neighbours=neighbours, noise_std=noise)
    return Correction.noise(noise) if noise else None


def _train(
    start: dict[str, Any],
    correction: Correction | None,
    source: Path,
    conversations: Path,
    index: Path | None,
    options: TrainOptions,
    output: Path,
    resume: bool,
) -> tuple[TrainReport, bool]:
    from aniso_ext.data import open_embeddings
    from aniso_ext.mllm import load_model, train
    from aniso_ext.mllm.data import read_conversations
    from aniso_ext.mllm.library import say_errors_alone
    from aniso_ext.mllm.stage import runs_on_cpu

    say_errors_alone()
    texts = (message["content"] for sample in read_conversations(conversations) for message in sample.messages)
    embeddings = open_embeddings(source)
    with process_group(None if runs_on_cpu(options) else "cuda") as processes:
        model, tokenizer = load_model(embedding_width=embeddings.width, texts=texts, **start)
        model.set_correction(correction)
        with stage_bars("training") as update, warnings.catch_warnings():
            # what libraries deprecate among each other is nothing that a user of this command can mend
            warnings.filterwarnings("ignore", category=UserWarning, module="(torch|transformers|accelerate|peft)")
            report = train(
                model,
                tokenizer,
                conversations,
                source,
                index=index,
                options=options,
                output=output,
                resume=resume,
                progress=update if processes.first else None,
            )
        processes.meet()
    return report, processes.first
