"""``aniso bench``: kernels against stock PyTorch, conversions against copies, both against what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, progress_bar, say
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from aniso_ext.bench.kernels import Options
    from aniso_ext.bench.records import Run
    from aniso_ext.bench.suite import BenchCase

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Time kernels against stock PyTorch and conversions against copies, and measure the ceilings of this machine."""


@app.command()
@command
def kernels(
    case: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="NAME", help="A case, or a pattern such as 'correct-*'; may be given again.",
                     show_default="all"),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="Rows of a batch.",
                                 show_default="1048576 on a GPU, 2048 on a CPU"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, metavar="N", help="Samples of each variant.",
                                 show_default="25 on a GPU, 5 on a CPU"),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME", help="A backend: cuda, triton, cpu (on the CPU) or reference; may be "
                     "given again.", show_default="all with kernels for the device"),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Also time single calls of small batches.")
    ] = True,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Also time torch.compile of stock PyTorch.",
                                  show_default="on a GPU"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write DEVICE_kernels.csv, DEVICE_latency.csv and "
                                  "DEVICE_bench.json here."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option("--commit", help="Commit to record, where git cannot be asked.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the cases with their goals and stop.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Result:  # fmt: skip
    """Check every variant of every case against the float64 reference, then time them in turn; one table.

    Variants: our backends; `eager`, stock PyTorch step by step; `compiled`, torch.compile of stock PyTorch with the
    kernels' algebra; `compiled diagonal`, torch.compile of the steps with the paper's diagonal complement. Times are
    medians with a cold cache. The floor is the larger of the fewest bytes at copy speed and of the operations at the
    speed of a matrix product, both measured first. A variant that is wrong is not timed, and the exit code is 1.

    \b
    Examples:
      aniso bench kernels
      aniso bench kernels --list
      aniso bench kernels --case 'correct-d1280-*' --backend cuda --no-compile
      aniso bench kernels --out results --commit abc1234
    """
    from aniso_ext.bench import suite, tables

    if listed:
        return _list_cases(suite.CASES)
    try:
        cases = suite.select(case or [])
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--case") from None
    options = _options(rows, rounds, backend or [], compile)
    written: list[Path] = []

    def save(run: Run) -> None:
        from aniso_ext.bench import environment, records

        if out is not None:
            written[:] = records.write(run, out, environment.short_name(options.device))

    run = _run(cases, options, latency, backend or [], commit, save)
    failed = [f"{row.case}, {row.variant}: {row.reason}" for row in run.failed]

    def show(console: Console) -> None:
        say(console, "  ".join(f"{name} {value}" for name, value in run.facts.items()))
        console.print()
        console.print(tables.ceilings_table(run.ceilings))
        console.print()
        console.print(tables.kernels_table(run.kernels))
        if run.latency:
            console.print()
            console.print(tables.latency_table(run.latency))
        for path in written:
            say(console, f"written: {path}")

    data = {"command": "bench kernels", "rows": options.rows, "rounds": options.rounds, "run": run, "files": written}
    failure = f"wrong or failed, and not timed: {'; '.join(failed)}" if failed else None
    return Result(data, show, failure)


@app.command()
@command
def convert(
    rows: Annotated[
        list[int] | None, typer.Option("--rows", min=1, metavar="N", help="Rows; may be given again.",
                                       show_default="1048576 and 4194304"),
    ] = None,
    width: Annotated[int, typer.Option("--width", min=2, metavar="D", help="Width of the embeddings.")] = 512,
    rank: Annotated[int, typer.Option("--rank", min=2, metavar="R", help="Rank of anisoalign.")] = 128,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Samples of each variant.")] = 3,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="NAME", help="A variant, or a pattern such as '*files'; may be given again.",
                     show_default="all"),
    ] = None,
    pickled_rows: Annotated[
        int, typer.Option("--pickled-rows", min=1, metavar="N", help="Most rows for NumPy over pickled records.")
    ] = 2**17,
    device: Annotated[
        str | None, typer.Option("--device", metavar="cuda|cpu", help="Device.", show_default="the GPU if there is one")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", metavar="DIR", help="Where files are made and deleted again.",
                                  show_default="the folder for temporary files"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write DEVICE_convert.csv here, case by case.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option("--commit", help="Commit to record, where git cannot be asked.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Result:  # fmt: skip
    """Time conversions of float16 .npy shards from files to files.

    Beside `anisoalign` (the closed form) and `realign` run `cp` of the same files, each map alone on arrays in memory,
    and ReAlign as one NumPy process over pickled records; on a GPU also the conversion without its files, the device's
    part of it from pinned buffers to pinned buffers, and copies over the bus. Every sample is a process of its own,
    whose peak memory is kept. Files have been read once before, and every output is brought to disk. Nothing is timed
    before the results agree.

    \b
    Examples:
      aniso bench convert
      aniso bench convert --rows 1048576 --rows 16777216 --scratch /data --out benchmarks/results
      aniso bench convert --device cuda --variant '*buffers' --variant bus
    """
    import torch

    from aniso_ext.bench import convert as bench
    from aniso_ext.bench import environment, records, tables

    found = _device(device)
    options = bench.Options(width, rank, rounds, pickled_rows, str(found), scratch, tuple(variant or ()))
    try:
        bench.select(options.device, options.variants)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--variant") from None
    facts = {**environment.facts(torch.device(found), commit), **bench.facts(), "rounds": str(rounds)}
    times: list[bench.ConversionTime] = []
    written: list[Path] = []
    clock = _Clock()
    for count in rows or bench.DEFAULT_ROWS:
        with progress_bar(f"{count:,} rows") as update:
            times += bench.measure(count, options, update)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            written[:] = [out / f"{environment.short_name(torch.device(found))}_convert.csv"]
            records.write_table(written[0], facts, [asdict(time) for time in times])
        clock.lap(f"{count:,} rows")

    def show(console: Console) -> None:
        say(console, "  ".join(f"{name} {value}" for name, value in facts.items()))
        console.print()
        console.print(tables.conversions_table(times))
        for path in written:
            say(console, f"written: {path}")

    return Result({"command": "bench convert", "facts": facts, "times": times, "files": written}, show)


@app.command()
@command
def ceilings(
    device: Annotated[
        str | None, typer.Option("--device", metavar="cuda|cpu", help="Device.", show_default="the GPU if there is one")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Measure what the machine can do: a copy in memory and matrix products in each format."""
    import torch

    from aniso_ext.bench import environment, tables
    from aniso_ext.bench.ceilings import measure
    from aniso_ext.bench.kernels import as_ceilings

    found = torch.device(_device(device))
    facts, measured = environment.facts(found), as_ceilings(measure(found))

    def show(console: Console) -> None:
        say(console, "  ".join(f"{name} {value}" for name, value in facts.items()))
        console.print(tables.ceilings_table(measured))

    return Result({"command": "bench ceilings", **facts, "ceilings": measured}, show)


@app.command()
@command
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.csv", help="Kernels of one run.")],
    second: Annotated[Path, typer.Argument(metavar="B.csv", help="Kernels of another run, say of another commit.")],
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Set two runs side by side: time of the second over the first, for each variant of each case."""
    from aniso_ext.bench import records, tables

    ratios, alone = records.compare(first, second)
    headers = [records.read_table(path)[0] for path in (first, second)]

    def show(console: Console) -> None:
        for path, header in zip((first, second), headers, strict=True):
            facts = "  ".join(header.get(name, "?") for name in ("device", "commit", "date", "torch"))
            say(console, f"{path}: {facts}")
        console.print()
        console.print(tables.comparison_table(ratios))
        if alone:
            say(console, f"in one of them alone: {', '.join(sorted(alone))}")

    return Result({"command": "bench compare", "ratios": ratios, "only_in_one": sorted(alone)}, show)


@app.command()
@command
def figure(
    table: Annotated[Path, typer.Argument(metavar="KERNELS.csv", help="Kernels of one run.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Picture to write; its suffix is the format.")],
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Draw a run as a roofline: every variant under the measured ceilings. Needs matplotlib."""
    from aniso_ext.bench.roofline import draw

    draw(table, out)
    return Result({"command": "bench figure", "files": [out]}, lambda console: say(console, f"written: {out}"))


def _device(name: str | None) -> str:
    """The device that was asked for, or the GPU if there is one."""
    import torch

    if name not in (None, "cuda", "cpu"):
        raise typer.BadParameter("choose cuda or cpu", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device: --device cpu measures the processor")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _options(rows: int | None, rounds: int | None, names: list[str], compile: bool | None) -> Options:
    import torch

    from aniso_ext.bench.kernels import DEFAULT_ROUNDS, DEFAULT_ROWS, Options, usable_backends

    on_gpu = torch.cuda.is_available() and set(names) != {"cpu"}
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Options(
        rows=rows or DEFAULT_ROWS[device.type],
        rounds=rounds or DEFAULT_ROUNDS[device.type],
        backends=usable_backends(names, device),
        device=device,
        compile=device.type == "cuda" if compile is None else compile,
    )


def _run(
    cases: tuple[BenchCase, ...],
    options: Options,
    latency: bool,
    names: list[str],
    commit: str | None,
    save: Callable[[Run], None],
) -> Run:
    """Everything that was asked for; saved after every case, so that a run that is cut off keeps what it measured."""
    from aniso_ext.bench import environment, latencies
    from aniso_ext.bench.ceilings import measure
    from aniso_ext.bench.kernels import as_ceilings, run_case
    from aniso_ext.bench.records import Run

    clock = _Clock()
    ceilings = measure(options.device, [case.format for case in cases])
    clock.lap("ceilings")
    run = Run(environment.facts(options.device, commit), as_ceilings(ceilings))
    with progress_bar("cases") as update:
        for done, case in enumerate(cases):
            update(done, len(cases))
            run.kernels += run_case(case, options, ceilings)
            save(run)
            clock.lap(case.name)
    if latency:
        run.latency = latencies.run(options.device, names[0] if len(names) == 1 else "auto", options.compile)
        save(run)
        clock.lap("latency")
    return run


class _Clock:
    """Says on standard error how long every part took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, what: str) -> None:
        now = time.perf_counter()
        typer.echo(f"aniso: {what}: {now - self._last:.1f} s", err=True)
        self._last = now


def _list_cases(cases: tuple[BenchCase, ...]) -> Result:
    def goal(case: BenchCase) -> str:
        return f"≤ {case.goal.floors:.3g} × floor, ≥ {case.goal.over_compiled:g} × torch.compile"

    goals = {case.name: goal(case) for case in cases}
    width = max(map(len, goals))

    def show(console: Console) -> None:
        for name, text in goals.items():
            say(console, f"{name:{width}}  {text}")

    data: dict[str, Any] = {"command": "bench kernels", "cases": goals}
    return Result(data, show)
