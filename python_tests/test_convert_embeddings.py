"""convert_embeddings: equal to transform, resumable to the byte, refusing what does not fit, leaving nothing broken."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aniso_ext.convert import convert_embeddings
from aniso_ext.convert.digest import shard_digest
from aniso_ext.data import EmbeddingWriter, open_embeddings
from aniso_ext.errors import DataError, InputError

WIDTH = 6
SIZES = (7, 5, 9, 1)


class Affine:
    """z = scale * (y - mean): row by row, and with a corpus mean that a conversion has to compute."""

    def __init__(self, scale: float = 2.0, width: int = WIDTH, mean: float = 0.25) -> None:
        self.scale, self.width, self.mean = scale, width, np.full(width, mean)
        self.before: Callable[[int], None] = lambda call: None
        self.calls = 0

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.scale}:{self.mean.tobytes()!r}".encode()).hexdigest()

    def transform(self, source: np.ndarray, *, calibration: str | None = "auto") -> np.ndarray:
        assert calibration == "fitted"
        self.calls += 1
        self.before(self.calls)
        return (self.scale * (source - self.mean)).astype(source.dtype)

    def calibrated(self, source: Any, *, calibration: str | None = "auto") -> Affine:
        twin = Affine(self.scale, self.width)
        rows = np.concatenate([batch.astype(np.float64) for batch in source.iter_batches(4)])
        twin.mean, twin.before = rows.mean(axis=0), self.before
        return twin


def make_input(folder: Path, suffix: str = ".npy", dtype: str = "float32") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((size, WIDTH)).astype(np.float32) for size in SIZES]
    for number, part in enumerate(parts):
        with EmbeddingWriter(folder / f"part_{number}{suffix}", dtype=dtype) as writer:
            writer.write(part)
    return parts


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir())}


@pytest.mark.parametrize("suffix, dtype", [(".npy", "float16"), (".npy", "float64"), (".parquet", "float32")])
def test_output_equals_transform_shard_by_shard(tmp_path: Path, suffix: str, dtype: str) -> None:
    make_input(tmp_path / "in", suffix, dtype)
    seen: list[tuple[int, int]] = []
    report = convert_embeddings(
        Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4, progress=lambda done, rows: seen.append((done, rows))
    )
    source, result = open_embeddings(tmp_path / "in"), open_embeddings(tmp_path / "out")
    assert [(shard.name, shard.rows) for shard in result.shards] == [(s.name, s.rows) for s in source.shards]
    assert result.stored_dtype == dtype
    assert np.array_equal(result.numpy(), Affine().transform(source.numpy(), calibration="fitted"))
    assert (report.rows, report.shards, report.bad_rows, report.resumed_shards) == (22, 4, 0, 0)
    assert report.bytes == sum(Path(path).stat().st_size for path in report.outputs)
    assert seen[-1] == (22, 22)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    json.dumps(report.to_dict())


@pytest.mark.parametrize("method", ["mean_shift", "realign"])
@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
def test_fitted_aligners_convert_as_they_transform(tmp_path: Path, method: str, calibration: str) -> None:
    from aniso_ext.align import make_aligner  # loads torch, which the killed processes below do without

    rng = np.random.default_rng(1)
    unit = lambda rows: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    source, target = unit(rng.standard_normal((300, 8)) + 1), unit(rng.standard_normal((300, 8)) - 1)
    aligner = make_aligner(method).fit(source, target)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", source[:120])
    np.save(tmp_path / "in" / "b.npy", source[120:250])
    convert_embeddings(aligner, tmp_path / "in", tmp_path / "out", calibration=calibration)
    want = aligner.transform(source[:250], calibration=calibration)
    assert np.abs(open_embeddings(tmp_path / "out").numpy() - want).max() < 1e-6


def test_corpus_calibration_takes_the_mean_of_the_input(tmp_path: Path) -> None:
    parts = make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", calibration="corpus")
    rows = np.concatenate(parts)
    want = 2.0 * (rows - rows.astype(np.float64).mean(axis=0))
    assert np.abs(open_embeddings(tmp_path / "out").numpy() - want).max() < 1e-6


def test_one_file_can_be_converted_to_one_file_of_another_format(tmp_path: Path) -> None:
    parts = make_input(tmp_path / "in")
    report = convert_embeddings(
        Affine(), tmp_path / "in" / "part_2.npy", tmp_path / "new" / "z.safetensors", dtype="bfloat16"
    )
    opened = open_embeddings(tmp_path / "new" / "z.safetensors")
    assert opened.stored_dtype == report.dtype == "bfloat16"
    assert np.abs(opened.numpy() - 2 * (parts[2] - 0.25)).max() < 2.0**-8 * 8
    assert sorted(contents(tmp_path / "new")) == ["z.safetensors", "z.safetensors.manifest.jsonl"]


def test_a_wider_output_dtype_is_mapped_in_that_dtype(tmp_path: Path) -> None:
    rows = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float16)
    convert_embeddings(Affine(1 / 3), rows, tmp_path / "z.npy", dtype="float32")
    want = (1 / 3) * (rows.astype(np.float64) - 0.25)
    assert np.abs(np.load(tmp_path / "z.npy") - want).max() < 1e-6


def test_manifest_describes_every_shard(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    report = convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    header, *lines = [json.loads(line) for line in Path(report.manifest).read_text().splitlines()]
    assert (header["aligner"], header["input"]) == (
        Affine().fingerprint(),
        open_embeddings(tmp_path / "in").fingerprint(),
    )
    for line, size in zip(lines, SIZES, strict=True):
        content = (tmp_path / "out" / line["shard"]).read_bytes()
        assert line["xxh3_128"] == shard_digest(open_embeddings(tmp_path / "out" / line["shard"]).shards[0])
        assert (line["bytes"], line["rows"], line["aligner"]) == (len(content), size, Affine().fingerprint())


class Stop(Exception):
    """A failure in the middle."""


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()])
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
def test_a_stopped_run_resumes_to_the_same_bytes(
    tmp_path: Path, suffix: str, error: BaseException, calibration: str
) -> None:
    make_input(tmp_path / "in", suffix)
    options = {"batch_rows": 4, "calibration": calibration}
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", **options)
    total = 2 + 2 + 3 + 1  # batches of 4 rows
    for stop in range(1, total + 1):
        output = tmp_path / f"out_{stop}"
        aligner = Affine()

        def fail(call: int, stop: int = stop) -> None:
            if call == stop:
                raise error

        aligner.before = fail
        with pytest.raises(type(error)):
            convert_embeddings(aligner, tmp_path / "in", output, **options)
        finished = sum(stop > batches for batches in (2, 4, 7))
        if finished == 0:
            assert not output.exists()
        else:
            names = {f"part_{number}{suffix}" for number in range(finished)}
            assert set(contents(output)) == {*names, "manifest.jsonl"}
        report = convert_embeddings(Affine(), tmp_path / "in", output, **options)
        assert report.resumed_shards == finished
        assert report.rows == 22
        assert contents(output) == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from test_convert_embeddings import Affine
from aniso_ext.convert import convert_embeddings
from aniso_ext.convert.digest import shard_digest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
aligner = Affine()
def stop(call):
    if call == int(sys.argv[3]):
        {action}
aligner.before = stop
convert_embeddings(aligner, sys.argv[1], sys.argv[2], batch_rows=4)
"""


@pytest.mark.parametrize(
    "action, code",
    [("os._exit(9)", 9), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("os.kill(os.getpid(), signal.SIGINT)", -2)],
    ids=["exit", "SIGKILL", "SIGINT"],
)
@pytest.mark.parametrize("call", [1, 6])
def test_a_killed_process_leaves_a_resumable_folder(tmp_path: Path, action: str, code: int, call: int) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", batch_rows=4)
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED.format(action=action), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run([*command, str(call), str(here)], cwd=here.parent, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code == -2 and call == 1:
        assert not (tmp_path / "out").exists()
    else:
        shards = sorted(name for name in contents(tmp_path / "out") if name.startswith("part"))
        assert shards == ["part_0.npy", "part_1.npy"][: 0 if call == 1 else 2]
    report = convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4)
    assert report.resumed_shards == (0 if call == 1 else 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_manifest_line_is_written_again(tmp_path: Path, cut: int) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    want = contents(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.write_bytes(want["manifest.jsonl"][:-cut])
    assert convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out").resumed_shards == 3
    assert contents(tmp_path / "out") == want


def test_a_torn_first_line_is_written_again(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    want = contents(tmp_path / "out")
    for size in (0, 1, 60):
        (tmp_path / "out" / "manifest.jsonl").write_bytes(want["manifest.jsonl"][:size])
        assert convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out").resumed_shards == 0
        assert contents(tmp_path / "out") == want


def test_a_shard_that_was_lost_or_cut_is_made_again(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    want = contents(tmp_path / "out")
    (tmp_path / "out" / "part_1.npy").unlink()
    assert convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out").resumed_shards == 1
    assert contents(tmp_path / "out") == want
    (tmp_path / "out" / "part_3.npy").write_bytes(b"cut")
    assert convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out").resumed_shards == 3
    assert contents(tmp_path / "out") == want
    aligner = Affine()
    assert convert_embeddings(aligner, tmp_path / "in", tmp_path / "out").resumed_shards == 4
    assert aligner.calls == 0


def test_another_aligner_or_input_refuses_to_resume(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    before = contents(tmp_path / "out")
    other = Affine(3.0)
    both = f"aligner {Affine().fingerprint()}, now it is {other.fingerprint()}"
    with pytest.raises(DataError, match=both):
        convert_embeddings(other, tmp_path / "in", tmp_path / "out")
    first = open_embeddings(tmp_path / "in").fingerprint()
    changed = np.load(tmp_path / "in" / "part_1.npy")
    changed[0, 0] += 1
    np.save(tmp_path / "in" / "part_1.npy", changed)
    both = f"input {first}, now it is {open_embeddings(tmp_path / 'in').fingerprint()}"
    with pytest.raises(DataError, match=both):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": "float16"}, "dtype float32, now it is float16"),
        ({"calibration": "corpus"}, "calibration fitted, now it is corpus"),
        ({"on_bad": "drop"}, "on bad fail, now it is drop"),
        ({"batch_rows": 3}, "batch rows 8192, now it is 3"),
    ],
)
def test_other_options_refuse_to_resume(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=reason):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", **options)


def test_a_corpus_calibration_that_comes_out_differently_refuses_to_resume(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", calibration="corpus")
    (tmp_path / "out" / "part_3.npy").unlink()
    drifting = Affine()
    drifting.calibrated = lambda source, calibration: Affine(mean=0.1)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="calibrated aligner"):
        convert_embeddings(drifting, tmp_path / "in", tmp_path / "out", calibration="corpus")


def test_overwrite_replaces_an_earlier_conversion(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("kept")
    (tmp_path / "in" / "part_3.npy").unlink()
    convert_embeddings(Affine(3.0), tmp_path / "in", tmp_path / "out", on_existing="overwrite")
    assert sorted(contents(tmp_path / "out")) == [
        "manifest.jsonl",
        "notes.txt",
        "part_0.npy",
        "part_1.npy",
        "part_2.npy",
    ]
    assert np.array_equal(
        open_embeddings(tmp_path / "out").numpy(),
        Affine(3.0).transform(open_embeddings(tmp_path / "in").numpy(), calibration="fitted"),
    )


def test_what_is_there_is_not_touched_without_being_told(tmp_path: Path) -> None:
    parts = make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=r"manifest\.jsonl: exists already"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", on_existing="fail")
    (tmp_path / "foreign").mkdir()
    np.save(tmp_path / "foreign" / "part_2.npy", parts[0])
    before = contents(tmp_path / "foreign")
    for on_existing in ("resume", "fail"):
        with pytest.raises(DataError, match=r"part_2\.npy: exists already and no manifest"):
            convert_embeddings(Affine(), tmp_path / "in", tmp_path / "foreign", on_existing=on_existing)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.jsonl").write_text("someone else's notes")
    with pytest.raises(DataError, match="is not the manifest of a conversion"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "other")
    assert contents(tmp_path / "foreign") == before
    assert contents(tmp_path / "other") == {"manifest.jsonl": b"someone else's notes"}
    for output in (tmp_path / "in", tmp_path / "in" / ".." / "in"):
        with pytest.raises(DataError, match="is both input and output"):
            convert_embeddings(Affine(), tmp_path / "in", output, on_existing="overwrite")


def test_two_conversions_never_share_a_folder(tmp_path: Path) -> None:
    make_input(tmp_path / "in")
    convert_embeddings(Affine(), tmp_path / "in", tmp_path / "whole", batch_rows=4)
    aligner, refusals = Affine(), []

    def second(call: int) -> None:
        with pytest.raises(DataError, match="is in use by another conversion") as caught:
            convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=4)
        refusals.append(caught)

    aligner.before = second
    convert_embeddings(aligner, tmp_path / "in", tmp_path / "out", batch_rows=4)
    assert len(refusals) == 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def bad_input(folder: Path) -> tuple[np.ndarray, list[int]]:
    """One shard of 10 rows of which 2 (zero), 5 (NaN) and 9 (infinite) are bad."""
    rows = np.random.default_rng(3).standard_normal((10, WIDTH)).astype(np.float32)
    rows[2] = 0
    rows[5, 1] = np.nan
    rows[9, 0] = -np.inf
    folder.mkdir()
    np.save(folder / "a.npy", np.ones((3, WIDTH), np.float32))
    np.save(folder / "b.npy", rows)
    return rows, [2, 5, 9]


def test_bad_rows_fail_by_default_and_leave_no_shard(tmp_path: Path) -> None:
    bad_input(tmp_path / "in")
    with pytest.raises(DataError, match=r"b\.npy: row 2 is zero"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out", batch_rows=2)
    assert sorted(contents(tmp_path / "out")) == ["a.npy", "manifest.jsonl"]
    with pytest.raises(DataError, match=r"b\.npy: row 2 is zero"):
        convert_embeddings(Affine(), tmp_path / "in" / "b.npy", tmp_path / "alone")
    with pytest.raises(DataError, match=r"b\.npy: row 2 is zero"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "alone", calibration="corpus")
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
@pytest.mark.parametrize("calibration", ["fitted", "corpus"])
@pytest.mark.parametrize("on_bad", ["drop", "zero"])
def test_bad_rows_are_dropped_or_zeroed_and_reported(
    tmp_path: Path, on_bad: str, calibration: str, batch_rows: int
) -> None:
    rows, bad = bad_input(tmp_path / "in")
    report = convert_embeddings(
        Affine(), tmp_path / "in", tmp_path / "out", on_bad=on_bad, calibration=calibration, batch_rows=batch_rows
    )
    assert report.bad_row_indices == {"b.npy": bad}
    assert report.bad_rows == 3
    good = np.delete(rows, bad, axis=0)
    mean = np.concatenate([np.ones((3, WIDTH)), good]).mean(axis=0) if calibration == "corpus" else 0.25
    want = np.zeros_like(rows) if on_bad == "zero" else np.empty_like(good)
    want[np.setdiff1d(range(10), bad) if on_bad == "zero" else slice(None)] = 2 * (good - mean)
    assert report.rows == 3 + len(want)
    assert np.abs(np.load(tmp_path / "out" / "b.npy") - want).max() < 1e-6
    again = convert_embeddings(
        Affine(), tmp_path / "in", tmp_path / "out", on_bad=on_bad, calibration=calibration, batch_rows=batch_rows
    )
    assert again.bad_row_indices == {"b.npy": bad}


def test_a_shard_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, WIDTH), np.float32))
    with pytest.raises(DataError, match=r"a\.npy: all 4 rows are zero or not finite"):
        convert_embeddings(Affine(), tmp_path / "a.npy", tmp_path / "out", on_bad="drop")
    assert not (tmp_path / "out").exists()
    convert_embeddings(Affine(), tmp_path / "a.npy", tmp_path / "out", on_bad="zero")
    assert not np.load(tmp_path / "out" / "a.npy").any()


def test_a_stand_in_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    rows = np.ones((5, WIDTH), np.float32)
    rows[1] = 0
    rows[3, 2] = 3e38
    with np.errstate(over="ignore"), pytest.raises(DataError, match="row 3 is finite, but its stand-in is not"):
        convert_embeddings(Affine(1e3), rows, tmp_path / "out", on_bad="drop")
    assert not (tmp_path / "out").exists()


def test_impossible_options(tmp_path: Path) -> None:
    rows = np.ones((3, WIDTH), np.float32)
    with pytest.raises(InputError, match="input has width 6, but the aligner was fitted at width 5"):
        convert_embeddings(Affine(width=5), rows, tmp_path / "out")
    for options in (
        {"calibration": "no"},
        {"on_existing": "no"},
        {"on_bad": "no"},
        {"batch_rows": 0},
        {"dtype": "int8"},
    ):
        with pytest.raises(InputError):
            convert_embeddings(Affine(), rows, tmp_path / "out", **options)
    with pytest.raises(InputError, match="cannot hold bfloat16"):
        convert_embeddings(Affine(), rows, tmp_path / "out.npy", dtype="bfloat16")
    with pytest.raises(InputError, match="no rows"):
        convert_embeddings(Affine(), rows[:0], tmp_path / "out")
    make_input(tmp_path / "in")
    with pytest.raises(InputError, match="is one file, but the input has 4 shards"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "out.npy")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        convert_embeddings(Affine(), tmp_path / "in", tmp_path / "file")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "in"]
