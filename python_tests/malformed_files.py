"""Files and folders that cannot be used, each with what its error says; shared by the tests of reading and converting.

``CASES`` maps a name to a function that makes the thing in an empty folder and returns the path to open, and a pattern
of the reason.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


def arrow(columns: dict[str, object], stream: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        table = pa.table(columns)
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(folder / "x.arrow", table.schema) as writer:
            writer.write_table(table)
        return folder / "x.arrow"

    return make


def arrow_cut(folder: Path) -> Path:
    path = arrow({"embedding": lists()})(folder)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def parquet_cut(folder: Path) -> Path:
    path = parquet({"embedding": lists()})(folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def parquet_twice(folder: Path) -> Path:
    pq.write_table(pa.Table.from_arrays([lists(), lists()], ["embedding", "embedding"]), folder / "x.parquet")
    return folder / "x.parquet"


def parquet_scrambled(folder: Path) -> Path:
    path = parquet({"embedding": lists()})(folder)
    content = bytearray(path.read_bytes())
    content[-60:-8] = b"\xff" * 52
    path.write_bytes(content)
    return path


def a_folder_named_like_a_shard(folder: Path) -> Path:
    np.save(folder / "a.npy", GOOD)
    (folder / "b.npy").mkdir()
    return folder


def dangling_link(folder: Path) -> Path:
    (folder / "x.npy").symlink_to(folder / "gone.npy")
    return folder / "x.npy"


def loop_of_links(folder: Path) -> Path:
    (folder / "a.npy").symlink_to(folder / "b.npy")
    (folder / "b.npy").symlink_to(folder / "a.npy")
    return folder


def loop_of_folders(folder: Path) -> Path:
    (folder / "x").symlink_to(folder / "y")
    (folder / "y").symlink_to(folder / "x")
    return folder / "x"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "x.npy")
    return folder


def both_halves(folder: Path) -> Path:
    for half in ("img_emb", "text_emb"):
        (folder / half).mkdir()
        np.save(folder / half / "a.npy", GOOD)
    return folder


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
    "header of 20 kB": (
        raw("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}" + " " * 20_000 + "\n")),
        "damaged .npy header",
    ),
    "header not ascii": (
        raw("x.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), 'ü': 1}\n")),
        "damaged .npy header",
    ),
    "header nested deeply": (raw("x.npy", npy_header("(" * 5000 + ")" * 5000 + "\n")), "damaged .npy header"),
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
    "safetensors unknown dtype": (raw("x.safetensors", safetensors({"a": entry("F8_E4M3")})), "holds F8_E4M3"),
    "safetensors overlap": (
        raw("x.safetensors", safetensors({"embeddings": entry(), "b": entry(offsets=[24, 72])}, b"\0" * 72)),
        "tensor 'b' begins at byte 24, but 48 is where the one before it ends",
    ),
    "safetensors gap": (
        raw("x.safetensors", safetensors({"embeddings": entry(), "b": entry(offsets=[60, 108])}, b"\0" * 108)),
        "tensor 'b' begins at byte 60, but 48 is where",
    ),
    "safetensors trailing": (raw("x.safetensors", safetensors({"a": entry()}, b"\0" * 50)), "2 bytes after the ten"),
    "safetensors twice the same": (
        raw("x.safetensors", safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2))),
        "names 'a' twice",
    ),
    "safetensors not unicode": (raw("x.safetensors", safetensors(b'{"\xff\xfe": 1}')), "damaged .safetensors header"),
    "safetensors infinite shape": (raw("x.safetensors", safetensors({"a": entry(shape=[1e400, 3])})), "damaged header"),
    "safetensors truncated": (raw("x.safetensors", safetensors({"a": entry()}, b"\0" * 47)), "is truncated"),
    "parquet garbage": (raw("x.parquet", b"PAR1" + b"x" * 100), "cannot be read as parquet"),
    "parquet cut": (parquet_cut, "cannot be read as parquet"),
    "parquet scrambled footer": (parquet_scrambled, "cannot be read as parquet"),
    "parquet without lists": (parquet({"a": [1.0, 2.0]}), "has 0 columns"),
    "parquet two candidates": (parquet({"a": lists(), "b": lists()}), "has 2 columns"),
    "parquet varying lists": (parquet({"embedding": [[1.0], [1.0, 2.0]]}), "is list<.*not a fixed-size list"),
    "parquet integers": (parquet({"embedding": lists(kind=pa.int32(), values=[[1, 2, 3]])}), "not a fixed-size list"),
    "parquet columns of one name": (parquet_twice, "has 2 columns named 'embedding'"),
    "parquet list of width 0": (parquet({"embedding": lists(0)}), r"empty, shape \[4, 0\]"),
    "parquet called arrow": (raw("x.arrow", b"PAR1" + b"x" * 100 + b"PAR1"), "cannot be read as an Arrow file"),
    "arrow garbage": (raw("x.feather", b"ARROW1\0\0" + b"x" * 100), "cannot be read as an Arrow file"),
    "arrow cut": (arrow_cut, "cannot be read as an Arrow file"),
    "arrow stream": (arrow({"embedding": lists()}, stream=True), "cannot be read as an Arrow file"),
    "arrow without lists": (arrow({"a": [1.0]}), "has 0 columns"),
    "arrow no rows": (arrow({"embedding": lists(values=[])}), r"empty, shape \[0, 3\]"),
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
    "loop of links": (loop_of_links, "a.npy: does not exist"),
    "loop of folders": (loop_of_folders, "does not exist"),
    "pipe as shard": (pipe, "x.npy: is not a regular file"),
    "both halves": (both_halves, "has both img_emb and text_emb"),
    "empty text_emb": (empty_side, "text_emb: has no embeddings in it"),
}
