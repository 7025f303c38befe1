"""``aniso convert``: write the stand-ins of a set of source embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say
from aniso_ext.cli.signals import stop_requests
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from aniso_ext.align import Aligner
    from aniso_ext.convert import ConversionPlan, ConversionReport, Worker


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
        int | None,
        typer.Option(
            "--batch-rows",
            min=1,
            metavar="N",
            help="Rows in memory at a time.",
            show_default="8192, or what --memory allows",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "float64"] | None,
        typer.Option(
            "--dtype", help="Number format of the output; bfloat16 for safetensors only.", show_default="the input's"
        ),
    ] = None,
    format: Annotated[
        Literal["npy", "parquet", "safetensors", "arrow"] | None,
        typer.Option("--format", help="File format of the output.", show_default="that of the input"),
    ] = None,
    kind: Annotated[
        Literal["image", "text"] | None,
        typer.Option("--kind", help="Which half of a clip-retrieval folder with both to convert."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--column",
            metavar="NAME",
            help="Column of a table, or tensor of a .safetensors file, with the embeddings.",
            show_default="embedding, else the only fitting one",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Most memory of the batches, e.g. 2GB, beside what Python and PyTorch take.",
            show_default="no limit",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="Where to map rows, e.g. cuda.", show_default="the CPU"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, metavar="N", help="Threads on the CPU.", show_default="PyTorch's"),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            "--worker",
            metavar="N/M",
            help="Be worker N, from 0, of M that share this conversion.",
            show_default="from torchrun or Slurm, else alone",
        ),
    ] = None,
    wait: Annotated[
        bool | None,
        typer.Option(
            "--wait/--no-wait",
            help="Wait for the corpus sums of other workers, or end and be run again.",
            show_default="wait under torchrun and srun",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Who works: this process, or Ray (that of RAY_ADDRESS, else a local one)."),
    ] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and how long it would take; write nothing.")
    ] = False,
    verify: Annotated[
        Literal["all", "sample"] | None,
        typer.Option(
            "--verify", help="Check finished files instead: hashes, and stand-ins of all rows or a sample made again."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Turn source embeddings into stand-ins for the target modality, file by file.

    Every output shard has the name, the format and the row order of its input shard. A run that was stopped goes on
    where it ended; it refuses to mix aligners or inputs in one folder. SIGINT and SIGTERM end it after the shard in
    hand, a second one at once.

    Many processes may share a conversion: start the same command in each, under torchrun or Slurm, or with --worker.
    The files are the same whatever their number.

    \b
    Examples:
      aniso convert --aligner aligner --input text_emb --output stand_ins
      aniso convert --aligner aligner --input text_emb --output stand_ins --calibration corpus --on-existing overwrite
      aniso convert --aligner aligner --input text_emb --output stand_ins --worker 3/16
      aniso convert --aligner aligner --input text_emb --output stand_ins --verify sample
    """
    if dry_run and verify:
        raise typer.BadParameter("--dry-run and --verify exclude each other")
    if engine == "ray" and worker is not None:
        raise typer.BadParameter("Ray hands out the work by itself", param_hint="--worker")
    with stop_requests("the shard in hand") as stop:
        from aniso_ext.align import load_aligner
        from aniso_ext.convert import (
            convert_embeddings,
            convert_on_ray,
            local_device,
            parse_worker,
            worker_from_environment,
        )
        from aniso_ext.convert.memory import parse_size

        told = "0/1" if engine == "ray" else worker
        me = worker_from_environment() if told is None else _parsed("--worker", parse_worker, told)
        budget = None if memory is None else _parsed("--memory", parse_size, memory)
        model = load_aligner(aligner)
        options: dict[str, Any] = {
            "batch_rows": batch_rows,
            "calibration": calibration,
            "on_bad": on_bad,
            "dtype": dtype,
            "format": format,
            "kind": kind,
            "column": column,
            "memory": budget,
            "device": device if engine == "ray" else local_device(device),
            "threads": threads,
            "worker": me,
        }
        found = {"command": "convert", "method": model.method, "aligner_path": str(aligner)}
        if dry_run:
            return _preview(model, input, output, found, me, {**options, "on_existing": on_existing})
        if verify:
            return _verify(model, input, output, found, me, {**options, "rows": verify, "stop": stop})
        options |= {"on_existing": on_existing, "stop": stop}
        with progress_bar("converting") as update:
            if engine == "ray":
                del options["worker"]
                report = convert_on_ray(aligner, input, output, progress=update, **options)
            else:
                options["wait"] = me.together if wait is None else wait
                report = convert_embeddings(model, input, output, progress=update, **options)
        return _converted(model, output, found, me, on_bad, report)


def _parsed(option: str, parse: Callable[[str], Any], text: str) -> Any:
    """The value of an option; what cannot be read is bad usage."""
    try:
        return parse(text)
    except InputError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def _converted(
    model: Aligner, output: Path, found: dict[str, Any], worker: Worker, on_bad: str, report: ConversionReport
) -> Result:
    def show(console: Console) -> None:
        _say_worker(console, worker)
        if report.missing_sums:
            say(console, _missing_sums(report))
            return
        resumed = f", {report.resumed_shards} of them by an earlier run" if report.resumed_shards else ""
        say(console, f"{report.rows:,} rows by {model.method} in {report.shards} shard(s){resumed}")
        if report.bad_rows:
            say(console, f"{report.bad_rows:,} bad rows ({on_bad}); their indices are in {report.manifest}")
        if report.missing_shards:
            shards = report.shards + report.missing_shards
            missing = f"{report.missing_shards} of {shards} shards of the conversion are not yet"
            say(console, f"this worker's shards are done; {missing}")
        else:
            say(console, f"{output}: written in {report.seconds:.1f} s")

    return Result({**found, **report.to_dict()}, show)


def _missing_sums(report: ConversionReport) -> str:
    return (
        f"this worker's sums for the corpus mean are done; those of {report.missing_sums} of "
        f"{report.shards + report.missing_shards} shards are not yet: run the same command again once all workers have "
        "ended"
    )


def _preview(
    model: Aligner, input: Path, output: Path, found: dict[str, Any], worker: Worker, options: dict[str, Any]
) -> Result:
    from aniso_ext.convert import preview_conversion

    plan = preview_conversion(model, input, output, **options)

    def show(console: Console) -> None:
        _say_worker(console, worker)
        for line in _plan_lines(plan):
            say(console, line)

    return Result({**found, **plan.to_dict()}, show)


def _plan_lines(plan: ConversionPlan) -> list[str]:
    from aniso_ext.convert.memory import shown_size

    lines = [
        f"{plan.rows:,} rows in {plan.shards} shard(s): {shown_size(plan.bytes_in)} in, {shown_size(plan.bytes_out)} "
        f"out as {plan.dtype}, {plan.batch_rows} rows at a time",
        f"from {plan.outputs[0]} to {plan.outputs[-1]}" if plan.shards > 1 else f"to {plan.outputs[0]}",
    ]
    if plan.workers > 1:
        fewest, most = min(plan.share_rows), max(plan.share_rows)
        lines.append(
            f"{plan.workers} workers with {fewest:,} to {most:,} rows each; this one has "
            f"{plan.share_shards[plan.worker]} shard(s) of {plan.share_rows[plan.worker]:,} rows"
        )
    if plan.done_shards:
        lines.append(f"{plan.done_shards} of {plan.shards} shards are done")
    lines.append(
        f"{plan.rows_left:,} rows left: about {plan.seconds_left:.1f} s, at the {plan.rows_per_second:,.0f} rows/s of "
        "the first batches"
    )
    return [*lines, "nothing was written"]


def _verify(
    model: Aligner, input: Path, output: Path, found: dict[str, Any], worker: Worker, options: dict[str, Any]
) -> Result:
    from aniso_ext.convert import verify_conversion

    with progress_bar("verifying") as update:
        report = verify_conversion(model, input, output, progress=update, **options)

    def show(console: Console) -> None:
        _say_worker(console, worker)
        say(console, f"{report.shards} shard(s) of {report.rows:,} rows: files as in {report.manifest}")
        say(console, f"{report.checked_rows:,} stand-ins made again: the same to the bit ({report.seconds:.1f} s)")

    return Result({**found, **report.to_dict()}, show)


def _say_worker(console: Console, worker: Worker) -> None:
    if worker.world > 1:
        say(console, f"{worker} ({worker.origin})")
