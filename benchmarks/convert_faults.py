"""Conversions that are killed, starved and lied to, and what is in the output folder afterwards.

    python benchmarks/convert_faults.py [--kills 200] [--ray-kills 10] [--seed 0]

A kill is SIGKILL to an `aniso convert` at a random moment after it has made its manifest; the moment is uniform over
what an unbroken conversion takes, so that some kills come too late. The command runs in a process that is forked from
one with all imports done, because these take longer than the conversion; Ray is started as it is by a user. Two workers
are killed together or one of them alone; Ray as a whole, or one of its worker processes while the run goes on. Then the
conversion is resumed in this process, and every file of the folder must have the bytes of an unbroken run.

Other faults: a full disk (a tmpfs of its own), an input file truncated between two runs, two converters on one folder,
and times of files in 1970 and 2100.

Results go to results/convert_faults.csv, one row for each kind; the exit code is 1 if any output differs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "convert_faults.csv"
FORMATS = ("npy", "parquet", "safetensors", "clip-retrieval")
CALIBRATIONS = ("fitted", "corpus")
ENGINES = ("local", "2 workers")
# shards of more than a block that is written past the page cache
WIDTH, SHARDS, SHARD_ROWS, BATCH_ROWS = 64, 8, 40_000, 2048
START_SECONDS = 120
PROGRAM = (sys.executable, "-m", "aniso_ext.cli")
FORKS = multiprocessing.get_context("forkserver")
COLUMNS = ("fault", "format", "calibration", "engine", "runs", "in_the_conversion", "identical")


@dataclass(frozen=True)
class Case:
    """One input, one calibration, and what an unbroken conversion makes of them."""

    folder: Path
    format: str
    calibration: str
    seconds: float

    @property
    def input(self) -> Path:
        return self.folder / self.format / ("text_emb" if self.format == "clip-retrieval" else "")

    @property
    def unbroken(self) -> Path:
        return self.folder / f"{self.format} {self.calibration}"

    def command(self, output: Path, *more: str) -> list[str]:
        options = ["--aligner", self.folder / "aligner", "--input", self.input, "--output", output]
        options += ["--calibration", self.calibration, "--batch-rows", BATCH_ROWS, *more]
        return ["convert", *map(str, options)]

    def resume(self, output: Path) -> None:
        from aniso_ext.align import load_aligner
        from aniso_ext.convert import convert_embeddings

        aligner = load_aligner(self.folder / "aligner")
        convert_embeddings(aligner, self.input, output, calibration=self.calibration, batch_rows=BATCH_ROWS)

    def start_and_stop(self, output: Path, shards: int) -> None:
        """A run that ends by itself after so many shards."""
        from aniso_ext.align import load_aligner
        from aniso_ext.convert import convert_embeddings
        from aniso_ext.errors import StoppedError

        with suppress(StoppedError):
            convert_embeddings(
                load_aligner(self.folder / "aligner"),
                self.input,
                output,
                calibration=self.calibration,
                batch_rows=BATCH_ROWS,
                stop=lambda: finished_shards(output) >= shards,
            )

    def is_identical(self, output: Path) -> bool:
        return contents(output) == contents(self.unbroken)


@dataclass(frozen=True)
class Outcome:
    """What came of one fault; ``inside`` is whether it hit the conversion before its end."""

    fault: str
    case: Case
    engine: str
    inside: bool
    identical: bool


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def finished_shards(output: Path) -> int:
    """Lines of the manifest after the first."""
    try:
        return max(0, (output / "manifest.jsonl").read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def make_cases(folder: Path) -> list[Case]:
    """An aligner, the same rows in every format, and an unbroken conversion of each with both calibrations."""
    from aniso_ext.align import make_aligner
    from aniso_ext.data import EmbeddingWriter, write_clip_retrieval

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((SHARDS * SHARD_ROWS, WIDTH), dtype=np.float32) + 0.5
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    aligner = make_aligner("anisoalign", rank=16, knots=64, refine=False)
    aligner.fit(rows[:5000], -rows[5000:10000]).save_pretrained(folder / "aligner")
    for format in FORMATS[:3]:
        for number, part in enumerate(np.split(rows, SHARDS)):
            path = folder / format / f"{number:02d}.{format}"
            with EmbeddingWriter(path, format, dtype="float16", width=WIDTH) as writer:
                writer.write(part)
    captions = [f"caption {number}" for number in range(len(rows))]
    write_clip_retrieval(
        folder / "clip-retrieval",
        text=rows.astype(np.float16),
        metadata={"caption": captions},
        rows_per_shard=SHARD_ROWS,
    )
    cases = []
    for format, calibration in itertools.product(FORMATS, CALIBRATIONS):
        case = Case(folder, format, calibration, 0.0)
        process = Running(case.command(case.unbroken))
        wait_for_manifest(case.unbroken, process)
        began = time.perf_counter()
        if process.wait():
            raise SystemExit(f"{format}, {calibration}: an unbroken run failed")
        cases.append(Case(folder, format, calibration, time.perf_counter() - began))
    return cases


class Running:
    """A command in a process group of its own, forked from a process that has imported everything."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = FORKS.Process(target=_run, args=(list(arguments),))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return int(self._process.exitcode or 0)


def _run(arguments: list[str]) -> None:
    from aniso_ext.cli.main import app

    os.setsid()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        app(arguments)


def start_ray(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """A command with the engine of Ray, in a process group of its own."""
    command = [*PROGRAM, *arguments, "--engine", "ray"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for_manifest(output: Path, process: Running | subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (output / "manifest.jsonl").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{output}: a conversion did not begin")
        time.sleep(0.0005)


def kill_group(process: Running | subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stat_fields(process: int) -> list[str]:
    """State, parent and the rest of what the kernel says of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(ancestor: int) -> set[int]:
    """Processes that a process has started, directly or not."""
    parents = {int(name): stat_fields(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    found, more = {ancestor}, {ancestor}
    while more:
        more = {process for process, fields in parents.items() if fields and int(fields[1]) in more} - found
        found |= more
    return found - {ancestor}


def wait_until_gone(processes: set[int]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while any(fields and fields[0] != "Z" for fields in map(stat_fields, processes)):
        if time.monotonic() > deadline:
            raise SystemExit("processes of Ray outlive their driver")
        time.sleep(0.01)


@contextmanager
def new_output(case: Case) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=case.folder) as folder:
        yield Path(folder) / "output"


def killed(case: Case, engine: str, chance: random.Random) -> Outcome:
    """SIGKILL at a random moment, then resume."""
    workers = [["--worker", f"{rank}/2"] for rank in range(2)] if engine == "2 workers" else [[]]
    start = start_ray if engine == "ray" else Running
    with new_output(case) as output:
        processes = [start(case.command(output, *worker)) for worker in workers]
        wait_for_manifest(output, processes[0])
        time.sleep(chance.random() * case.seconds * (1 if engine != "ray" else 3))
        offspring = descendants(processes[0].pid) if engine == "ray" else set()
        victims = processes if len(processes) == 1 or chance.random() < 0.5 else [chance.choice(processes)]
        for process in victims:
            kill_group(process)
        inside = finished_shards(output) < SHARDS
        for process in processes:
            process.wait()
        wait_until_gone(offspring)
        case.resume(output)
        return Outcome("SIGKILL", case, engine, inside, case.is_identical(output))


def killed_ray_worker(case: Case, chance: random.Random) -> Outcome:
    """SIGKILL to one process that Ray has given a task; the run itself must end well."""
    with new_output(case) as output:
        process = start_ray(case.command(output))
        wait_for_manifest(output, process)
        time.sleep(chance.random() * case.seconds / 2)
        inside = False
        while process.poll() is None and not inside:
            for worker in descendants(process.pid):
                with suppress(OSError):
                    if Path(f"/proc/{worker}/cmdline").read_bytes().startswith(b"ray::_convert_share"):
                        os.kill(worker, signal.SIGKILL)
                        inside = True
                        break
        return Outcome("worker of Ray killed", case, "ray", inside, process.wait() == 0 and case.is_identical(output))


def full_disk(case: Case, chance: random.Random) -> Outcome:
    """A disk with room for part of the output: exit code 1, no half-written file; then room, and a resume."""
    room = sum(map(len, contents(case.unbroken).values()))
    with tempfile.TemporaryDirectory(dir=case.folder) as folder:
        size = int(room * chance.uniform(0.2, 0.8))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            output = Path(folder) / "output"
            done = subprocess.run([*PROGRAM, *case.command(output)], capture_output=True, text=True, check=False)
            failed = done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
            clean = not [path for path in output.rglob("*") if path.name.endswith(".tmp")]
            inside = 0 < finished_shards(output) < SHARDS
            subprocess.run(["mount", "-o", f"remount,size={4 * room}", folder], check=True)
            case.resume(output)
            return Outcome("disk full", case, "local", inside, failed and clean and case.is_identical(output))
        finally:
            subprocess.run(["umount", folder], check=True)


def truncated_input(case: Case, chance: random.Random) -> Outcome:
    """An input file loses its end between two runs: exit code 1 and an untouched output; then it is whole again."""
    with new_output(case) as output:
        case.start_and_stop(output, chance.randrange(1, SHARDS - 1))
        before = contents(output)
        last = sorted(path for path in case.input.iterdir() if path.is_file())[-1]
        whole = last.read_bytes()
        try:
            last.write_bytes(whole[: len(whole) * 2 // 3])
            refused = Running(case.command(output)).wait() == 1 and contents(output) == before
        finally:
            last.write_bytes(whole)
        case.resume(output)
        return Outcome("input truncated", case, "local", True, refused and case.is_identical(output))


def two_converters(case: Case, chance: random.Random) -> Outcome:
    """A second conversion into the folder of a running one is refused; the first ends well."""
    from aniso_ext.errors import DataError

    with new_output(case) as output:
        process = Running(case.command(output))
        wait_for_manifest(output, process)
        time.sleep(chance.random() * case.seconds / 4)
        inside = process.poll() is None and finished_shards(output) < SHARDS
        refused = False
        try:
            case.resume(output)
        except DataError as error:
            refused = "is in use by another conversion" in str(error)
        ended = process.wait() == 0
        return Outcome("two converters", case, "local", inside, refused and ended and case.is_identical(output))


def other_clock(case: Case, chance: random.Random) -> Outcome:
    """Between two runs the times of all files move to 1970 and 2100."""
    with new_output(case) as output:
        case.start_and_stop(output, chance.randrange(1, SHARDS - 1))
        for path in output.rglob("*"):
            year = chance.choice((1970, 2100))
            moment = datetime.datetime(year, 1, 2, tzinfo=datetime.timezone.utc).timestamp()
            os.utime(path, (moment, moment))
        case.resume(output)
        return Outcome("other clock", case, "local", True, case.is_identical(output))


def run_all(cases: Sequence[Case], kills: int, ray_kills: int, seed: int) -> Iterator[Outcome]:
    """Kills two at a time, the rest one by one; every fault has random numbers of its own."""
    numbers = itertools.count()

    def chance() -> random.Random:
        return random.Random(seed * 1_000_003 + next(numbers))

    plans = itertools.islice(itertools.cycle(itertools.product(cases, ENGINES)), kills)
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda plan: killed(*plan), [(case, engine, chance()) for case, engine in plans])
    if ray_kills:
        for case in itertools.islice(itertools.cycle(cases), ray_kills):
            yield killed(case, "ray", chance())
            yield killed_ray_worker(case, chance())
    for fault in (full_disk, truncated_input, two_converters, other_clock):
        if fault is full_disk and os.geteuid() != 0:
            print("disk full: left out, only root may mount a tmpfs", file=sys.stderr)
            continue
        for case in cases:
            yield fault(case, chance())


def table(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """One row for each kind of fault, format, calibration and engine, in the order of their first appearance."""
    rows: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.fault, outcome.case.format, outcome.case.calibration, outcome.engine)
        rows.setdefault(key, []).append(outcome)
    counts = {key: (len(o), sum(x.inside for x in o), sum(x.identical for x in o)) for key, o in rows.items()}
    return [dict(zip(COLUMNS, (*key, *numbers), strict=True)) for key, numbers in counts.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs to one and to two workers")
    parser.add_argument("--ray-kills", type=int, default=10, help="kills of Ray, and as many of one worker of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to put temporary files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1", RAY_ADDRESS="")
    FORKS.set_forkserver_preload(["aniso_ext.cli.main", "aniso_ext.align", "aniso_ext.convert", "pyarrow.parquet"])
    import torch

    from aniso_ext.bench.environment import facts

    torch.set_num_threads(1)
    began = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cases = make_cases(Path(folder))
        for outcome in run_all(cases, arguments.kills, arguments.ray_kills, arguments.seed):
            outcomes.append(outcome)
            if not outcome.identical:
                print(f"{outcome.fault}, {outcome.case.format}, {outcome.case.calibration}, {outcome.engine}: differs")
            if len(outcomes) % 20 == 0:
                print(f"{len(outcomes)} faults, {time.monotonic() - began:.0f} s", file=sys.stderr)
    rows = table(outcomes)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        for name, value in facts(torch.device("cpu")).items():
            file.write(f"# {name}: {value}\n")
        file.write(f"# seed: {arguments.seed}\n# seconds: {time.monotonic() - began:.0f}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    bad = sum(not outcome.identical for outcome in outcomes)
    print(f"{len(outcomes)} faults, {sum(o.inside for o in outcomes)} of them in the conversion; {bad} outputs differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
