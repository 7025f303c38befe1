"""``aniso fit``: learn an aligner from two unpaired sets of embeddings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, say, spinner
from aniso_ext.cli.methods import build_aligner, parse_rank
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


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
        typer.Option("--refine/--no-refine", help="Refine the closed form by training, or stop at the closed form."),
    ] = None,
    mixing: Annotated[
        Literal["haar", "pca_adjacent", "balanced"] | None,
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
        typer.Option("--encoder", metavar="NAME", help="Name of the encoder, kept in config.json for the record."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an aligner that is already there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Learn an aligner from two UNPAIRED sets of embeddings of one contrastive space.

    Rows need not correspond and the sets may differ in length; both must have the same width. Files are streamed, so
    they may be larger than memory.

    \b
    Examples:
      aniso fit --source text_emb --target img_emb --out aligner --no-refine
      aniso fit --source text_emb --target img_emb --out baseline --method realign
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
    aligner = build_aligner(method, options)

    from aniso_ext.data import open_embeddings

    source_set, target_set = open_embeddings(source), open_embeddings(target)
    started = time.perf_counter()
    with spinner(f"fitting {method} on {len(source_set):,} source and {len(target_set):,} target rows"):
        aligner.fit(source_set, target_set)
    seconds = time.perf_counter() - started
    aligner.save_pretrained(out, encoder=encoder)

    data: dict[str, Any] = {
        "command": "fit",
        "method": method,
        "options": aligner.get_params(),
        "width": aligner.width,
        "source": {"path": str(source), "rows": len(source_set)},
        "target": {"path": str(target), "rows": len(target_set)},
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
