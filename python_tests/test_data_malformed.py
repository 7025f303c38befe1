"""Every file that cannot be used is a one-line DataError that names the file, the reason and a remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from malformed_files import CASES, GOOD, entry, lists, npy, parquet, raw, safetensors

from aniso_ext.data import open_embeddings, read_metadata
from aniso_ext.errors import DataError


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_file_reason_and_remedy(tmp_path: Path, name: str) -> None:
    make, reason = CASES[name]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=reason) as caught:
        open_embeddings(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert message.count(": ") >= 2  # file: reason: remedy
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "values, reason",
    [
        # pyarrow before 26 refuses the file by itself, and does not say which row
        ([[1.0] * 3, None, [1.0] * 3], r"x\.parquet: (.*row 1 is null|cannot be read as parquet .*size=3)"),
        ([[1.0] * 3, [1.0, None, 2.0]], "null elements"),
    ],
)
def test_nulls_in_parquet_are_found_while_reading(tmp_path: Path, values: list[object], reason: str) -> None:
    path = parquet({"embedding": lists(values=values)})(tmp_path)
    with pytest.raises(DataError, match=reason):
        open_embeddings(path).numpy()


def test_a_named_column_that_is_missing_lists_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'b' \(it has: embedding\)"):
        open_embeddings(parquet({"embedding": lists()})(tmp_path), column="b")
    with pytest.raises(DataError, match=r"no tensor 'b' \(it has: a\)"):
        open_embeddings(raw("x.safetensors", safetensors({"a": entry()}))(tmp_path), column="b")


def test_unreadable_file(tmp_path: Path) -> None:
    path = npy(GOOD)(tmp_path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("runs with rights that ignore file modes")
    with pytest.raises(DataError, match="cannot be read"):
        open_embeddings(path)


def test_metadata_that_is_damaged_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.parquet files"):
        read_metadata(tmp_path)
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "metadata_0.parquet").write_bytes(b"garbage!")
    with pytest.raises(DataError, match=r"metadata_0\.parquet: cannot be read as parquet"):
        read_metadata(tmp_path)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, os\n"
        "class Bomb:\n"
        "    def __reduce__(self): return (os.mkdir, (sys.argv[1] + '/executed',))\n"
        "array = np.empty((1, 1), dtype=object); array[0, 0] = Bomb()\n"
        "np.save(sys.argv[1] + '/x.npy', array, allow_pickle=True)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with pytest.raises(DataError, match="pickled Python objects"):
        open_embeddings(tmp_path / "x.npy")
    assert not (tmp_path / "executed").exists()
