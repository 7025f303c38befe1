"""What every command shares: results as text or JSON, errors as exit codes, progress on a terminal."""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aniso_ext.errors import AnisoError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also: ANISO_DEBUG=1).")]

# a table keeps its columns when the output goes to a file or a pipe
_WIDTH_WITHOUT_TERMINAL = 140


@dataclass(frozen=True)
class Result:
    """What a command found out: ``data`` for machines, ``show`` prints the same for people.

    ``failure`` says in a line what went wrong although there is a result; the command then ends with exit code 1.
    """

    data: Mapping[str, Any]
    show: Callable[[Console], None]
    failure: str | None = None


def command(body: Callable[..., Result]) -> Callable[..., None]:
    """Make a function with options ``json`` and ``debug`` a command.

    With ``--json`` whatever is printed on the way goes to standard error. An :class:`AnisoError` or a failed file
    operation ends in one line on standard error and exit code 1; any other exception is a defect and keeps its
    traceback.
    """

    @functools.wraps(body)
    def run(*arguments: Any, **options: Any) -> None:
        as_json = bool(options["json"])
        try:
            redirected = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
            with redirected, _short_warnings():
                result = body(*arguments, **options)
        except (AnisoError, OSError) as error:
            if options["debug"] or os.environ.get("ANISO_DEBUG", "0") not in ("", "0"):
                raise
            typer.echo(f"aniso: error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None
        if as_json:
            typer.echo(json_module.dumps(to_jsonable(result.data), indent=2, allow_nan=False))
        else:
            result.show(output())
        if result.failure is not None:
            typer.echo(f"aniso: error: {result.failure}", err=True)
            raise typer.Exit(1)

    return run


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Each warning once, in one line without the place in the code."""
    seen = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            typer.echo(f"aniso: warning: {text}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def to_jsonable(value: Any) -> Any:
    """Plain Python for :mod:`json`: arrays become lists, paths strings, non-finite numbers null."""
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value))
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence):
        return [to_jsonable(item) for item in value]
    raise TypeError(f"no JSON form for {type(value).__name__}")


def output() -> Console:
    """Standard output, wide enough for tables when it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, soft_wrap=False)


def say(console: Console, text: str) -> None:
    """Print a text as it is: no markup, no line breaks of the console's own."""
    console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[None]:
    """A line that says what is going on, on standard error and only on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, only on a terminal; yields ``update(done, total)``."""
    if not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


@contextlib.contextmanager
def stage_bars(text: str) -> Iterator[Callable[[str, int, int], None]]:
    """``text`` with a spinner, and a bar for each stage that reports; on standard error, only on a terminal.

    Yields ``update(stage, done, total)``.
    """
    if not sys.stderr.isatty():
        yield _ignore_stage
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], description=f"{stage}: step {done} of {total}", completed=done, total=total)

        yield update


def _ignore_stage(stage: str, done: int, total: int) -> None:
    """Stages that nobody watches."""


def _ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""
