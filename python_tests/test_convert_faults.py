"""A conversion that is stopped, or whose disk fails: one line that names the file, no partial shard, and a resume."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_deaths import STEPS, SummingAffine
from test_convert_embeddings import Affine, contents, make_input

from aniso_ext.convert import convert_embeddings
from aniso_ext.data.shards import RawShard
from aniso_ext.errors import DataError, StoppedError

HERE = Path(__file__).parent

# Signals. The process says which batch it is at and goes on when it is told to.

STEPWISE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import aniso_ext.align
from test_convert_embeddings import Affine
from aniso_ext.cli.main import app

class Stepwise(Affine):
    method = "affine"

def step(call):
    print("batch", call, flush=True)
    assert sys.stdin.readline()

aligner = Stepwise()
aligner.before = step
aniso_ext.align.load_aligner = lambda folder: aligner
app()
"""


class Conversion:
    """``aniso convert`` in a process of its own, batch by batch."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-c", STEPWISE, str(HERE), "convert", "--aligner", "none", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        self.stdin = self.process.stdin

    def wait_for_batch(self, number: int) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == f"batch {number}":
                return
            self.go_on()
        raise AssertionError(self.process.stderr.read() if self.process.stderr else "")

    def go_on(self) -> None:
        self.stdin.write("\n")
        self.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal and wait until it has been answered."""
        assert self.process.stderr is not None
        self.process.send_signal(number)
        name = signal.Signals(number).name
        answer = f"aniso: {name}: finishing the shard in hand; a second signal discards it\n"
        assert self.process.stderr.readline() == answer

    def end(self) -> tuple[int, str]:
        """Exit code and what was written to standard error since."""
        _, errors = self.process.communicate("\n" * 20)
        return self.process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_conversion_after_the_shard_in_hand(tmp_path: Path, number: int) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", batch_rows=4)
    running = Conversion("--input", tmp_path / "in", "--output", tmp_path / "out", "--batch-rows", 4)
    running.wait_for_batch(3)  # the first of two of the second shard
    running.signal(number)
    assert running.end() == (1, "aniso: error: stopped after 2 of 4 shards: run the same command again to go on\n")
    assert sorted(contents(tmp_path / "out")) == ["manifest.jsonl", "part_0.npy", "part_1.npy"]
    assert convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4).resumed_shards == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_signal_discards_the_shard_in_hand(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", batch_rows=4)
    running = Conversion("--input", tmp_path / "in", "--output", tmp_path / "out", "--batch-rows", 4)
    running.wait_for_batch(3)
    running.signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGINT)
    code, errors = running.end()
    assert (code, errors) == (
        1,
        "aniso: error: stopped, the shard in hand was discarded: run the same command again to go on\n",
    )
    assert sorted(contents(tmp_path / "out")) == ["manifest.jsonl", "part_0.npy"]
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stop_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    with pytest.raises(StoppedError, match="stopped after 0 of 4 shards: run the same command again to go on"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", stop=lambda: True)
    assert not (tmp_path / "out").exists()


# Disks

FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_convert_embeddings import Affine
from aniso_ext.convert import convert_embeddings
from aniso_ext.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    convert_embeddings(Affine(), sys.argv[2], sys.argv[3], batch_rows=500)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_a_full_disk_is_an_error_that_leaves_no_partial_shard(tmp_path: Path, suffix: str) -> None:
    from aniso_ext.data import EmbeddingWriter

    for number, rows in enumerate((1000, 5000)):  # 24 kB and 120 kB
        with EmbeddingWriter(tmp_path / "in" / f"{number}{suffix}") as writer:
            writer.write(np.random.default_rng(number).standard_normal((rows, 6)).astype(np.float32))
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", batch_rows=500)
    command = [sys.executable, "-c", FULL, str(HERE), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"1{suffix}: cannot be written (" in done.stdout
    assert "check the space and permissions" in done.stdout
    assert sorted(contents(tmp_path / "out")) == [f"0{suffix}", "manifest.jsonl"]
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=500)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
def test_any_step_on_the_disk_may_fail(tmp_path: Path, calibration: str) -> None:
    make_input(tmp_path / "in")
    options: dict[str, Any] = {"batch_rows": 4, "calibration": calibration}
    convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "whole", **options)
    failed = 0
    for step in itertools.count(1):
        output = tmp_path / f"out_{step}"
        with pytest.MonkeyPatch.context() as patch:
            steps = itertools.count(1)

            def failing(name: str, perform: Any, steps: Any = steps, step: int = step) -> Any:
                def call(*arguments: Any, **options: Any) -> Any:
                    if next(steps) == step:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return perform(*arguments, **options)

                return call

            for name in set(STEPS) - {"unlink", "rmdir"}:  # a full disk lets go of files
                patch.setattr(os, name, failing(name, getattr(os, name)))
            try:
                convert_embeddings(SummingAffine(), tmp_path / "in", output, worker=(0, 2), **options)
            except DataError as error:
                failed += 1
                assert str(output) in str(error) or "part_" in str(error)
                assert "No space left on device" in str(error)
        visible = [path.name for path in output.rglob("*") if path.is_file()] if output.exists() else []
        assert not [name for name in visible if name.endswith(".tmp")]
        for worker in ((1, 2), (0, 2)) * 3:
            convert_embeddings(SummingAffine(), tmp_path / "in", output, worker=worker, **options)
        assert contents(output) == contents(tmp_path / "whole")
        if next(steps) <= step:
            break
    assert failed >= 8


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", batch_rows=2)
    place = tmp_path / "in" / "part_2.npy"
    content = place.read_bytes()
    aligner = Affine()
    # the third shard has five batches, from call 8 on
    aligner.before = lambda call: place.write_bytes(content[:-100]) if call == 8 else None
    with pytest.raises(DataError, match=r"part_2\.npy: became shorter while it was being read"):
        convert_embeddings(aligner, tmp_path / "in", tmp_path / "out", batch_rows=2)
    assert sorted(contents(tmp_path / "out")) == ["manifest.jsonl", "part_0.npy", "part_1.npy"]
    with pytest.raises(DataError, match=r"part_2\.npy: is truncated"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=2)
    place.write_bytes(content)
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: str) -> None:
    make_input(tmp_path / "in")
    read = RawShard._fill

    def broken(shard: RawShard, *arguments: Any) -> None:
        if shard.name == "part_1.npy":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        read(shard, *arguments)

    options: dict[str, Any] = {"calibration": calibration, "batch_rows": 2}
    with monkeypatch.context() as patch:
        # which reads as well
        patch.setattr("aniso_ext.data.embedding_set.EmbeddingSet.fingerprint", lambda embeddings: "input")
        convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "whole", **options)
        patch.setattr(RawShard, "_fill", broken)
        with pytest.raises(DataError, match=r"part_1\.npy: cannot be read, .*Input/output error.* run again to resume"):
            convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "out", **options)
        patch.setattr(RawShard, "_fill", read)
        convert_embeddings(SummingAffine(), tmp_path / "in", tmp_path / "out", **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_clock_of_the_machine_does_not_matter(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", worker=(0, 2))
    for number, path in enumerate([*tmp_path.rglob("*"), tmp_path / "in"]):
        os.utime(path, (0, 10**9 * (number % 3) * 2))
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
