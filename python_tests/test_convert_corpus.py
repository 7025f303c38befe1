"""Corpus calibration of a conversion: sums of shards, shared among workers, resumed, the same to the bit."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_deaths import SummingAffine
from test_convert_embeddings import contents, make_input

from aniso_ext.convert import convert_embeddings
from aniso_ext.data import open_embeddings
from aniso_ext.errors import DataError, StoppedError

HERE = Path(__file__).parent
BATCHES = (2, 2, 3, 1)
"""Batches of four rows in each shard."""


def convert(folder: Path, output: Path, worker: tuple[int, int] = (0, 1), aligner: Any = None, **options: Any) -> Any:
    return convert_embeddings(
        aligner or SummingAffine(), folder, output, batch_rows=4, calibration="corpus", worker=worker, **options
    )


def test_passes_over_the_corpus_decide_the_mean(tmp_path: Path) -> None:
    rows = np.concatenate(make_input(tmp_path / "in")).astype(np.float64)
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "in", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    first = rows.mean(axis=0)
    mean = (rows - first).mean(axis=0) + first / 2
    got = open_embeddings(tmp_path / "out").numpy()
    assert np.abs(got - 2 * (rows - mean)).max() < 1e-5
    assert seen[-1] == (3 * 22, 3 * 22)  # two passes over the corpus, one conversion


@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_the_passes_and_the_bytes_are_the_same(tmp_path: Path, world: int) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "whole")
    for order in itertools.permutations(range(world)):
        output = tmp_path / f"out_{order}"
        calls, missing = 0, [1]
        for turn in itertools.count():
            aligner = SummingAffine()
            aligner.before = count = Counter()
            report = convert(tmp_path / "in", output, (order[turn % world], world), aligner)
            calls += count.calls
            missing = [*missing[-world + 1 :], report.missing_shards + report.missing_sums]
            if not any(missing):
                break
            assert report.missing_sums == 0 or report.shards == 0
        assert turn < 4 * world
        assert calls == 3 * sum(BATCHES)  # every batch once in each pass and once in the conversion
        assert contents(output) == contents(tmp_path / "whole")


class Counter:
    """Counts the batches that an aligner and its calibrated copies see."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, call: int) -> None:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt


def test_a_first_pass_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "whole")
    total = 3 * sum(BATCHES)
    bounds = list(itertools.accumulate(BATCHES * 3, initial=0))
    for stop in range(1, total + 1):
        output = tmp_path / f"out_{stop}"
        broken, whole = SummingAffine(), SummingAffine()
        broken.before, whole.before = Counter(stop), Counter()
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "in", output, aligner=broken)
        assert output.exists() == (stop > BATCHES[0])
        convert(tmp_path / "in", output, aligner=whole)
        kept = max(bound for bound in bounds if bound < stop)
        assert whole.before.calls == total - kept
        assert contents(output) == contents(tmp_path / "whole")


def test_sums_are_those_of_one_conversion_only(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    broken = SummingAffine()
    broken.before = Counter(4)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", aligner=broken)
    with pytest.raises(DataError, match="was started with aligner"):
        convert(tmp_path / "in", tmp_path / "out", aligner=SummingAffine(3.0))
    convert(tmp_path / "in", tmp_path / "out", aligner=SummingAffine(3.0), on_existing="overwrite")
    convert(tmp_path / "in", tmp_path / "whole", aligner=SummingAffine(3.0))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    record = tmp_path / "out" / ".manifest.jsonl.records"
    assert not record.exists()


def test_a_damaged_record_of_sums_is_refused(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", (0, 2))
    (record,) = (tmp_path / "out" / ".manifest.jsonl.records").glob("sums-0-00000002.json")
    record.write_text('{"rows":9,"sums":[1.0]}')
    with pytest.raises(DataError, match="the sums of shard 2 are damaged: remove the folder"):
        convert(tmp_path / "in", tmp_path / "out")


def test_bad_rows_stay_out_of_the_mean(tmp_path: Path) -> None:
    rows = np.random.default_rng(3).standard_normal((10, 6))
    rows[2], rows[5, 1] = 0, np.nan
    good = np.delete(rows, [2, 5], axis=0)
    np.save(tmp_path / "in.npy", rows)
    aligner = SummingAffine()
    aligner.corpus_passes = 1
    with pytest.raises(DataError, match=r"in\.npy: row 2 is zero"):
        convert(tmp_path / "in.npy", tmp_path / "z.npy", aligner=aligner)
    assert not (tmp_path / "z.npy.manifest.jsonl").exists()
    convert(tmp_path / "in.npy", tmp_path / "z.npy", aligner=aligner, on_bad="drop")
    assert np.abs(np.load(tmp_path / "z.npy") - 2 * (good - good.mean(axis=0))).max() < 1e-12


WAITING = """
import sys
sys.path.insert(0, sys.argv[1])
from convert_deaths import SummingAffine
from aniso_ext.convert import convert_embeddings, corpus
corpus.POLL_SECONDS = 0.01
report = convert_embeddings(SummingAffine(), sys.argv[2], sys.argv[3], batch_rows=4, calibration="corpus",
                            worker=(int(sys.argv[4]), 3), wait=True)
assert report.missing_sums == 0
"""


def test_workers_that_run_together_wait_for_one_another(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "whole")
    command = [sys.executable, "-c", WAITING, str(HERE), str(tmp_path / "in"), str(tmp_path / "out")]
    workers = [
        subprocess.Popen([*command, str(rank)], cwd=HERE.parent, stderr=subprocess.PIPE, text=True) for rank in range(3)
    ]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_that_waits_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_input(tmp_path / "in")
    asked: list[None] = []

    def third_question() -> bool:
        asked.append(None)
        return len(asked) == 3

    with pytest.raises(StoppedError, match="run the same command again to go on"):
        convert(tmp_path / "in", tmp_path / "out", (0, 2), wait=True, stop=third_question)
    assert len(list((tmp_path / "out" / ".manifest.jsonl.records").glob("sums-0-*.json"))) == 2


def unit_rows(count: int, shift: float) -> np.ndarray:
    rows = np.random.default_rng(count).standard_normal((count, 12)) + shift
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-13), ("float32", 1e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("make", ["unicorn", "c3_code", "realign", "anisoalign", "two steps", "identity"])
def test_methods_convert_as_they_transform(tmp_path: Path, make: str, dtype: str, bound: float) -> None:
    import aniso_ext as aniso

    methods: dict[str, Callable[[], Any]] = {
        "anisoalign": lambda: aniso.AnisoAlign(rank=4, refine=False),
        "two steps": lambda: aniso.AnisoAlign(rank=4, refine=False, calibration_steps=2),
    }
    aligner = methods.get(make, lambda: aniso.make_aligner(make))().fit(unit_rows(300, 0.5), unit_rows(290, -0.5))
    corpus = unit_rows(250, 0.2).astype(dtype)
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.split(corpus, [100, 170])):
        np.save(tmp_path / "in" / f"{number}.npy", part)
    passes = 0 if make == "identity" else 3 if make == "two steps" else 1
    assert aligner.corpus_passes == passes
    for _ in range(passes + 1):
        for rank in range(2):
            convert_embeddings(
                aligner, tmp_path / "in", tmp_path / "out", batch_rows=64, calibration="corpus", worker=(rank, 2)
            )
    convert_embeddings(aligner, tmp_path / "in", tmp_path / "whole", batch_rows=64, calibration="corpus")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    want = aligner.transform(corpus.astype(np.float64), calibration="corpus")
    # errors of a row in its own format (eps of half precision is 1e-3), of rows of length 1
    assert np.abs(open_embeddings(tmp_path / "out").numpy() - want).max() < bound
