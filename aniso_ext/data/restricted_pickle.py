"""Pickles read as data: a stack machine over ``pickletools`` that builds NumPy arrays and builtin values, nothing else.

Python's own unpickler calls what a pickle names. This reader calls nothing: the few names that arrays are stored with
are tokens here, and any other name or opcode ends the reading before a value comes out. Arrays are made from their
bytes after dtype, shape and size have been checked, so not even NumPy's reconstruction functions see the content.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.data.locations import Location, why
from aniso_ext.data.shards import file_size, unusable
from aniso_ext.errors import DataError

_CORE = ("numpy.core", "numpy._core")
_NAMES = {
    **{f"{core}.multiarray _reconstruct": "reconstruct" for core in _CORE},
    **{f"{core}.multiarray scalar": "scalar" for core in _CORE},
    **{f"{core}.numeric _frombuffer": "frombuffer" for core in _CORE},
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    **{f"{module} {name}": name for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray", "set")},
    **{f"{module} frozenset": "frozenset" for module in ("builtins", "__builtin__")},
}
"""What a pickle may name, as "module name", and what it stands for here."""
_DTYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1|[US]\d{1,6})")
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_MARKS = 64
_STACK = 1 << 22
_DEPTH = 8
_LONG_BITS = 512
_REMEDY = "import only pickles of NumPy arrays, lists, dicts, texts and numbers"


def read_pickle(path: Location) -> Any:
    """The value in a pickle of protocol 0 to 5, made of builtin containers, texts, numbers and NumPy arrays.

    A local file is mapped, and arrays are views of the bytes that were read; a remote file is read into memory.

    Raises:
        DataError: the file names or does anything else, nests too deeply, or is damaged. Nothing of it has been run.
    """
    size = file_size(path)
    try:
        if not isinstance(path, Path):
            return _read(path, BytesIO(path.read_bytes()), size)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read(path, mapped, size)
    except OSError as error:
        raise unusable(path, f"cannot be read ({why(error)})", "check the permissions") from None


def _read(path: Location, source: Any, size: int) -> Any:
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(source):
            machine.step(opcode.name, argument, position or 0)
        value = machine.result()
        _check_depth(value)
    except _Refused as refusal:
        raise unusable(path, str(refusal), _REMEDY) from None
    except DataError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, MemoryError, struct.error) as error:
        reason = f"is not a whole pickle ({str(error)[:80] or type(error).__name__})"
        raise unusable(path, reason, "copy or write it again") from None
    if source.tell() != size:
        raise unusable(path, f"has {size - source.tell()} bytes after the end of the pickle", "store one value a file")
    return value


class _Refused(Exception):
    """The pickle does something that is not admitted."""


@dataclass(frozen=True)
class _Name:
    """A name that a pickle may use; not what it names."""

    meaning: str


@dataclass(eq=False)
class _Dtype:
    """The dtype of arrays to come; its byte order may be told later."""

    dtype: np.dtype


@dataclass(eq=False)
class _Unbuilt:
    """An array whose content comes later, and where the memo keeps it."""

    places: list[int] = field(default_factory=list)


class _Machine:
    """Stack, marks and memo of a pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def step(self, name: str, argument: Any, position: int) -> None:
        """Do one opcode.

        Raises:
            _Refused: it is not admitted.
        """
        self._steps += 1
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > _LONG_BITS:
                raise _Refused(f"holds an integer of {argument.bit_length()} bits at byte {position}")
            self._push(argument)
        elif name in _FIXED:
            self._push(_FIXED[name]())
        elif (action := getattr(self, f"_op_{name.lower()}", None)) is not None:
            action(argument)
        else:
            raise _Refused(f"uses {name} at byte {position}, which can run code or reach outside the file")

    def result(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            raise ValueError("values are left over")
        return self._stack[0]

    def _push(self, value: Any) -> None:
        if len(self._stack) >= _STACK:
            raise _Refused(f"piles up more than {_STACK} values")
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("a value is missing")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("a mark is missing")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise ValueError(f"no {kind.__name__} where one is filled")
        return self._stack[-1]

    def _op_proto(self, version: int) -> None:
        if not 0 <= version <= 5:
            raise _Refused(f"has protocol {version}, known are 0 to 5")

    def _op_frame(self, _: Any) -> None:
        """Frames only say how much to read ahead."""

    def _op_stop(self, _: Any) -> None:
        """The end; what lies on the stack is the value."""

    def _op_mark(self, _: Any) -> None:
        if len(self._marks) >= _MARKS:
            raise _Refused(f"nests deeper than {_MARKS} levels")
        self._marks.append(len(self._stack))

    def _op_pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _op_dup(self, _: Any) -> None:
        value = self._pop()
        self._push(value)
        self._push(value)

    def _op_tuple(self, _: Any) -> None:
        self._push(tuple(self._pop_to_mark()))

    def _op_tuple1(self, _: Any) -> None:
        self._push((self._pop(),))

    def _op_tuple2(self, _: Any) -> None:
        second, first = self._pop(), self._pop()
        self._push((first, second))

    def _op_tuple3(self, _: Any) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self._push((first, second, third))

    def _op_list(self, _: Any) -> None:
        self._push(self._pop_to_mark())

    def _op_dict(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._push({})
        self._set_items(items)

    def _op_frozenset(self, _: Any) -> None:
        self._push(frozenset(_key(value) for value in self._pop_to_mark()))

    def _op_append(self, _: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _op_appends(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _op_additems(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._top(set).update(_key(value) for value in values)

    def _op_setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _op_setitems(self, _: Any) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _op_get(self, index: int) -> None:
        self._push(self._memo[index])

    _op_binget = _op_long_binget = _op_get

    def _op_put(self, index: int) -> None:
        if not 0 <= index <= self._steps:
            raise _Refused(f"numbers its memo up to {index} after {self._steps} steps")
        value = self._top(object)
        if isinstance(value, _Unbuilt):
            value.places.append(index)
        self._memo[index] = value

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: Any) -> None:
        self._op_put(len(self._memo))

    def _op_global(self, name: str) -> None:
        if name not in _NAMES:
            raise _Refused(f"names {name.replace(' ', '.')[:80]}, which is not admitted")
        self._push(_Name(_NAMES[name]))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise _Refused("names something by what is not a text")
        self._op_global(f"{module} {name}")

    def _op_reduce(self, _: Any) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise _Refused("calls something that is not admitted")
        self._push(_made(name.meaning, arguments))

    def _op_build(self, _: Any) -> None:
        state = self._pop()
        target = self._top(object)
        if isinstance(target, _Dtype) and isinstance(state, tuple):
            target.dtype = _ordered(target.dtype, state)
        elif isinstance(target, _Unbuilt) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran_order, content = state
            array = _array(content, dtype, shape, bool(fortran_order))
            self._stack[-1] = array
            for place in target.places:
                self._memo[place] = array
        else:
            raise _Refused("sets the state of something that is not an array")


def _key(value: Any) -> Any:
    if not isinstance(value, (str, bytes, int, float, type(None))):
        raise _Refused(f"uses a {type(value).__name__} as a key")
    return value


def _made(meaning: str, arguments: tuple[Any, ...]) -> Any:
    """What a call that arrays and builtin values are stored as stands for."""
    match meaning, arguments:
        case "dtype", (str() as code, *_):
            if not _DTYPE.fullmatch(code):
                what = "Python objects" if code.lstrip("<>=|").startswith("O") else f"dtype {code[:20]!r}"
                raise _Refused(f"holds an array of {what}")
            return _Dtype(np.dtype(code))
        case "reconstruct", (_Name("ndarray"), _, _):
            return _Unbuilt()
        case "frombuffer", (content, dtype, shape, order):
            return _array(content, dtype, shape, order == "F")
        case "scalar", (dtype, content):
            return _array(content, dtype, (), False)[()]
        case "encode", (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
        case "bytes" | "bytearray", ():
            return b""
        case "bytearray", (bytes() as content,):
            return content
        case "bytearray", (str() as text, "latin-1"):
            return text.encode("latin-1")
        case "set", (list() as values,):
            return {_key(value) for value in values}
        case "frozenset", (list() as values,):
            return frozenset(_key(value) for value in values)
    raise _Refused(f"calls {meaning} in a way that is not admitted")


def _ordered(dtype: np.dtype, state: tuple[Any, ...]) -> np.dtype:
    """The dtype in the byte order of its pickled state (version, order, subdtype, names, fields, sizes, flags)."""
    if len(state) < 5 or state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
        raise _Refused("holds a structured dtype")
    return dtype.newbyteorder(state[1])


def _array(content: Any, dtype: Any, shape: Any, fortran_order: bool) -> np.ndarray:
    """The array of checked bytes in native byte order; nothing is allocated before they are known to be there."""
    if isinstance(content, str):  # bytes of Python 2
        content = content.encode("latin-1")
    if not isinstance(dtype, _Dtype) or not isinstance(content, (bytes, bytearray)):
        raise _Refused("holds an array of Python objects")
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise _Refused("holds an array whose shape is not a tuple of sizes")
    if len(shape) > 8 or math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise _Refused(f"holds an array of {len(content)} bytes that do not fill its shape")
    native = dtype.dtype.newbyteorder("=")
    if not content:
        return np.zeros(shape, native)
    array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")
    return array.astype(native, copy=False)


def _check_depth(value: Any) -> None:
    """Refuse what is nested deeper than records are, and values that were not finished."""
    level, seen = [value], set()
    for depth in range(_DEPTH + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, (_Name, _Dtype, _Unbuilt)):
                raise _Refused("holds an array without content, or a bare name")
            if isinstance(item, (dict, list, tuple, set, frozenset)) and item and id(item) not in seen:
                seen.add(id(item))
                following.extend(item.values() if isinstance(item, dict) else item)
        if not following:
            return
        if depth == _DEPTH:
            raise _Refused(f"nests deeper than {_DEPTH} levels")
        level = following
