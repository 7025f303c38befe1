"""``aniso embed``: images and captions to embedding sets, by a model of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say, spinner
from aniso_ext.cli.signals import stop_requests

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_BAD = 10


@command
def embed(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write, in the clip-retrieval layout.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME", help="open_clip's name, e.g. ViT-B-32, local-dir:FOLDER or hf-hub:OWNER/NAME."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="PATH",
            help="Folder of images; .txt with a path a line; .jsonl or .parquet with a column image, and perhaps id.",
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            "--captions",
            metavar="FILE",
            help=".txt with a caption a line; .jsonl or .parquet with a column caption. May be the file of --images.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained", metavar="TAG", help="open_clip's tag of weights, downloaded if need be; none: random ones."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="FILE", help="Local weights instead: .safetensors or a PyTorch file."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="Such as cuda.", show_default="cpu")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option("--precision", help="Of the products; auto: half on a GPU, fp32 on the CPU."),
    ] = "auto",
    batch_rows: Annotated[int, typer.Option("--batch-rows", min=1, metavar="N", help="Samples at a time.")] = 256,
    workers: Annotated[int, typer.Option("--workers", min=0, metavar="N", help="Processes that decode images.")] = 2,
    rows_per_shard: Annotated[
        int, typer.Option("--rows-per-shard", min=1, metavar="N", help="Samples of a shard; a stop loses at most one.")
    ] = 65_536,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option("--dtype", help="Number format of the embeddings.")
    ] = "float16",
    on_bad: Annotated[
        Literal["skip", "fail"],
        typer.Option("--on-bad", help="What to do with images that cannot be read and missing captions."),
    ] = "skip",
    on_existing: Annotated[
        Literal["resume", "overwrite", "fail"],
        typer.Option("--on-existing", help="What to do with shards that are already there."),
    ] = "resume",
    seed: Annotated[int, typer.Option("--seed", help="Seed of random weights.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Turn images and captions into embedding sets with a model of open_clip.

    Writes img_emb/, text_emb/, metadata/ (id, caption, image, width, height) and encoder.json, which fit and convert
    compare: embeddings of different encoders are not mixed. Nothing is downloaded unless --pretrained names a tag or
    --model a place on the hub. A run that was stopped goes on with the next shard. Samples that cannot be used are left
    out on both sides and listed in embed.jsonl.

    \b
    Examples:
      aniso embed --images photos --out embeddings --model ViT-B-32 --pretrained openai --device cuda
      aniso embed --captions captions.txt --out embeddings --model ViT-B-32 --checkpoint weights.safetensors
      aniso embed --images pairs.jsonl --captions pairs.jsonl --out embeddings --model local-dir:encoder
    """
    if images is None and captions is None:
        raise typer.BadParameter("pass --images, --captions or both", param_hint="--images")
    with stop_requests("the shard in hand") as stop:
        from aniso_ext.encode import Encoder, embed_files

        with spinner(f"loading {model}"):
            encoder = Encoder.load(
                model,
                pretrained=pretrained,
                checkpoint=checkpoint,
                device=device or "cpu",
                precision=precision,
                seed=seed,
            )
        with progress_bar("embedding") as update:
            report = embed_files(
                encoder,
                out,
                images=images,
                captions=captions,
                batch_rows=batch_rows,
                workers=workers,
                rows_per_shard=rows_per_shard,
                dtype=dtype,
                on_bad=on_bad,
                on_existing=on_existing,
                stop=stop,
                progress=update,
            )

    def show(console: Console) -> None:
        resumed = f", {report.resumed_shards} of them by an earlier run" if report.resumed_shards else ""
        what = " and ".join(report.sides)
        say(console, f"{report.rows:,} rows of width {report.width} ({what}) in {report.shards} shard(s){resumed}")
        if report.bad:
            say(
                console, f"{len(report.bad):,} of {report.samples:,} samples left out; {report.manifest} lists them all"
            )
            for bad in report.bad[:_SHOWN_BAD]:
                say(console, f"  {bad.image or bad.id}: {bad.reason}")
        say(console, f"{out}: {report.encoder}, {report.precision}, written in {report.seconds:.1f} s")

    return Result({"command": "embed", **report.to_dict()}, show)
