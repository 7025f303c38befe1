"""The simulated gap of ``aniso demo``: every method from fit to measured stand-ins, as one table."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from aniso_ext.cli.console import Result, progress_bar, say
from aniso_ext.cli.methods import build_aligner, parse_rank
from aniso_ext.cli.report import (
    alignment_table,
    compare_constants,
    constants_table,
    judge,
    markdown,
    without_energy_curve,
    write_report,
)
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from aniso_ext.worlds import GapWorld

DEFAULT_WIDTH = 1280
DEFAULT_RANK = 128
MAX_PAIRS_OF_FILES = 50_000
HELD_OUT, NEIGHBOURS = 0.25, 20
TIMES = (("fit_seconds", "fit s", 2), ("convert_seconds", "convert s", 2))


def gap_demo(
    *,
    pairs: int | None,
    width: int | None,
    rank: str | None,
    source: Path | None,
    target: Path | None,
    held_out: float,
    methods: str | None,
    k: int,
    out: Path | None,
    refine: bool,
    seed: int,
) -> Result:
    """Fit, convert and judge methods on simulated pairs or on those of files."""
    from aniso_ext import diagnostics
    from aniso_ext.worlds import simulate_gap

    constants: list[dict[str, Any]] = []
    if (source is None) != (target is None):
        raise typer.BadParameter("own files need both --source and --target, with rows that correspond")
    names, parsed_rank = _chosen_methods(methods), parse_rank(rank)
    if source is not None and target is not None:
        if width is not None:
            raise typer.BadParameter("the width of own files is what it is", param_hint="--width")
        y, x = _read_pairs(source, target, pairs or MAX_PAIRS_OF_FILES, seed)
        title = f"Pairs of {source} and {target}"
    else:
        world = _world(width or DEFAULT_WIDTH)
        count = pairs or world.pairs
        assert count is not None  # the worlds of the demo say for how many pairs their constants hold
        y, x = simulate_gap(count, world=world, seed=seed)
        title = "Simulated modality gap"

    if parsed_rank is None:
        parsed_rank = min(DEFAULT_RANK, max(2, y.shape[1] // 8 * 2))

    with tempfile.TemporaryDirectory(prefix="aniso-demo-") as scratch, progress_bar("methods") as update:
        files = _split(Path(scratch), y, x, held_out, seed)
        if source is None:
            gap = diagnostics.gap(y, x)
            constants = compare_constants(gap, world.constants())
        else:
            gap = diagnostics.gap(files.source_test, files.target_test)
        rows = []
        for done, name in enumerate(names):
            update(done, len(names))
            rows.append(_run(name, parsed_rank, files, k, seed, refine))

    data = {
        "command": "demo",
        "world": "simulated" if source is None else {"source": str(source), "target": str(target)},
        "width": int(y.shape[1]),
        "train_rows": files.train_rows,
        "held_out_pairs": files.test_rows,
        "seed": seed,
        "refine": refine,
        "gap": gap.to_dict(),
        "constants": constants,
        "methods": rows,
    }
    written = [] if out is None else write_report(out, data, markdown(title, gap, rows))

    def show(console: Console) -> None:
        say(
            console,
            f"{title}: fitted on {files.train_rows:,} unpaired rows a side, judged on {files.test_rows:,} pairs\n",
        )
        say(console, without_energy_curve(gap))
        console.print()
        if constants:
            console.print(constants_table(constants))
            console.print()
        console.print(alignment_table(rows, TIMES))
        for path in written:
            say(console, f"written: {path}")

    return Result({**data, "files": written}, show)


@dataclass(frozen=True)
class Files:
    """The split on disk: what methods are fitted on, and what they are judged on."""

    source_train: Path
    target_train: Path
    source_test: Path
    target_test: Path
    stand_ins: Path
    train_rows: int
    test_rows: int


def _chosen_methods(text: str | None) -> list[str]:
    from aniso_ext.align import list_aligners

    if text is None:
        return list_aligners()
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list_aligners():
            raise typer.BadParameter(
                f"there is no method {name!r}; choose of {', '.join(list_aligners())}", param_hint="--methods"
            )
    if not names:
        raise typer.BadParameter("name at least one method", param_hint="--methods")
    return names


def _world(width: int) -> GapWorld:
    from aniso_ext.worlds import GapWorld

    return GapWorld() if width == DEFAULT_WIDTH else GapWorld.small(width)


def _read_pairs(source: Path, target: Path, limit: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    from aniso_ext.data import open_embeddings

    y, x = open_embeddings(source), open_embeddings(target)
    if len(y) != len(x):
        raise InputError(f"{source} has {len(y):,} rows and {target} has {len(x):,}: row i of both must be one pair")
    if len(y) <= limit:
        return y.numpy(), x.numpy()
    chosen = np.sort(np.random.default_rng(seed).choice(len(y), limit, replace=False))
    return y.read(chosen), x.read(chosen)


def _split(folder: Path, y: np.ndarray, x: np.ndarray, held_out: float, seed: int) -> Files:
    """Write the held-out pairs, and the training rows with both sides in an order of their own."""
    import numpy as np

    generator = np.random.default_rng(seed)
    order = generator.permutation(len(y))
    test_rows = round(held_out * len(y))
    test, train = np.sort(order[:test_rows]), order[test_rows:]
    files = Files(
        source_train=folder / "source_train.npy",
        target_train=folder / "target_train.npy",
        source_test=folder / "source_test.npy",
        target_test=folder / "target_test.npy",
        stand_ins=folder / "stand_ins",
        train_rows=len(train),
        test_rows=test_rows,
    )
    np.save(files.source_train, y[train])
    np.save(files.target_train, x[generator.permutation(train)])
    np.save(files.source_test, y[test])
    np.save(files.target_test, x[test])
    return files


def small_stages() -> dict[str, Any]:
    """Options of AnisoAlign under which both stages train in seconds, at a cost in what they learn."""
    from aniso_ext.align import PriorOptions, RefinementOptions, TrainingOptions

    return {
        "prior": PriorOptions(width=128, blocks=2),
        "prior_training": TrainingOptions(steps=200, batch_rows=256),
        "refinement": RefinementOptions(hidden=256),
        "refinement_training": TrainingOptions(steps=150, batch_rows=256),
    }


def _run(name: str, rank: int | float, files: Files, k: int, seed: int, refine: bool) -> dict[str, Any]:
    """Fit, convert from file to file, and judge one method."""
    from aniso_ext.convert import convert_embeddings

    accepted = build_aligner(name, {}).get_params()
    options = {"rank": rank, "seed": seed, "refine": refine, **small_stages()}
    aligner = build_aligner(name, {option: value for option, value in options.items() if option in accepted})
    started = time.perf_counter()
    aligner.fit(files.source_train, files.target_train)
    fitted = time.perf_counter()
    folder = files.stand_ins / name
    convert_embeddings(aligner, files.source_test, folder)
    converted = time.perf_counter()
    row = judge(name, files.source_test, files.target_test, folder, k=k, max_pairs=None, seed=seed)
    return {**row, "fit_seconds": fitted - started, "convert_seconds": converted - fitted}
