"""Every file that cannot be used is a one-line DataError that names the file, the reason and a remedy."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aniso_ext.data import open_embeddings, read_metadata
from aniso_ext.errors import DataError

GOOD = np.arange(12, dtype=np.float32).reshape(4, 3)


def npy(array: np.ndarray, allow_pickle: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.save(folder / "x.npy", array, allow_pickle=allow_pickle)
        return folder / "x.npy"

    return make


def raw(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def npy_bytes(array: np.ndarray = GOOD) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2, "little") + text.encode() + b"\0" * 48


def safetensors(header: object, payload: bytes = b"\0" * 48) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype: str = "F32", shape: object = (4, 3), offsets: object = (0, 48)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parquet(columns: dict[str, object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return folder / "x.parquet"

    return make


def lists(width: int = 3, kind: pa.DataType | None = None, values: list[object] | None = None) -> pa.Array:
    values = [[1.0] * width] * 4 if values is None else values
    return pa.array(values, type=pa.list_(kind or pa.float32(), width))


def folder_of(**files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    return make


def parquet_cut(folder: Path) -> Path:
    path = parquet({"embedding": lists()})(folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def parquet_scrambled(folder: Path) -> Path:
    path = parquet({"embedding": lists()})(folder)
    content = bytearray(path.read_bytes())
    content[-60:-8] = os.urandom(1) * 52
    path.write_bytes(content)
    return path


def a_folder_named_like_a_shard(folder: Path) -> Path:
    np.save(folder / "a.npy", GOOD)
    (folder / "b.npy").mkdir()
    return folder


def dangling_link(folder: Path) -> Path:
    (folder / "x.npy").symlink_to(folder / "gone.npy")
    return folder / "x.npy"


def both_sides_and_shards(folder: Path) -> Path:
    (folder / "img_emb").mkdir()
    np.save(folder / "img_emb" / "a.npy", GOOD)
    np.save(folder / "b.npy", GOOD)
    return folder


def empty_side(folder: Path) -> Path:
    (folder / "text_emb").mkdir()
    return folder


F64 = npy_bytes(GOOD.astype("float64"))
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "path that is not there": (lambda folder: folder / "gone.npy", "does not exist"),
    "url": (lambda folder: Path("memory://bucket/x.npy"), "does not exist"),
    "dangling link": (dangling_link, "does not exist"),
    "zero bytes": (raw("x.npy", b""), r"empty file \(0 bytes\)"),
    "unknown suffix": (raw("x.csv", b"1,2"), "unknown suffix '.csv'"),
    "pickle": (raw("x.pkl", pickle.dumps(GOOD)), "pickles are never loaded: convert it once with aniso import-pickle"),
    "torch file": (raw("x.pt", b"PK"), "pickles are never loaded"),
    "pickle called npy": (raw("x.npy", pickle.dumps(GOOD)), "does not start like a .npy file"),
    "npz called npy": (raw("x.npy", b"PK\x03\x04" + b"\0" * 60), "does not start like a .npy file"),
    "text called npy": (raw("x.npy", b"hello"), "does not start like a .npy file"),
    "half a magic": (raw("x.npy", b"\x93NUM"), "does not start like a .npy file"),
    "header cut": (raw("x.npy", npy_bytes()[:40]), "damaged .npy header"),
    "header garbage": (raw("x.npy", npy_header("{'descr': ")), "damaged .npy header"),
    "header calls a function": (raw("x.npy", npy_header("__import__('os').getcwd()\n")), "damaged .npy header"),
    "header keys": (raw("x.npy", npy_header("{'descr': '<f4'}\n")), "damaged .npy header"),
    "format version 3": (raw("x.npy", npy_header("{}", (3, 0))), "format version 3.0"),
    "format version 9": (raw("x.npy", npy_header("{}", (9, 0))), "format version 9.0"),
    "negative rows": (
        raw("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}\n")),
        r"empty, shape \[-1, 3\]",
    ),
    "absurd rows": (
        raw("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**30, 3)}\n")),
        "damaged .npy header",
    ),
    "more rows than bytes": (
        raw("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 3)}\n")),
        "is truncated",
    ),
    "truncated": (raw("x.npy", npy_bytes()[:-1]), "is truncated, 175 bytes where the header asks for 176"),
    "trailing bytes": (raw("x.npy", npy_bytes() + b"\0"), "1 bytes after the 176"),
    "one dimension": (npy(GOOD[0]), r"1 dimensions, shape \[3\]"),
    "three dimensions": (npy(GOOD[None]), "3 dimensions"),
    "no dimensions": (npy(np.float32(1)), "0 dimensions"),
    "no rows": (npy(GOOD[:0]), r"empty, shape \[0, 3\]"),
    "no columns": (npy(GOOD[:, :0]), r"empty, shape \[4, 0\]"),
    "objects": (npy(GOOD.astype(object), allow_pickle=True), "pickled Python objects, which are never loaded"),
    "integers": (npy(GOOD.astype(np.int64)), "holds int64"),
    "booleans": (npy(GOOD > 1), "holds bool"),
    "complex": (npy(GOOD * 1j), "holds complex64"),
    "strings": (npy(np.array([["a", "b"]])), "holds str"),
    "structured": (npy(np.zeros((2, 2), dtype=[("a", "f4")])), "holds void"),
    "long double": (npy(GOOD.astype(np.longdouble)), "not floating embeddings"),
    "big endian": (npy(GOOD.astype(">f4")), r"wrong byte order \(dtype >f4\)"),
    "big endian half": (npy(GOOD.astype(">f2")), "wrong byte order"),
    "safetensors of 3 bytes": (raw("x.safetensors", b"\1\0\0"), "does not start like a .safetensors"),
    "safetensors header too long": (raw("x.safetensors", b"\xff" * 30), "does not start like a .safetensors"),
    "safetensors bad json": (raw("x.safetensors", safetensors(b"{'a': 1}")), "damaged .safetensors header"),
    "safetensors json list": (raw("x.safetensors", safetensors([1, 2])), "damaged .safetensors header"),
    "safetensors deep json": (raw("x.safetensors", safetensors(b"[" * 100_000)), "damaged .safetensors header"),
    "safetensors no tensor": (raw("x.safetensors", safetensors({})), "has 0 tensors"),
    "safetensors two tensors": (raw("x.safetensors", safetensors({"a": entry(), "b": entry()})), r"2 tensors \(a, b\)"),
    "safetensors entry": (raw("x.safetensors", safetensors({"a": 3})), "damaged header entry"),
    "safetensors integers": (raw("x.safetensors", safetensors({"a": entry("I64")})), "holds I64"),
    "safetensors 1-D": (raw("x.safetensors", safetensors({"a": entry(shape=[12])})), "1 dimensions"),
    "safetensors size": (raw("x.safetensors", safetensors({"a": entry(shape=[5, 3])})), "occupies 48 bytes"),
    "safetensors offsets": (raw("x.safetensors", safetensors({"a": entry(offsets=[-48, 0])})), "occupies 48 bytes"),
    "safetensors truncated": (raw("x.safetensors", safetensors({"a": entry()}, b"\0" * 47)), "is truncated"),
    "parquet garbage": (raw("x.parquet", b"PAR1" + b"x" * 100), "cannot be read as parquet"),
    "parquet cut": (parquet_cut, "cannot be read as parquet"),
    "parquet scrambled footer": (parquet_scrambled, "cannot be read as parquet"),
    "parquet without lists": (parquet({"a": [1.0, 2.0]}), "has 0 columns"),
    "parquet two candidates": (parquet({"a": lists(), "b": lists()}), "has 2 columns"),
    "parquet varying lists": (parquet({"embedding": [[1.0], [1.0, 2.0]]}), "is list<.*not a fixed-size list"),
    "parquet integers": (parquet({"embedding": lists(kind=pa.int32(), values=[[1, 2, 3]])}), "not a fixed-size list"),
    "parquet no rows": (parquet({"embedding": lists(values=[])}), r"empty, shape \[0, 3\]"),
    "empty folder": (folder_of(), "no embeddings in it"),
    "folder of notes": (folder_of(notes__txt=b"hi"), "no embeddings in it"),
    "folder of pickles": (folder_of(a__pkl=b"x"), "only pickles such as a.pkl, which .*import-pickle"),
    "mixed formats": (folder_of(a__npy=npy_bytes(), b__safetensors=safetensors({"a": entry()})), "mixes npy and safe"),
    "mixed dtypes": (folder_of(a__npy=npy_bytes(), b__npy=F64), "stored dtype is float64, but a.npy has float32"),
    "mixed widths": (folder_of(a__npy=npy_bytes(), b__npy=npy_bytes(GOOD[:, :2])), "width is 2, but a.npy has 3"),
    "one bad shard": (folder_of(a__npy=npy_bytes(), b__npy=npy_bytes()[:-1]), "b.npy: is truncated"),
    "folder as shard": (a_folder_named_like_a_shard, "b.npy: is not a regular file"),
    "shards beside img_emb": (both_sides_and_shards, "shards of its own beside img_emb"),
    "empty text_emb": (empty_side, "text_emb: has no embeddings in it"),
}


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
