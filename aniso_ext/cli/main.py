"""The program: its commands and its own two options."""

from __future__ import annotations

from typing import Annotated

import typer

from aniso_ext.cli import bench, convert, demo, diagnose, doctor, fit, train

app = typer.Typer(
    name="aniso",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from aniso_ext import __version__

        typer.echo(f"aniso {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn embeddings of one modality into stand-ins for another, and measure how good they are.

    Start with `aniso demo`, which needs no data; then fit, convert and diagnose your own.

    A DIR is one file (.npy, .parquet, .safetensors) or a folder of such shards, rows in file order. Of a
    clip-retrieval folder name the half that is meant, e.g. DIR/text_emb.

    Exit codes: 0 done, 1 failed (one line says why; --debug or ANISO_DEBUG=1 for the traceback), 2 bad usage.
    """


for function, summary in (
    (fit.fit, "Learn an aligner from two unpaired sets."),
    (convert.convert, "Turn source embeddings into stand-ins, file by file."),
    (diagnose.diagnose, "Measure a gap, and how well stand-ins close it."),
    (train.train, "Train a multimodal model on text and stand-ins."),
    (demo.demo, "Run all of it on simulated or own pairs; one table."),
    (doctor.doctor, "Show versions, build, backends and what is missing."),
):
    app.command(short_help=summary)(function)
app.add_typer(bench.app, name="bench", short_help="Time the kernels against stock PyTorch and the machine.")


def main() -> None:
    """Entry point of the console script."""
    app()
