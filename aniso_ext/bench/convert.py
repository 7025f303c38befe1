"""`aniso bench convert`: files to files against a copy of the files, the map alone, and NumPy over pickled records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from aniso_ext.bench.convert_jobs import IN_MEMORY_ROWS, Job
from aniso_ext.bench.pickled_realign import read_embeddings, realign_records, write_records
from aniso_ext.bench.timing import Times
from aniso_ext.errors import AnisoError, InputError

DEFAULT_ROWS = (2**20, 2**22)
SHARD_ROWS = 2**20
RECORDS_PER_FILE = 2**15
FIT_ROWS = 2**13
ITEM_BYTES = 2
_BLOCK_ROWS = 2**15


@dataclass(frozen=True)
class Options:
    """What is measured: sizes, how often, where."""

    width: int
    rank: int
    rounds: int
    pickled_rows: int
    device: str
    scratch: Path | None
    variants: tuple[str, ...] = ()
    """Patterns of their names; all where there is none."""

    @property
    def row_bytes(self) -> int:
        return ITEM_BYTES * self.width


@dataclass(frozen=True)
class Variant:
    """One thing to time: its name, the job that does it, and the aligner it loads."""

    name: str
    job: str
    aligner: str = "anisoalign"


@dataclass
class ConversionTime:
    """One variant at one number of rows. ``gb_per_s`` counts the float16 rows that go in and those that come out."""

    rows: int
    D: int
    R: int
    variant: str
    measured_rows: int
    seconds: float
    p20: float
    p80: float
    rows_per_s: float
    gb_per_s: float
    of_copy: float | None = None  # rows/s as a share of cp's
    of_op: float | None = None  # and of the map's alone
    of_bus: float | None = None  # and of the copies to the device and back
    times_pickled: float | None = None
    peak_mb: float | None = None


COPY, OP, CONVERT = "cp", "anisoalign, in memory", "anisoalign, files"
MEMORY, BUFFERS, BUS = "anisoalign, without files", "anisoalign, pinned buffers", "bus"
REALIGN_OP, REALIGN, REALIGN_FIT = "realign, in memory", "realign, files", "realign, fit and files"
PICKLED = "realign, NumPy and pickled records"


def variants(device: str) -> list[Variant]:
    """Everything that is timed on a device."""
    found = [
        Variant(COPY, "copy"),
        Variant(OP, "op"),
        Variant(CONVERT, "convert"),
        Variant(REALIGN_OP, "op", "realign"),
        Variant(REALIGN, "convert", "realign"),
        Variant(REALIGN_FIT, "fit_and_convert", "realign"),
        Variant(PICKLED, "pickled", "realign"),
    ]
    if device.startswith("cuda"):
        found += [Variant(MEMORY, "memory"), Variant(BUFFERS, "buffers"), Variant(BUS, "bus")]
    return found


def select(device: str, patterns: Sequence[str]) -> list[Variant]:
    """The variants of a device whose name matches one of the patterns; all of them without patterns.

    Raises:
        InputError: a pattern matches none; the names are listed.
    """
    known = variants(device)
    for pattern in patterns:
        if not any(fnmatchcase(variant.name, pattern) for variant in known):
            names = "; ".join(variant.name for variant in known)
            raise InputError(f"no variant on {device} matches {pattern!r}: there are {names}")
    return [v for v in known if not patterns or any(fnmatchcase(v.name, pattern) for pattern in patterns)]


def measure(rows: int, options: Options, progress: Callable[[int, int], None]) -> list[ConversionTime]:
    """One case: files are made, every variant runs once a round in an order that turns, files are deleted.

    Raises:
        InputError: the scratch folder has too little space.
        AnisoError: a variant failed, or two that compute the same map disagree.
    """
    with _scratch(rows, options) as folder:
        _prepare(folder, rows, options)
        _check(folder, options)
        found = select(options.device, options.variants)
        samples: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in found}
        for number in range(options.rounds):
            turn = number % len(found)
            for done, variant in enumerate(found[turn:] + found[:turn]):
                progress(number * len(found) + done, options.rounds * len(found))
                samples[variant.name].append(_sample(folder, variant, options.device))
    times = [_time(rows, variant.name, samples[variant.name], options) for variant in found]
    _compare(times)
    return times


def _time(rows: int, name: str, samples: Sequence[dict[str, float]], options: Options) -> ConversionTime:
    measured = int(samples[0]["rows"])
    times = Times.of([sample["seconds"] for sample in samples])
    rate = measured / times.median
    return ConversionTime(
        rows=rows,
        D=options.width,
        R=options.rank,
        variant=name,
        measured_rows=measured,
        seconds=times.median,
        p20=times.p20,
        p80=times.p80,
        rows_per_s=rate,
        gb_per_s=2 * options.row_bytes * rate / 1e9,
        peak_mb=max(sample["peak_mb"] for sample in samples),
    )


def _compare(times: Sequence[ConversionTime]) -> None:
    rates = {time.variant: time.rows_per_s for time in times}
    for time in times:

        def share(other: str, rate: float = time.rows_per_s) -> float | None:
            return rate / rates[other] if other in rates else None

        if time.variant in (CONVERT, REALIGN, REALIGN_FIT):
            time.of_copy = share(COPY)
            time.of_op = share(REALIGN_OP if time.variant.startswith("realign") else OP)
        if time.variant in (REALIGN, REALIGN_FIT):
            time.times_pickled = share(PICKLED)
        if time.variant in (MEMORY, BUFFERS):
            time.of_bus = share(BUS)
        if time.variant == COPY:
            time.peak_mb = None  # that of cp would say nothing


@contextmanager
def _scratch(rows: int, options: Options) -> Iterator[Path]:
    """An empty folder with room for the case, deleted afterwards."""
    records = min(rows, options.pickled_rows) * (4 * options.width + 256)
    needed = 2 * rows * options.row_bytes + 2 * records
    parent = Path(tempfile.gettempdir()) if options.scratch is None else options.scratch
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if needed > 0.95 * free:
        raise InputError(
            f"{rows:,} rows need {needed / 1e9:.1f} GB in {parent}, which has {free / 1e9:.1f} GB left: name another "
            "folder with --scratch, or fewer rows"
        )
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def _prepare(folder: Path, rows: int, options: Options) -> None:
    """Shards, records, a target, and an aligner of each kind."""
    from aniso_ext.align import make_aligner
    from aniso_ext.data import EmbeddingWriter

    rng = np.random.default_rng(0)
    block = _unit_rows(rng, min(rows, _BLOCK_ROWS), options.width)
    target = _unit_rows(rng, FIT_ROWS, options.width)
    np.save(folder / "target.npy", target)
    for name in ("input", "records"):
        (folder / name).mkdir()
    for first in range(0, rows, SHARD_ROWS):
        last = min(first + SHARD_ROWS, rows)
        path = folder / "input" / f"{first // SHARD_ROWS:04d}.npy"
        with EmbeddingWriter(path, dtype="float16", width=options.width) as writer:
            for start in range(first, last, _BLOCK_ROWS):
                # the same rows with their columns turned: other values at a fraction of the time
                turned = np.roll(block, start // _BLOCK_ROWS, axis=1)
                writer.write(turned[: last - start])
    count = min(rows, options.pickled_rows)
    for first in range(0, count, RECORDS_PER_FILE):
        last = min(first + RECORDS_PER_FILE, count)
        rolled = np.roll(block, first // _BLOCK_ROWS, axis=1)[: last - first]
        write_records(folder / "records" / f"{first:08d}-{last}.pkl", rolled, first)
    fitted = block[:FIT_ROWS]
    make_aligner("anisoalign", rank=options.rank, refine=False).fit(fitted, target).save_pretrained(
        folder / "anisoalign"
    )
    make_aligner("realign").fit(fitted, target).save_pretrained(folder / "realign")


def _unit_rows(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Unit rows in float16 with a common mean and a decaying spectrum: neither centred nor white."""
    mean = rng.standard_normal(width).astype(np.float32) / width**0.5
    scale = (np.arange(1, width + 1, dtype=np.float32) ** -0.5)[rng.permutation(width)]
    values = mean + rng.standard_normal((rows, width), dtype=np.float32) * (0.3 * scale)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def _check(folder: Path, options: Options) -> None:
    """Nothing is timed before the same rows come out of NumPy over records, of the map and of a conversion."""
    from aniso_ext.align import load_aligner, make_aligner
    from aniso_ext.convert import convert_embeddings

    first = sorted((folder / "records").iterdir())[0]
    rows = read_embeddings(first).astype(np.float16)
    target = np.load(folder / "target.npy", allow_pickle=False)
    output = folder / "check"
    output.mkdir()
    exact = target.astype(np.float64)
    realign_records([first], output, exact.mean(axis=0), float(exact.var(axis=0).sum()))
    aligner = make_aligner("realign").fit(rows, target)
    _agree("realign and NumPy over records", aligner.transform(rows), read_embeddings(output / first.name))
    for name in ("anisoalign", "realign"):
        aligner = load_aligner(folder / name)
        if "device" in aligner.parameter_names():
            aligner.set_params(device=options.device)
        convert_embeddings(aligner, rows, output / f"{name}.npy")
        converted = np.load(output / f"{name}.npy", allow_pickle=False)
        _agree(f"{name} in memory and in files", aligner.transform(rows), converted)
    shutil.rmtree(output)


def _agree(what: str, first: np.ndarray, second: np.ndarray) -> None:
    error = float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max())
    allowed = 2 * float(np.finfo(np.float16).eps)  # rows are unit vectors, rounded to float16 at both ends
    if not error <= allowed:
        raise AnisoError(f"{what} differ by {error:.1e}, allowed {allowed:.1e}: nothing was timed")


def _sample(folder: Path, variant: Variant, device: str) -> dict[str, float]:
    """One run in a process of its own, after everything it will read has been read once."""
    output = folder / "output"
    output.mkdir()
    job = Job(
        str(folder / "input"),
        str(folder / "records"),
        str(folder / "target.npy"),
        str(folder / variant.aligner),
        str(output),
        device,
    )
    _warm(folder / ("records" if variant.job == "pickled" else "input"), variant.job)
    command = [sys.executable, "-m", "aniso_ext.bench.convert_jobs", variant.job, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(output)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AnisoError(f"{variant.name} failed: {reason}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _warm(folder: Path, job: str) -> None:
    """Read the files, so that the page cache holds what it can of them."""
    if job in ("op", "memory", "buffers", "bus"):
        return
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def facts() -> dict[str, str]:
    """What the times depend on beside the versions: cores, memory for the page cache, and who else was there."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GB",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "files": f"float16 .npy shards of at most {SHARD_ROWS:,} rows; every output file is brought to disk",
        "in memory": f"arrays of at most {IN_MEMORY_ROWS:,} rows, one after another",
    }
