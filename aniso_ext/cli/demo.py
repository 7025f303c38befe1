"""``aniso demo``: the package in one command, on rendered shapes or on a simulated gap; nothing to download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command
from aniso_ext.cli.demo_gap import HELD_OUT, NEIGHBOURS, gap_demo
from aniso_ext.cli.demo_shapes import ARMS_SHOWN, FOLDER, ShapesDemo, shapes_demo

_SIZES = ShapesDemo()
_SHAPES, _GAP = "World: shapes", "World: gap, simulated or of own files"


@command
def demo(
    world: Annotated[
        Literal["shapes", "gap"] | None,
        typer.Option(
            "--world", help="Rendered shapes, or a simulated gap.", show_default="shapes; gap with an option of it"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for what is made; with the gap, for report.json and report.md.",
            show_default="demo_output; with the gap none",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the world and of everything random.")] = 0,
    scenes: Annotated[
        int | None,
        typer.Option(
            "--scenes",
            min=60,
            metavar="N",
            help="Scenes to learn from.",
            show_default=str(_SIZES.scenes),
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    encoder_steps: Annotated[
        int | None,
        typer.Option(
            "--encoder-steps",
            min=1,
            metavar="N",
            help="Of the dual encoder.",
            show_default=str(_SIZES.encoder_steps),
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            metavar="N",
            help="Of each language model.",
            show_default=str(_SIZES.steps),
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            min=1,
            metavar="N",
            help="Language models of each arm.",
            show_default=str(_SIZES.seeds),
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            metavar="NAME,NAME",
            help="Arms of the ladder, by commas, or all; blind, identity and images are always among them.",
            show_default=",".join(ARMS_SHOWN),
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            metavar="N",
            help="Language models at a time.",
            show_default="one for each core, at most 8",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            "--pairs",
            min=100,
            metavar="N",
            help="Pairs to simulate, or to take of the files.",
            show_default="13000 at the default width; of files all, at most 50000",
            rich_help_panel=_GAP,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            min=24,
            metavar="D",
            help="Width of the simulated embeddings.",
            show_default="1280",
            rich_help_panel=_GAP,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="R",
            help="Rank for the methods that have one.",
            show_default="128, or D/4 if less",
            rich_help_panel=_GAP,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="DIR",
            help="Own source embeddings, with --target.",
            rich_help_panel=_GAP,
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--target",
            metavar="DIR",
            help="Own target embeddings; row i belongs to source row i.",
            rich_help_panel=_GAP,
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            "--held-out",
            min=0.05,
            max=0.95,
            metavar="SHARE",
            help="Share of the pairs that methods are judged on.",
            rich_help_panel=_GAP,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAME,NAME",
            help="Methods to run, by commas.",
            show_default="all",
            rich_help_panel=_GAP,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            min=1,
            help="Neighbours of Omega, M_Z and M_X.",
            rich_help_panel=_GAP,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Train AnisoAlign's two stages too, with small networks: a minute or two more.",
            rich_help_panel=_GAP,
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """The package in one command; needs no data and no download.

    With the world of shapes, in some minutes on two cores: draws scenes, trains a small dual encoder on them, shows the
    gap between its texts and pictures, fits every method without pairs, and trains small language models on texts
    alone. They are judged on embeddings of pictures, a line for each arm. Needs the extras encode, mllm and plots.

    With the gap, in seconds: pairs from the gap simulator, or from --source and --target. Methods are fitted on
    training rows with the two sides shuffled apart and judged on held-out pairs; the simulator's constants are measured
    and compared. AnisoAlign stands for its closed form, unless --refine is given.

    \b
    Examples:
      aniso demo
      aniso demo --arms blind,identity,mean_shift,images --seeds 1
      aniso demo --world gap --methods mean_shift,realign,anisoalign --pairs 4000 --width 256
      aniso demo --source text_emb --target img_emb --pairs 20000
    """
    of_gap: dict[str, Any] = {"pairs": pairs, "width": width, "rank": rank, "source": source, "target": target}
    of_gap |= {"held_out": held_out, "methods": methods, "k": k, "refine": refine or None}
    of_shapes: dict[str, Any] = {"scenes": scenes, "encoder_steps": encoder_steps, "steps": steps, "seeds": seeds}
    of_shapes |= {"jobs": jobs}
    given = [name for name, value in of_gap.items() if value is not None]
    if world == "shapes" and given:
        raise typer.BadParameter("it is an option of --world gap", param_hint=_option(given[0]))
    if world == "gap" or given:
        if chosen := [name for name, value in {**of_shapes, "arms": arms}.items() if value is not None]:
            raise typer.BadParameter("it is an option of --world shapes", param_hint=_option(chosen[0]))
        return gap_demo(
            pairs=pairs,
            width=width,
            rank=rank,
            source=source,
            target=target,
            held_out=held_out or HELD_OUT,
            methods=methods,
            k=k or NEIGHBOURS,
            out=out,
            refine=refine,
            seed=seed,
        )
    sizes = {name: value for name, value in of_shapes.items() if value is not None}
    return shapes_demo(replace(_SIZES, folder=out or FOLDER, seed=seed, arms=_arms(arms), **sizes))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _arms(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ARMS_SHOWN
    return ("blind", "identity", *(name.strip() for name in text.split(",") if name.strip()), "images")
