"""``aniso fit``: learn an aligner from two unpaired sets of embeddings."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, say, spinner, stage_bars
from aniso_ext.cli.methods import build_aligner, parse_rank
from aniso_ext.cli.processes import process_group
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from aniso_ext.align import Aligner, TrainingOptions
    from aniso_ext.data import EmbeddingSet

# shown in the help, which must not import torch; a test compares them with the library's own
PRIOR_STEPS, REFINE_STEPS, TRAINED_ROWS = 600, 300, 1024


@command
def fit(
    source: Annotated[
        Path, typer.Option("--source", metavar="DIR", help="Embeddings to be turned into stand-ins, usually of texts.")
    ],
    target: Annotated[
        Path, typer.Option("--target", metavar="DIR", help="Embeddings of the modality to imitate, usually of images.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="ALIGNER", help="Folder to write: config.json and model.safetensors.")
    ],
    method: Annotated[
        str, typer.Option("--method", help="anisoalign or a baseline, e.g. mean_shift, realign.")
    ] = "anisoalign",
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="R",
            help="Directions of the dominant subspace: an even number, or an energy share like 0.9.",
            show_default="the method's own, 128",
        ),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="Train the phase prior and the refiner, or stop at the closed form.",
            show_default="refine",
        ),
    ] = None,
    prior_steps: Annotated[
        int | None,
        typer.Option(
            "--prior-steps",
            min=0,
            metavar="N",
            help="Training steps of the phase prior, at most.",
            show_default=str(PRIOR_STEPS),
        ),
    ] = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(
            "--refine-steps",
            min=0,
            metavar="N",
            help="Training steps of the refiner, at most.",
            show_default=str(REFINE_STEPS),
        ),
    ] = None,
    batch_rows: Annotated[
        int | None,
        typer.Option(
            "--batch-rows", min=1, metavar="N", help="Rows of a training step.", show_default=str(TRAINED_ROWS)
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="Where to train, e.g. cuda.", show_default="the CPU"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            metavar="DIR",
            help="Keep the state of the training here; the same command goes on from it after a stop.",
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="DIR", help="Write the losses here: prior.jsonl and refiner.jsonl."),
    ] = None,
    mixing: Annotated[
        Literal["haar", "pca_adjacent", "balanced", "phase_stable"] | None,
        typer.Option("--mixing", help="How directions are combined into two-dimensional blocks."),
    ] = None,
    complement: Annotated[
        Literal["scalar", "diagonal", "diagonal_projected"] | None,
        typer.Option("--complement", help="How the rest of the space is rescaled."),
    ] = None,
    literal: Annotated[
        bool | None, typer.Option("--literal", help="The paper's printed form wherever this package decides otherwise.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="NAME",
            help="Name of the encoder, kept in config.json; convert refuses embeddings of another one.",
            show_default="that of both sets, if they name it",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            "--engine", help="Who works: this process and those of torchrun, or Ray (of RAY_ADDRESS, else a local one)."
        ),
    ] = "local",
    tasks: Annotated[
        int | None,
        typer.Option(
            "--tasks", min=1, metavar="N", help="Tasks of Ray that share the rows.", show_default="as many as can run"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an aligner that is already there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Learn an aligner from two UNPAIRED sets of embeddings of one contrastive space.

    Rows need not correspond and the sets may differ in length; both must have the same width. Files are streamed, so
    they may be larger than memory. anisoalign trains in two stages, a prior of the target's phases and a refiner
    under it; each keeps a random sample of the rows in memory and stops early when held-out rows stop gaining.

    \b
    Examples:
      aniso fit --source text_emb --target img_emb --out aligner --checkpoint aligner_state
      aniso fit --source text_emb --target img_emb --out closed_form --no-refine
      aniso fit --source text_emb --target img_emb --out baseline --method realign
      torchrun --standalone --nproc-per-node 2 -m aniso_ext.cli fit --source text_emb --target img_emb --out aligner

    Under torchrun the processes share the rows of every pass and merge what they count, share each training batch and
    average their gradients; the first one writes and prints. With --engine ray tasks of Ray are these processes.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not overwrite)):
        raise InputError(f"{out} exists: name a new folder, or pass --overwrite to replace an aligner in it")
    options = {
        "rank": parse_rank(rank),
        "refine": refine,
        "mixing": mixing,
        "complement": complement,
        "literal": literal,
        "seed": seed,
    }
    given = {
        "--prior-steps": prior_steps,
        "--refine-steps": refine_steps,
        "--batch-rows": batch_rows,
        "--device": device,
        "--checkpoint": checkpoint,
        "--log": log,
    }
    if tasks is not None and engine != "ray":
        raise typer.BadParameter("only --engine ray has tasks", param_hint="--tasks")
    if engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("Ray starts the processes: run it without torchrun", param_hint="--engine")
    aligner = build_aligner(method, options)
    _prepare_training(aligner, given)

    from aniso_ext.data import common_encoder, open_embeddings

    source_set, target_set = open_embeddings(source), open_embeddings(target)
    stored_encoder = common_encoder(source_set, target_set)
    if encoder is not None and stored_encoder not in (None, encoder):
        raise InputError(f"--encoder is {encoder}, but both sets hold embeddings of {stored_encoder}: leave it out")
    encoder = stored_encoder if encoder is None else encoder
    started = time.perf_counter()
    with process_group(device) as processes:
        if processes.device != device:
            aligner.set_params(device=processes.device)
        processes.meet()  # every process has found the folder free before one of them writes to it
        if engine == "ray":
            aligner = _fit_on_ray(aligner, source, target, checkpoint, log, tasks)
        else:
            _fit(aligner, source_set, target_set, checkpoint, log, watched=processes.first)
        seconds = time.perf_counter() - started
        if processes.first:
            aligner.save_pretrained(out, encoder=encoder)
        processes.meet()
    if not processes.first:
        raise typer.Exit(0)

    data: dict[str, Any] = {
        "command": "fit",
        "method": method,
        "options": aligner.get_params(),
        "width": aligner.width,
        "source": {"path": str(source), "rows": len(source_set)},
        "target": {"path": str(target), "rows": len(target_set)},
        "encoder": encoder,
        "aligner": str(out),
        "fingerprint": aligner.fingerprint(),
        "summary": aligner.summary_,
        "seconds": seconds,
    }

    def show(console: Console) -> None:
        say(console, aligner.summary())
        say(console, f"{out}: written after {seconds:.1f} s, fingerprint {data['fingerprint'][:12]}")
        say(console, f"next: aniso convert --aligner {out} --input {source} --output STAND_INS")

    return Result(data, show)


def _prepare_training(aligner: Aligner, given: Mapping[str, Any]) -> None:
    """Set the training options that were given; with a method that is not trained they are bad usage."""
    named = [option for option, value in given.items() if value is not None]
    trained = getattr(aligner, "refine", False)
    if named and not trained:
        raise typer.BadParameter("only anisoalign with refinement is trained", param_hint=named[0])
    if not trained:
        return
    from dataclasses import replace

    from aniso_ext.align.stages import PRIOR_TRAINING, REFINEMENT_TRAINING

    def schedule(default: TrainingOptions, steps: int | None) -> TrainingOptions | None:
        changed = {"steps": steps, "batch_rows": given["--batch-rows"]}
        changed = {name: value for name, value in changed.items() if value is not None}
        return replace(default, **changed) if changed else None

    aligner.set_params(
        prior_training=schedule(PRIOR_TRAINING, given["--prior-steps"]),
        refinement_training=schedule(REFINEMENT_TRAINING, given["--refine-steps"]),
        device=_checked_device(given["--device"]),
    )


def _checked_device(name: str | None) -> str | None:
    if name is None:
        return None
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"torch cannot use {name!r}: {reason}", param_hint="--device") from None
    return name


def _fit(
    aligner: Aligner,
    source: EmbeddingSet,
    target: EmbeddingSet,
    checkpoint: Path | None,
    log: Path | None,
    *,
    watched: bool,
) -> None:
    from aniso_ext.align import AnisoAlign

    text = f"fitting {aligner.method} on {len(source):,} source and {len(target):,} target rows"
    if not isinstance(aligner, AnisoAlign):
        with spinner(text) if watched else nullcontext():
            aligner.fit(source, target)
        return
    with stage_bars(text) if watched else nullcontext() as update:
        aligner.fit(source, target, checkpoint_dir=checkpoint, log_dir=log, progress=update)


def _fit_on_ray(
    aligner: Aligner, source: Path, target: Path, checkpoint: Path | None, log: Path | None, tasks: int | None
) -> Aligner:
    from aniso_ext.align import AnisoAlign
    from aniso_ext.align.ray_fit import fit_on_ray

    run: dict[str, Any] = {}
    if isinstance(aligner, AnisoAlign):
        run = {"checkpoint_dir": checkpoint, "log_dir": log}
    with spinner(f"fitting {aligner.method} on Ray"):
        return fit_on_ray(aligner, source, target, tasks=tasks, **run)
