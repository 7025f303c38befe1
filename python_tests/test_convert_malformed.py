"""What cannot be converted ends in exit code 1 or 2 and one line that says what and what to do; nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from malformed_files import CASES, GOOD, lists, parquet
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import aniso_ext as aniso
from aniso_ext.cli.main import app
from aniso_ext.data import EmbeddingWriter

WIDTH = GOOD.shape[1]
runner = CliRunner()


@dataclass(frozen=True)
class Wrong:
    """A command that must fail: parts that differ from a good one, and what its error says.

    ``prepare`` gets the folder of the case, which holds ``in.npy`` and a fitted ``aligner``.
    """

    pattern: str
    options: tuple[str, ...] = ()
    prepare: Callable[[Path], Any] = lambda folder: None
    input: str = "in.npy"
    output: str = "out"
    aligner: str = "aligner"
    exit_code: int = 1


def rows_with(row: int, value: float, name: str = "in.npy") -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        rows = np.ones((6, WIDTH), np.float32)
        rows[row] = value
        np.save(folder / name, rows)

    return prepare


def config(**changes: Any) -> Callable[[Path], Any]:
    """The aligner with other values in its config.json; None removes a field."""

    def prepare(folder: Path) -> None:
        path = folder / "aligner" / "config.json"
        fields = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return prepare


def arrays(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        path = folder / "aligner" / "model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return prepare


def content(name: str, data: bytes) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return prepare


def several(folder: Path) -> None:
    (folder / "in").mkdir()
    for number in range(2):
        np.save(folder / "in" / f"{number}.npy", GOOD)


def converted(folder: Path, *options: str) -> None:
    good = ("convert", "--aligner", str(folder / "aligner"), "--input", str(folder / "in.npy"))
    assert runner.invoke(app, [*good, "--output", str(folder / "out"), *options]).exit_code == 0


def converted_then(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> None:
        converted(folder)
        change(folder)

    return prepare


def brain_floats(folder: Path) -> None:
    with EmbeddingWriter(folder / "in.safetensors", dtype="bfloat16") as writer:
        writer.write(GOOD)


def null_rows(values: list[object]) -> Callable[[Path], Any]:
    return lambda folder: parquet({"embedding": lists(values=values)})(folder)


def large_rows(folder: Path) -> None:
    rows_with(2, 1e6)(folder)
    aniso.make_aligner("identity").fit(UNIT, UNIT).save_pretrained(folder / "aligner")


def protocol_without_library(folder: Path) -> None:
    fsspec.register_implementation("absent", "no_such_library.Files", clobber=True, errtxt="pip install absent")


def other_aligner(folder: Path) -> None:
    aniso.make_aligner("mean_shift").fit(-UNIT, UNIT[::-1]).save_pretrained(folder / "aligner")


def folder_of_pickles(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "0.pkl").write_bytes(pickle.dumps([1]))


def forbidden(folder: Path) -> None:
    (folder / "in.npy").chmod(0)
    if os.access(folder / "in.npy", os.R_OK):
        pytest.skip("runs with rights that ignore file modes")


def clip_folder(folder: Path) -> None:
    aniso.data.write_clip_retrieval(folder / "laion", text=GOOD, metadata={"caption": list("abcd")})


UNIT = np.eye(WIDTH, dtype=np.float32)
CONVERSIONS: dict[str, Wrong] = {
    "row of NaN": Wrong(r"in\.npy: row 4 is not finite.*: repair it", prepare=rows_with(4, np.nan)),
    "row of infinity": Wrong(r"in\.npy: row 5 is not finite.*: repair it", prepare=rows_with(5, -np.inf)),
    "row of zeros": Wrong(r"in\.npy: row 0 is zero.*: repair it, or pass", prepare=rows_with(0, 0)),
    "row of NaN before the corpus mean": Wrong(
        r"in\.npy: row 3 is not finite", ("--calibration", "corpus"), rows_with(3, np.nan)
    ),
    "only bad rows": Wrong(
        r"in\.npy: all 2 rows are zero or not finite: remove", ("--on-bad", "drop"),
        lambda folder: np.save(folder / "in.npy", np.zeros((2, WIDTH), np.float32)),
    ),
    "null row": Wrong(
        r"x\.parquet: .*(row 1 is null|cannot be read).*: (drop|copy)", prepare=null_rows([[1.0] * 3, None, [1.0] * 3]),
        input="x.parquet",
    ),
    "null element": Wrong(
        r"x\.parquet: .*null elements in column 'embedding': drop or fill it",
        prepare=null_rows([[1.0] * 3, [1.0, None, 2.0]]), input="x.parquet",
    ),
    "too large for float16": Wrong(
        r"in\.npy: row 2 overflows float16: store a wider dtype", ("--dtype", "float16"), large_rows,
    ),
    "unknown device": Wrong(r"device must be cpu, cuda or cuda:N, got 'tpu'", ("--device", "tpu")),
    "GPU that is not there": Wrong(r"device 'cuda:99' is not there: (no CUDA|the last)", ("--device", "cuda:99")),
    "GPU that is not there, for the corpus mean": Wrong(
        r"device 'cuda:99' is not there: (no CUDA|the last)", ("--device", "cuda:99", "--calibration", "corpus")
    ),
    "other width": Wrong(
        r"the input has width 5, but the aligner was fitted at width 3: use embeddings",
        prepare=lambda folder: np.save(folder / "in.npy", np.ones((2, 5), np.float32)),
    ),
    "unreadable file": Wrong(r"in\.npy: cannot be read \(Permission denied\): check", prepare=forbidden),
    "input is not there": Wrong(r"gone\.npy: does not exist: check the path", input="gone.npy"),
    "folder of pickles": Wrong(
        r"in: has only pickles such as 0\.pkl.*: convert them once with aniso import-pickle",
        prepare=folder_of_pickles, input="in",
    ),
    "url of an unknown protocol": Wrong(r"nosuch://.*Protocol not known.*: pass a path or", input="nosuch://b/x.npy"),
    "url without its library": Wrong(r"absent://.*needs a library.*pip install absent.*: install it",
                                     prepare=protocol_without_library, input="absent://b/x.npy"),
    "url that is not there": Wrong(r"memory://.*gone\.npy: does not exist: check", input="memory://nowhere/gone.npy"),
    "file url that is not there": Wrong(r"/nowhere/gone\.npy: does not exist: check", input="file:///nowhere/gone.npy"),
    "output is a url of an unknown protocol": Wrong(r"nosuch://.*Protocol not known.*: pass", output="nosuch://b/out"),
    "output is the input": Wrong(r"in\.npy: is both input and output: convert into another", output="in.npy"),
    "output is the input's folder": Wrong(r"in: lies inside the input|0\.npy: is both input and output: convert",
                                          prepare=several, input="in", output="in"),
    "output inside the input": Wrong(r"in/out: lies inside the input .*: convert into a folder", prepare=several,
                                     input="in", output="in/out"),
    "output beside the halves": Wrong(r"laion: has the clip-retrieval layout.*: choose another", prepare=clip_folder,
                                      input="laion/text_emb", output="laion"),
    "metadata and dropped rows": Wrong(r"on_bad='drop' would leave .*metadata with more rows.*: pass on_bad='zero'",
                                       ("--on-bad", "drop"), clip_folder, input="laion"),
    "output is a file": Wrong(r"notes\.txt: is not a folder: pass a folder", prepare=content("notes.txt", b"mine"),
                              output="notes.txt"),
    "output below a file": Wrong(r"notes\.txt: is not a folder: pass a folder", output="notes.txt/out",
                                 prepare=content("notes.txt", b"mine")),
    "several shards to one file": Wrong(r"out\.npy is one file, but the input has 2 shards: pass a folder",
                                        prepare=several, input="in", output="out.npy"),
    "bfloat16 for an .npy": Wrong(r"in\.npy: npy cannot hold bfloat16: choose another dtype", ("--dtype", "bfloat16")),
    "bfloat16 to .npy": Wrong(r"out\.npy: npy cannot hold bfloat16: choose", prepare=brain_floats,
                              input="in.safetensors", output="out.npy"),
    "bfloat16 to .parquet": Wrong(r"out\.parquet: parquet cannot hold bfloat16: choose", prepare=brain_floats,
                                  input="in.safetensors", output="out.parquet"),
    "shard that nobody recorded": Wrong(r"in\.npy: exists already and no manifest says what it is: choose another",
                                        prepare=content("out/in.npy", b"mine")),
    "manifest of another tool": Wrong(r"manifest\.jsonl: (is not the manifest|was started with manifest None).*: pass",
                                      prepare=content("out/manifest.jsonl", b'{"tool": "other"}\n')),
    "manifest of another aligner": Wrong(r"manifest\.jsonl: was started with aligner \w+, now it is \w+: pass",
                                         prepare=converted_then(other_aligner)),
    "manifest of another input": Wrong(r"manifest\.jsonl: was started with input \w+, now it is \w+: pass",
                                       prepare=converted_then(rows_with(0, 0.5))),
    "manifest of another dtype": Wrong(r"manifest\.jsonl: was started with dtype float32, now it is float16: pass",
                                       ("--dtype", "float16"), converted),
    "output exists": Wrong(r"manifest\.jsonl: exists already: choose another", ("--on-existing", "fail"), converted),
    "no aligner": Wrong(r"nobody holds no config\.json: name a folder", aligner="nobody"),
    "aligner is a file": Wrong(r"in\.npy holds no config\.json: name a folder", aligner="in.npy"),
    "aligner without arrays": Wrong(r"aligner holds no model\.safetensors: copy both files",
                                    prepare=lambda folder: (folder / "aligner" / "model.safetensors").unlink()),
    "aligner with damaged arrays": Wrong(r"model\.safetensors is damaged \(.*\): copy or save",
                                         prepare=content("aligner/model.safetensors", b"\xff" * 40)),
    "aligner with damaged config": Wrong(r"config\.json is not JSON \(.*\): save the aligner again",
                                         prepare=content("aligner/config.json", b"{'")),
    "aligner of another package": Wrong(r"config\.json: format is not 'aniso_ext\.aligner': this is not",
                                        prepare=config(format="other")),
    "aligner of a newer format": Wrong(r"config\.json: format_version is 99, this version .* reads 1 and 2: install",
                                       prepare=config(format_version=99)),
    "aligner of an unknown method": Wrong(r"the artefact's method: unknown aligner 'magic': choose one of",
                                          prepare=config(method="magic")),
    "aligner without a field": Wrong(r"config\.json: width must be of type int, got None: copy",
                                     prepare=config(width=None)),
    "aligner with an unknown option": Wrong(r"aligner: options has \['magic'\], which mean_shift does not take: copy",
                                            prepare=config(options={"magic": 1})),
    "aligner with an array of NaN": Wrong(r"model\.safetensors: source_mean has 1 non-finite values: copy",
                                          prepare=arrays(lambda named: named["source_mean"].put(0, np.nan))),
    "aligner without an array": Wrong(r"model\.safetensors: missing arrays \['source_mean'\].*: copy",
                                      prepare=arrays(lambda named: named.pop("source_mean"))),
    "aligner with an array of another shape": Wrong(
        r"model\.safetensors: source_mean has shape \[2\], expected \[D\] with D = 3: copy",
        prepare=arrays(lambda named: named.update(source_mean=np.zeros(2))),
    ),
    "aligner with a changed array": Wrong(r"aligner: fingerprint does not match: .*: copy",
                                          prepare=arrays(lambda named: named["source_mean"].put(0, 0.125))),
    "no input option": Wrong("Missing option|--input", ("--input",), exit_code=2),
    "unknown option": Wrong("No such option: --magic", ("--magic",), exit_code=2),
    "unknown calibration": Wrong("--calibration.*'half' is not one of", ("--calibration", "half"), exit_code=2),
    "unknown way with bad rows": Wrong("--on-bad.*'mend' is not one of", ("--on-bad", "mend"), exit_code=2),
    "unknown way with old files": Wrong("--on-existing.*is not one of", ("--on-existing", "append"), exit_code=2),
    "unknown dtype": Wrong("--dtype.*'int8' is not one of", ("--dtype", "int8"), exit_code=2),
    "no rows at a time": Wrong("--batch-rows", ("--batch-rows", "0"), exit_code=2),
    "rows that are no number": Wrong("--batch-rows", ("--batch-rows", "many"), exit_code=2),
    "an argument too many": Wrong("unexpected extra argument", ("more",), exit_code=2),
}  # fmt: skip


def state(folder: Path) -> dict[str, Any]:
    """Every path below a folder with its content."""
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None for path in paths}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an input, and an aligner for its width."""
    np.save(tmp_path / "in.npy", GOOD + 1)
    aniso.make_aligner("mean_shift").fit(UNIT, -UNIT[::-1]).save_pretrained(tmp_path / "aligner")
    return tmp_path


def convert(place: Path, wrong: Wrong, input: str | Path) -> str:
    """The error line of a conversion that must fail and leave everything as it was."""

    def path(name: str | Path) -> str:
        return str(name) if "://" in str(name) else str(place / name)

    before = state(place)
    done = runner.invoke(
        app,
        ["convert", "--aligner", path(wrong.aligner), "--input", path(input), "--output", path(wrong.output),
         *wrong.options],
    )  # fmt: skip
    assert done.exit_code == wrong.exit_code, done.output
    assert done.stdout == ""
    assert state(place) == before
    return done.stderr


@pytest.mark.parametrize("name", CONVERSIONS)
def test_one_line_and_nothing_written(place: Path, name: str) -> None:
    wrong = CONVERSIONS[name]
    wrong.prepare(place)
    stderr = convert(place, wrong, wrong.input)
    if wrong.exit_code == 1:
        (line,) = (text for text in stderr.splitlines() if not text.startswith("aniso: warning:"))  # of norms
        assert line.startswith("aniso: error: ") and line.count(": ") >= 2
    else:
        (line,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(wrong.pattern, line), line


@pytest.mark.parametrize("name", CASES)
def test_files_that_cannot_be_read_cannot_be_converted(place: Path, name: str) -> None:
    make, reason = CASES[name]
    (place / "case").mkdir()
    path = make(place / "case")
    (line,) = convert(place, Wrong(reason), path).splitlines()
    assert line.startswith("aniso: error: ") and line.count(": ") >= 3
    assert re.search(reason, line), line
    assert path.name in line


def test_what_looks_odd_but_is_fine(place: Path) -> None:
    """The neighbours of the cases above: the same checks let these through, with the right rows."""
    want = aniso.load_aligner(place / "aligner").transform(GOOD + 1)
    np.save(place / "in.npy", np.asfortranarray(GOOD + 1))
    converted(place)
    assert np.array_equal(np.load(place / "out" / "in.npy"), want)
    with open(place / "in.npy", "wb") as file:
        np.lib.format.write_array(file, GOOD + 1, version=(2, 0))
    converted(place, "--on-existing", "overwrite")
    assert np.array_equal(np.load(place / "out" / "in.npy"), want)


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(CONVERSIONS) >= 50
