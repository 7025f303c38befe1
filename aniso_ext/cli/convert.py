"""``aniso convert``: write the stand-ins of a set of source embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say

if TYPE_CHECKING:
    from rich.console import Console


@command
def convert(
    aligner: Annotated[Path, typer.Option("--aligner", metavar="ALIGNER", help="Folder that aniso fit wrote.")],
    input: Annotated[Path, typer.Option("--input", metavar="DIR", help="Source embeddings.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for the stand-ins, one shard per input shard.")
    ],
    calibration: Annotated[
        Literal["fitted", "corpus"],
        typer.Option(
            "--calibration",
            help="Recentre on the mean stored at fit (one pass), or on the mean of this input (two passes).",
        ),
    ] = "fitted",
    on_existing: Annotated[
        Literal["resume", "overwrite", "fail"],
        typer.Option("--on-existing", help="What to do with shards that are already there."),
    ] = "resume",
    on_bad: Annotated[
        Literal["fail", "drop", "zero"],
        typer.Option("--on-bad", help="What to do with rows that are zero or not finite."),
    ] = "fail",
    batch_rows: Annotated[
        int, typer.Option("--batch-rows", min=1, metavar="N", help="Rows in memory at a time.")
    ] = 8192,
    dtype: Annotated[
        Literal["float16", "float32", "float64"] | None,
        typer.Option("--dtype", help="Number format of the output.", show_default="that of the input"),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="N/M",
            help="Convert as worker N (from 0) of M that share the conversion.",
            show_default="from torchrun or Slurm, else alone",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Who works: this process, or Ray (that of RAY_ADDRESS, else a local one)."),
    ] = "local",
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Turn source embeddings into stand-ins for the target modality, file by file.

    Every output shard has the name, the format and the row order of its input shard. A run that was stopped goes on
    where it ended; it refuses to mix aligners or inputs in one folder.

    \b
    Examples:
      aniso convert --aligner aligner --input text_emb --output stand_ins
      aniso convert --aligner aligner --input text_emb --output stand_ins --calibration corpus --on-existing overwrite
    """
    from aniso_ext.align import load_aligner
    from aniso_ext.convert import convert_embeddings, convert_on_ray, parse_worker, worker_from_environment

    if engine == "ray" and worker is not None:
        raise typer.BadParameter("Ray hands out the work by itself", param_hint="--worker")
    model = load_aligner(aligner)
    with progress_bar("converting") as update:
        options: dict[str, Any] = {
            "batch_rows": batch_rows,
            "calibration": calibration,
            "on_existing": on_existing,
            "on_bad": on_bad,
            "dtype": dtype,
            "progress": update,
        }
        if engine == "ray":
            report = convert_on_ray(aligner, input, output, **options)
        else:
            me = worker_from_environment() if worker is None else parse_worker(worker)
            report = convert_embeddings(model, input, output, worker=me, **options)
    data = {"command": "convert", "method": model.method, "aligner_path": str(aligner), **report.to_dict()}

    def show(console: Console) -> None:
        resumed = f", {report.resumed_shards} of them by an earlier run" if report.resumed_shards else ""
        say(console, f"{report.rows:,} rows by {model.method} in {report.shards} shard(s){resumed}")
        if report.bad_rows:
            say(console, f"{report.bad_rows:,} bad rows ({on_bad}); their indices are in {report.manifest}")
        say(console, f"{output}: written in {report.seconds:.1f} s")

    return Result(data, show)
