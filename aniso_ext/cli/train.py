"""``aniso train``: a multimodal language model from texts and stand-ins."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say, spinner
from aniso_ext.cli.transformers_output import quiet_transformers

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.mllm import AnisoMLLMForCausalLM, Correction

SMALL = "small:"


@command
def train(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Folder of a language model with its tokenizer, or its name on the hub; small:FAMILY:SIZE makes one "
            "of random weights (llama or qwen2; tiny, 10m, 30m, 60m, 1b).",
        ),
    ],
    embeddings: Annotated[Path, typer.Option("--embeddings", metavar="DIR", help="Source embeddings of the samples.")],
    conversations: Annotated[
        Path, typer.Option("--conversations", metavar="FILE", help="LLaVA-style .json or .jsonl, or captions.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the model, its log and its states.")],
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="PATH", help="Ids of the embeddings.", show_default="metadata beside them"),
    ] = None,
    aligner: Annotated[
        str | None,
        typer.Option(
            "--aligner",
            metavar="ALIGNER",
            help="Folder that aniso fit wrote, or a method, fitted with --target.",
            show_default="none: embeddings enter as they are",
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--target", metavar="DIR", help="Target embeddings that a method is fitted on.")
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", min=0, metavar="SIGMA", help="Gaussian noise in each coordinate of a stand-in.")
    ] = 0.0,
    train_refiner: Annotated[
        bool, typer.Option("--train-refiner", help="Let the model's loss tune the aligner's refiner within its bounds.")
    ] = False,
    stages: Annotated[
        Literal["both", "projector", "full"], typer.Option("--stages", help="Projector first, then everything.")
    ] = "both",
    projector_rate: Annotated[float, typer.Option("--projector-rate", help="Learning rate of the projector.")] = 5e-4,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate of the second stage.")] = 1e-5,
    epochs: Annotated[float, typer.Option("--epochs", min=0, help="Passes of each stage.")] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Most steps of each stage.", show_default="no limit")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples of a step, over all processes.")] = 256,
    device_batch: Annotated[int, typer.Option("--device-batch", min=1, help="Rows on a device at a time.")] = 8,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Most tokens of a sample or pack.")] = 2048,
    on_long: Annotated[
        Literal["fail", "truncate", "skip"], typer.Option("--on-long", help="What to do with longer samples.")
    ] = "fail",
    packing: Annotated[bool, typer.Option("--packing", help="Several samples in a row; none sees another.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third slower.")
    ] = False,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=0, help="Low-rank updates; 0 trains all weights.")] = 0,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the model over the processes of torchrun.")] = False,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", help="tensorboard or wandb; may be given again.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Device.", show_default="a GPU if there is one")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights, order and noise.")] = 0,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between resumable states.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state in --out.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a multimodal language model on texts, with stand-ins in the place of images.

    The source embeddings are corrected on the fly. First the projector is trained under a frozen language model, then
    everything. Evaluation feeds real target embeddings: see aniso eval. Under torchrun the processes share each batch.

    \b
    Examples:
      aniso train --model meta/llama --embeddings text_emb --conversations train.jsonl --aligner aligner --out run
      aniso train --model small:llama:tiny --embeddings train_text --conversations train_text/captions.jsonl --out run
    """
    quiet_transformers()
    from aniso_ext.mllm import TrainOptions
    from aniso_ext.mllm import train as train_model

    options = TrainOptions(
        stages=("projector", "full") if stages == "both" else (stages,),
        projector_learning_rate=projector_rate,
        learning_rate=rate,
        projector_epochs=epochs,
        epochs=epochs,
        max_steps=max_steps,
        global_batch=batch,
        device_batch=device_batch,
        max_length=max_length,
        on_long=on_long,
        packing=packing,
        gradient_checkpointing=gradient_checkpointing,
        lora_rank=lora_rank,
        fsdp=fsdp,
        report_to=tuple(report_to or ()),
        device=device,
        seed=seed,
        save_every=save_every,
        train_refiner=train_refiner,
    )
    with spinner("preparing model and aligner"):
        language, tokenizer = _language_model(model, conversations, embeddings, seed)
        language.set_correction(_correction(aligner, noise, train_refiner, embeddings, target))
    with progress_bar("training") as update:
        report = train_model(
            language,
            tokenizer,
            conversations,
            embeddings,
            index=index,
            options=options,
            output=out,
            resume=resume,
            progress=lambda stage, step, steps: update(step, steps),
        )

    def show(console: Console) -> None:
        say(console, f"{report.samples:,} samples, {report.tokens:,} tokens, {report.targets:,} of them trained on")
        if report.truncated or report.skipped:
            say(console, f"{len(report.truncated):,} samples truncated, {len(report.skipped):,} skipped: too long")
        for stage in report.stages:
            losses = f"loss {stage.first_loss:.3f} to {stage.last_loss:.3f}" if stage.last_loss is not None else ""
            say(console, f"{stage.name}: {stage.steps:,} steps, {stage.trained_parameters:,} parameters, {losses}")
        say(console, f"{out}: written in {report.seconds:.1f} s")
        say(console, f"next: aniso eval --run {out} --embeddings IMAGE_EMBEDDINGS --questions FILE --out RESULTS")

    return Result({"command": "train", **asdict(report)}, show)


def _language_model(name: str, conversations: Path, embeddings: Path, seed: int) -> tuple[AnisoMLLMForCausalLM, Any]:
    import torch

    from aniso_ext.data import open_embeddings
    from aniso_ext.errors import InputError
    from aniso_ext.mllm import AnisoMLLMForCausalLM, small_language_model, small_tokenizer
    from aniso_ext.mllm.data import read_conversations
    from aniso_ext.mllm.library import transformers

    torch.manual_seed(seed)
    width = open_embeddings(embeddings).width
    if name.startswith(SMALL):
        family, _, size = name.removeprefix(SMALL).partition(":")
        texts = (turn["content"] for each in read_conversations(conversations) for turn in each.messages)
        tokenizer: Any = small_tokenizer(texts)
        language = small_language_model(family, vocab_size=len(tokenizer), size=size or "tiny", seed=seed)
        return AnisoMLLMForCausalLM.from_language_model(language, tokenizer, embedding_width=width), tokenizer
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if config.model_type == "aniso_mllm":
            return AnisoMLLMForCausalLM.from_pretrained(name), tokenizer
        language = transformers.AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be loaded as a language model ({reason}): check the folder or name") from None
    return AnisoMLLMForCausalLM.from_language_model(language, tokenizer, embedding_width=width), tokenizer


def _correction(
    aligner: str | None, noise: float, train_refiner: bool, embeddings: Path, target: Path | None
) -> Correction | None:
    from aniso_ext.mllm import Correction

    if aligner is None:
        return Correction.noise(noise) if noise else None
    return Correction.from_aligner(
        aligner, source=embeddings, target=target, noise_std=noise, trainable=train_refiner
    )
