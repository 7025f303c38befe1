"""``aniso import-pickle``: turn pickled records into an embedding set, once and without running them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aniso_ext.cli.console import Debug, Json, Result, command, say, spinner

if TYPE_CHECKING:
    from rich.console import Console


@command
def import_pickle(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pickle of records: .pkl, protocol 0 to 5.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for text_emb, img_emb and metadata.")],
    source_key: Annotated[
        str | None,
        typer.Option("--source-key", metavar="FIELD", help="Field that becomes text_emb.", show_default="by its name"),
    ] = None,
    target_key: Annotated[
        str | None,
        typer.Option("--target-key", metavar="FIELD", help="Field that becomes img_emb.", show_default="by its name"),
    ] = None,
    dtype: Annotated[
        Literal["float16", "float32", "float64"] | None,
        typer.Option("--dtype", help="Number format of the output.", show_default="that of the pickle"),
    ] = None,
    rows_per_shard: Annotated[
        int, typer.Option("--rows-per-shard", min=1, metavar="N", help="Rows of each file.")
    ] = 1_000_000,
    json: Json = False,
    debug: Debug = False,
) -> Result:
    """Turn pickled records into a clip-retrieval folder, which everything else here reads.

    The pickle is read as data and never run: anything in it but NumPy arrays, lists, dicts, texts and numbers is
    refused. It holds a dict of columns, or a list with a dict for each row. Fields with one text or number a row become
    the metadata.

    \b
    Examples:
      aniso import-pickle pairs.pkl --out pairs
      aniso import-pickle pairs.pkl --out pairs --source-key captions_vec --target-key photos_vec
    """
    from aniso_ext import data as embedding_data

    with spinner(f"reading {file.name}"):
        done = embedding_data.import_pickle(
            file, out, source_key=source_key, target_key=target_key, dtype=dtype, rows_per_shard=rows_per_shard
        )
    data = {
        "command": "import-pickle",
        "file": str(file),
        "out": str(out),
        "rows": done.rows,
        "width": done.width,
        "source": done.source,
        "target": done.target,
        "metadata": done.metadata,
        "left_out": done.left_out,
        "files": done.files,
    }

    def show(console: Console) -> None:
        for half, name in (("text_emb", done.source), ("img_emb", done.target)):
            if name is not None:
                say(console, f"{half}: field {name!r}, {done.rows:,} rows of width {done.width}")
        if done.metadata:
            say(console, f"metadata: {', '.join(done.metadata)}")
        for name, reason in done.left_out.items():
            say(console, f"left out: field {name!r} {reason}")
        say(console, f"{out}: written, {len(done.files)} file(s)")

    return Result(data, show)
