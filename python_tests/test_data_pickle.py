"""Pickled records: every form and protocol is imported; a hostile pickle is refused and nothing of it runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from aniso_ext.cli.main import app
from aniso_ext.data import import_pickle, open_embeddings, read_metadata
from aniso_ext.data.restricted_pickle import read_pickle
from aniso_ext.errors import DataError, InputError

RNG = np.random.default_rng(0)
TEXT, IMAGE = (RNG.standard_normal((5, 3)).astype(np.float32) for _ in range(2))
CAPTIONS = ["a", "b", "ü", "", "long " * 50]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def store(folder: Path, value: Any, protocol: int = 4) -> Path:
    path = folder / "records.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


FORMS: dict[str, Any] = {
    "columns": {"image_embeds": IMAGE, "text_embeds": TEXT, "captions": CAPTIONS, "ids": np.arange(5)},
    "columns of rows": {
        "image_embeds": list(IMAGE), "text_embeds": list(TEXT), "captions": tuple(CAPTIONS), "ids": list(range(5)),
    },
    "a dict a row": [
        {"image_embeds": IMAGE[i], "text_embeds": TEXT[i], "captions": CAPTIONS[i], "ids": np.int64(i)}
        for i in range(5)
    ],
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_protocol_becomes_the_layout(tmp_path: Path, form: str, protocol: int) -> None:
    done = import_pickle(store(tmp_path, FORMS[form], protocol), tmp_path / "out", rows_per_shard=2)
    assert (done.rows, done.width, done.source, done.target) == (5, 3, "text_embeds", "image_embeds")
    assert (set(done.metadata), done.left_out, len(done.files)) == ({"captions", "ids"}, {}, 9)
    assert np.array_equal(open_embeddings(tmp_path / "out", kind="text").numpy(), TEXT)
    assert np.array_equal(open_embeddings(tmp_path / "out", kind="image").numpy(), IMAGE)
    metadata = read_metadata(tmp_path / "out", rows=5)
    assert metadata.column("captions").to_pylist() == CAPTIONS
    assert metadata.column("ids").to_pylist() == list(range(5))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_are_those_of_pythons_own_unpickler(tmp_path: Path, protocol: int) -> None:
    shared = ["x"]
    value = {
        "arrays": [
            array.astype(dtype)
            for dtype in ("f2", "<f4", ">f8", "i1", ">i2", "u8", "?", "U5", "S3")
            for array in (TEXT, np.asfortranarray(TEXT), TEXT[:0], TEXT[0], TEXT[::2, 1:])
        ],
        "scalars": [np.float16(1.5), np.int64(-3), np.bool_(True), 1.5, -7, 2**70, True, None, "ü\n", b"\0\xff", b""],
        "containers": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {1, 2}, frozenset("ab"), bytearray(b"x")),
        "shared": [shared, shared],
    }
    got, want = read_pickle(store(tmp_path, value, protocol)), pickle.loads(pickle.dumps(value, protocol))
    for ours, theirs in zip(got["arrays"], want["arrays"], strict=True):
        assert ours.dtype == theirs.dtype.newbyteorder("=") and np.array_equal(ours, theirs)
    assert got["scalars"] == want["scalars"]
    assert got["containers"] == want["containers"]
    assert got["shared"] == want["shared"] and got["shared"][0] is got["shared"][1]


def test_names_of_numpy_1_and_2_are_both_known(tmp_path: Path) -> None:
    content = pickle.dumps(TEXT, 2)
    assert b"numpy._core" in content or b"numpy.core" in content
    for old, new in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
        assert np.array_equal(read_pickle(store(tmp_path, content.replace(old, new))), TEXT)


def test_fields_can_be_named_and_what_is_not_imported_is_told(tmp_path: Path) -> None:
    records = {
        "a": TEXT, "b": IMAGE.astype(">f8"),
        "boxes": [[1.0, 2.0]] * 5, "few": [1, 2], "mixed": [1, "x", 2, 3, 4], 7: "t",
    }  # fmt: skip
    path = store(tmp_path, records)
    with pytest.raises(InputError, match=r"cannot tell source from target: fields with embeddings are a \[5, 3\], b"):
        import_pickle(path, tmp_path / "out")
    with pytest.raises(InputError, match=r"field 'few' has no embeddings: .*: pass another target_key"):
        import_pickle(path, tmp_path / "out", target_key="few")
    assert not (tmp_path / "out").exists()
    done = import_pickle(path, tmp_path / "out", source_key="b", target_key="a", dtype="float16")
    assert done.left_out.keys() == {"boxes", "few", "mixed", "7"} and done.metadata == ()
    assert done.left_out["few"] == "has 2 values for 5 rows"
    assert np.array_equal(open_embeddings(tmp_path / "out", kind="text").numpy(), IMAGE.astype(np.float16))
    only = import_pickle(store(tmp_path, list(TEXT)), tmp_path / "only")
    assert (only.source, only.target) == ("embeddings", None)
    assert np.array_equal(open_embeddings(tmp_path / "only").numpy(), TEXT)


def test_records_that_do_not_fit_together(tmp_path: Path) -> None:
    for value, reason in (
        ({"text": [TEXT[0], TEXT[1][:2]]}, r"field 'text': row 1 is \(2,\), but row 0 is \(3,\): give"),
        ([{"text": TEXT[0]}, {"image": TEXT[0]}], r"row 1 has \['image'\], but row 0 has \['text'\]: give"),
        ([{"text": TEXT[0]}, 3], "row 1 has int"),
        ("text", "holds a str, not records"),
        ([], "holds nothing"),
        ({"text": TEXT, "image": IMAGE[:4]}, "image 4, text 5"),
        ({"text_a": TEXT, "text_b": TEXT}, "'text_a' and 'text_b' may all be the source: pass source_key"),
        ({"ids": [1, 2]}, "no field has floating"),
        ({"text": TEXT.astype(int)}, "no field has floating"),
    ):
        with pytest.raises((DataError, InputError), match=reason):
            import_pickle(store(tmp_path, value), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


class Persistent(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return "outside" if value == "x" else None


def persistent(protocol: int) -> bytes:
    buffer = io.BytesIO()
    Persistent(buffer, protocol).dump(["x"])
    return buffer.getvalue()


def nested(wrap: Callable[[Any], Any], depth: int = 200) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def objects(kind: Any = object) -> np.ndarray:
    array = np.empty(2, kind)
    array[:] = [Call(os.mkdir, "MARKER"), 1]
    return array


MKDIR = b"cos\nmkdir\n(S'MARKER'\ntR."
MULTIARRAY = pickle.dumps(TEXT, 2).split(b"\n")[0][3:]  # numpy._core.multiarray, or numpy.core.multiarray
FLOAT32 = b"cnumpy\ndtype\n(S'f4'\nI00\nI01\ntR"
SHELL = b"c" + MULTIARRAY + b"\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
HOSTILE: dict[str, tuple[Any, str]] = {
    "os.system": (Call(os.system, "mkdir MARKER"), r"names (posix|os)\.system, which is not admitted"),
    "os.mkdir by hand": (MKDIR, r"names os\.mkdir"),
    "call behind good data": (b"(" + pickle.dumps(TEXT, 2)[2:-1] + MKDIR[:-1] + b"l.", r"names os\.mkdir"),
    "builtins.eval": (Call(eval, "__import__('os').mkdir('MARKER')"), r"names (builtins|__builtin__)\.eval"),
    "builtins.exec": (b"cbuiltins\nexec\n(S'import os; os.mkdir(\"MARKER\")'\ntR.", r"names builtins\.exec"),
    "builtins.getattr": (b"cbuiltins\ngetattr\n(cos\nmkdir\nS'__call__'\ntR.", r"names builtins\.getattr"),
    "attribute chain": (b"\x80\x04\x8c\x08builtins\x8c\x11bytes.__class__.x\x93.", r"names builtins\.bytes\.__class__"),
    "dotted numpy": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", r"names numpy\.ndarray\.__init__"),
    "computed name": (b"\x80\x04\x8c\x02os" + b"(\x8c\x05mkdirl" + b"\x93.", "names something by what is not a text"),
    "name through the memo": (b"\x80\x04\x8c\x02os\x94\x8c\x05mkdir\x940h\x00h\x01\x93.", r"names os\.mkdir"),
    "subprocess": (b"csubprocess\nPopen\n(S'mkdir MARKER'\ntR.", r"names subprocess\.Popen"),
    "ctypes": (b"cctypes\nCDLL\n(NtR.", r"names ctypes\.CDLL"),
    "importlib": (b"cimportlib\nimport_module\n(S'os'\ntR.", r"names importlib\.import_module"),
    "numpy.load": (b"cnumpy\nload\n(S'x.npy'\nNI01\ntR.", r"names numpy\.load"),
    "numpy.lib.npyio": (b"cnumpy.lib.npyio\nload\n(S'x.npy'\ntR.", r"names numpy\.lib\.npyio\.load"),
    "numpy.memmap": (b"cnumpy\nmemmap\n(S'MARKER'\ntR.", r"names numpy\.memmap"),
    "numpy.fromfile": (b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.", r"names numpy\.fromfile"),
    "object array": (objects(), "array of Python objects|names (posix|os).mkdir"),
    "object array of texts": (np.array(["a", None], object), "array of Python objects"),
    "object scalar": (b"c" + MULTIARRAY + b"\nscalar\n(cnumpy\ndtype\n(S'O8'\nI00\nI01\ntRS'xxxxxxxx'\ntR.",
                      "array of Python objects"),
    "pickled scalar": (b"c" + MULTIARRAY + b"\nscalar\n(" + FLOAT32 + MKDIR[:-1] + b"tR.", r"names os\.mkdir"),
    "structured array": (np.zeros(2, [("a", "f4")]), "array of dtype 'V4'"),
    "datetimes": (np.zeros(2, "M8[s]"), "array of dtype 'M8'"),
    "complex": (TEXT * 1j, "array of dtype 'c8'"),
    "dtype with fields": (FLOAT32 + b"(I3\nS'<'\nN(S'a'\nt}I-1\nI-1\nI0\ntb.", "structured dtype"),
    "dtype that is an object": (b"cnumpy\ndtype\n(cbuiltins\nset\nI00\nI01\ntR.", "calls dtype in a way"),
    "dtype of Python text": (b"cnumpy\ndtype\n(S'object'\nI00\nI01\ntR.", "dtype 'object'"),
    "more rows than bytes": (SHELL + b"(I1\n(I1000000000\nI1000\nt" + FLOAT32 + b"I00\nS'xxxx'\ntb.",
                             "4 bytes that do not fill its shape"),
    "negative rows": (SHELL + b"(I1\n(I-1\nt" + FLOAT32 + b"I00\nS'xxxx'\ntb.", "shape is not a tuple of sizes"),
    "huge reconstruct": (b"c" + MULTIARRAY + b"\n_reconstruct\n(cnumpy\nndarray\n(I99999999999999\ntS'b'\ntR.",
                         "array without content"),
    "reconstruct of another class": (b"c" + MULTIARRAY + b"\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
                                     "calls reconstruct in a way"),
    "matrix": (np.asmatrix(TEXT), r"names numpy\.matrix|names numpy\.matrixlib"),
    "masked array": (np.ma.masked_array([1.0], [True]), r"names numpy\.ma"),
    "state of a list": (b"](I1\ntb.", "sets the state of something that is not an array"),
    "setstate of a class": (b"cnumpy\nndarray\n}S'__setstate__'\ncos\nmkdir\nsb.", r"names os\.mkdir"),
    "state of a name": (b"cnumpy\nndarray\n}S'__call__'\nI1\nsb.", "sets the state of something"),
    "slots of a name": (b"c" + MULTIARRAY + b"\nscalar\n(N}S'__defaults__'\n(I1\ntstb.", "sets the state of something"),
    "own class": (OrderedDict(a=1), r"names collections\.OrderedDict"),
    "INST": (b"(S'MARKER'\nios\nmkdir\n.", "uses INST at byte"),
    "OBJ": (b"(cos\nmkdir\nS'MARKER'\no.", r"names os\.mkdir"),
    "OBJ of a known name": (b"(cnumpy\nndarray\nS'MARKER'\no.", "uses OBJ at byte"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n(I3\nt\x81.", "uses NEWOBJ at byte"),
    "NEWOBJ_EX": (b"\x80\x04cnumpy\nndarray\n)}\x92.", "uses NEWOBJ_EX at byte"),
    "EXT1": (b"\x80\x02\x82\x01.", "uses EXT1 at byte"),
    "EXT2": (b"\x80\x02\x83\x01\x00.", "uses EXT2 at byte"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "uses EXT4 at byte"),
    "persistent id": (persistent(2), "uses BINPERSID at byte"),
    "persistent id, protocol 0": (persistent(0), "uses PERSID at byte"),
    "out-of-band buffer": (b"\x80\x05\x97.", "uses NEXT_BUFFER at byte"),
    "read-only buffer": (b"\x80\x05C\x01x\x98.", "uses READONLY_BUFFER at byte"),
    "call of a value": (b"S'x'\n(I1\ntR.", "calls something that is not admitted"),
    "call without a tuple": (b"cbuiltins\nset\n]R.", "calls something that is not admitted"),
    "bytes of a length": (b"cbuiltins\nbytes\n(I999999999\ntR.", "calls bytes in a way"),
    "bytearray of a length": (b"cbuiltins\nbytearray\n(I999999999\ntR.", "calls bytearray in a way"),
    "other codec": (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "calls encode in a way"),
    "deep lists": (nested(lambda value: [value]), "nests deeper"),
    "deep tuples": (nested(lambda value: (value,)), "nests deeper"),
    "deep dicts": (nested(lambda value: {"a": value}), "nests deeper"),
    "deep marks": (b"(" * 100_000, "nests deeper than 64 levels"),
    "list of itself": (b"]q\x00h\x00a.", "holds a list|no field"),
    "doubling lists": (b"]q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(200)) + b".", "nests deeper"),
    "memo far away": (b"]r\xff\xff\xff\xff.", "numbers its memo up to 4294967295 after 2 steps"),
    "memo far away, protocol 0": (b"]p999999999999\n.", "numbers its memo up to"),
    "memo that is not there": (b"\x80\x02h\x05.", "not a whole pickle"),
    "huge BINBYTES": (b"\x80\x03B\xff\xff\xff\x7fx.", "not a whole pickle"),
    "huge BINBYTES8": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "not a whole pickle"),
    "impossible BINBYTES8": (b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1) + b"x.", "not a whole pickle"),
    "huge BINUNICODE8": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "not a whole pickle"),
    "huge BYTEARRAY8": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.", "not a whole pickle"),
    "huge FRAME": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "holds nothing|not records"),
    "negative BINSTRING": (b"T\xff\xff\xff\xffx.", "not a whole pickle"),
    "long integer": (b"\x80\x02\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000 + b".", "integer of 7999 bits"),
    "list as key": (b"}]Ns.", "uses a list as a key"),
    "array as key": (b"}" + pickle.dumps(TEXT, 2)[2:-1] + b"Ns.", "uses a ndarray as a key"),
    "bare name": (b"(cnumpy\nndarray\nl.", "bare name"),
    "array in a list before it is filled": (b"]" + SHELL + b"a.", "array without content"),
    "pop past the mark": (b"N(0000.", "not a whole pickle"),
    "mark that is missing": (b"Nt.", "not a whole pickle"),
    "values left over": (b"NN.", "not a whole pickle"),
    "cut": (pickle.dumps({"text": TEXT})[:-20], "not a whole pickle"),
    "no end": (b"N", "not a whole pickle"),
    "two pickles": (pickle.dumps(1) + pickle.dumps(2), "bytes after the end of the pickle"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "unknown opcode": (b"\xfeN.", "not a whole pickle"),
    "text": (b"hello", "not a whole pickle|uses"),
    "torch file": (b"PK\x03\x04" + b"\0" * 50, "not a whole pickle|uses"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    value, reason = HOSTILE[name]
    path = store(tmp_path, value, 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, InputError), match=reason) as caught:
        import_pickle(path, tmp_path / "out")
    message = str(caught.value)
    assert "records.pkl" in message and "\n" not in message and message.count(": ") >= 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["records.pkl"]  # no MARKER, no output


def test_the_hostile_pickles_do_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker means something: Python's own unpickler makes it."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "os.mkdir by hand", "builtins.eval", "builtins.exec", "object array", "INST", "OBJ"):
        value = HOSTILE[name][0]
        pickle.loads(value if isinstance(value, bytes) else pickle.dumps(value, 2))
        (tmp_path / "MARKER").rmdir()


def test_random_bytes_and_damaged_pickles_are_refused_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    good = pickle.dumps(FORMS["columns"], 4)
    monkeypatch.chdir(tmp_path)
    refused = 0
    for trial in range(400):
        content = bytearray(good if trial % 2 else rng.bytes(200))
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        try:
            read_pickle(store(tmp_path, bytes(content)))
        except DataError:
            refused += 1
    assert refused > 200  # all random ones, and some of the damaged ones
    assert [entry.name for entry in tmp_path.iterdir()] == ["records.pkl"]


def test_the_command_says_what_it_did_and_open_embeddings_names_it(tmp_path: Path) -> None:
    path = store(tmp_path, {**FORMS["columns"], "few": [1]})
    with pytest.raises(DataError, match="pickles are never loaded: convert it once with aniso import-pickle"):
        open_embeddings(path)
    done = CliRunner().invoke(app, ["import-pickle", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    for line in ("text_emb: field 'text_embeds', 5 rows of", "metadata: captions, ids", "left out: field 'few'"):
        assert line in done.stdout
    assert pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet").num_rows == 5
    again = CliRunner().invoke(app, ["import-pickle", str(path), "--out", str(tmp_path / "out")])
    assert again.exit_code == 1 and "exists already" in again.stderr
