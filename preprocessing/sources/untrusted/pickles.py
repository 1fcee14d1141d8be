"""Pickles from outside, read as data: numbers, text, lists, tables and NumPy arrays. Nothing in them is executed.

A pickle is a program: it imports names and calls them. Here the few names that NumPy's arrays need lead to functions of
this file, which check what they are given, and any other name is refused
(https://docs.python.org/3/library/pickle.html#restricting-globals). The pure Python unpickler runs it, for that in C
takes memory by numbers which the pickle chooses.

What is harmless in itself may still take all time and memory: a pickle names one object many times, so that a few bytes
unfold to more than any machine holds. Hence the bounds, and tables have keys of text alone: a tuple within a tuple
within a tuple takes for ever to be hashed, or all of the stack.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import tokenize
from typing import Any

import numpy as np

from preprocessing.errors import BadEpisode
from preprocessing.limits import limits

PLAIN = re.compile(r"[?biufSUO]\d*")  # booleans, numbers, text, objects
MAX_STEPS = 2**21  # that a pickle takes; the largest known, CALVIN's sentences, takes a third
BROKEN = (ValueError, TypeError, SyntaxError, EOFError, OverflowError, RecursionError, MemoryError, tokenize.TokenError)


def read_pickle(data: bytes) -> Any:
    """What it holds, arrays as ``np.ndarray``. BadEpisode where it asks for anything else, or breaks."""
    try:
        return _Arrays().of(_Unpickler(data).load())
    except Exception as error:  # bytes from outside break an unpickler in a dozen ways
        raise BadEpisode(f"a pickle that cannot be read: {type(error).__name__}: {str(error)[:200]}") from None


def read_npy(data: bytes) -> Any:
    """A ``.npy`` file, of objects as well: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(file)
        if kind.hasobject:
            values = read_pickle(data[file.tell() :])
            return values.item() if shape == () else values
        # NumPy itself would take memory for as many values as the header says, before it reads one.
        return np.frombuffer(data, kind, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    except BROKEN as error:
        why = f"{type(error).__name__}: {' '.join(str(error)[:200].split())}"
        raise BadEpisode(f"a .npy file that cannot be read: {why}") from None


class _DType:
    """``numpy.dtype(code, ...)``, whose state then names the order of its bytes."""

    def __init__(self, code: str, *_: Any):
        if not PLAIN.fullmatch(code):
            raise ValueError(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """``numpy._reconstruct(ndarray, (0,), b"b")``, whose state then is all of it."""

    def __init__(self, *_: Any):
        self.shape: tuple[int, ...] = (0,)
        self.values: Any = b""
        self.kind = _DType("u1")
        self.order = "C"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, fortran, self.values = state
        self.order = "F" if fortran else "C"


def _from_buffer(values: Any, kind: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", values))
    return array


class _Scalar(_Array):
    """``numpy.core.multiarray.scalar(dtype, bytes)``."""

    def __init__(self, kind: _DType, values: Any):
        self.__setstate__((1, (), kind, False, values))


def _no_bytes() -> bytes:
    return b""  # how protocols before 3 write them


def _no_items() -> dict[str, Any]:
    return {}


def _marker(*_: Any) -> None:
    raise ValueError("numpy.ndarray is called")


KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _marker,
    ("numpy", "dtype"): _DType,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): _no_items,
}
for package in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
    KNOWN[f"{package}.multiarray", "_reconstruct"] = _Array
    KNOWN[f"{package}.multiarray", "scalar"] = _Scalar
    KNOWN[f"{package}.numeric", "_frombuffer"] = _from_buffer


_Python: Any = pickle._Unpickler
# Sets have keys of any kind, copyreg's extensions need no name, and arrays are made by REDUCE alone.
REFUSED = {pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4}
REFUSED |= {pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX}
MAX_ARGUMENTS = 4  # of what is called


class _Steps(dict[int, Any]):
    """What to do at each byte, for as many steps as are allowed."""

    left = MAX_STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        return super().__getitem__(code)


class _Unpickler(_Python):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.dispatch = _Steps(STEPS)
        self._unwritten = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in KNOWN:
            raise ValueError(f"it asks for {module}.{name}")
        return KNOWN[module, name]

    def _encode(self, text: str, *_: Any) -> bytes:
        """How protocols before 3 write bytes: each text once, or a long one could be asked for over and over."""
        self._unwritten -= len(text)
        if self._unwritten < 0:
            raise ValueError("it asks for more bytes than it holds")
        return text.encode("latin1")

    def load_reduce(self) -> None:
        if len(self.stack[-1]) > MAX_ARGUMENTS:
            raise ValueError(f"it calls something with {len(self.stack[-1])} arguments")
        super().load_reduce()

    def load_build(self) -> None:
        """A state is given to arrays alone: else a pickle could change the functions above."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType):
            raise ValueError(f"it gives {type(self.stack[-1]).__name__} a state")
        self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        """No memory for more bytes than there are."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        table, keys = self.stack[-1], items[::2]
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in keys):
            raise ValueError("it has a table with keys that are no text")
        table.update(zip(keys, items[1::2], strict=True))


STEPS = {code: load for code, load in _Python.dispatch.items() if bytes([code]) not in REFUSED} | {
    pickle.REDUCE[0]: _Unpickler.load_reduce,
    pickle.BUILD[0]: _Unpickler.load_build,
    pickle.BYTEARRAY8[0]: _Unpickler.load_bytearray8,
    pickle.DICT[0]: _Unpickler.load_dict,
    pickle.SETITEM[0]: _Unpickler.load_setitem,
    pickle.SETITEMS[0]: _Unpickler.load_setitems,
}


class _Arrays:
    """Puts arrays in place of what was kept of them. What is there several times is looked at once, and counted as
    often as it is there: it will be so large where it is written out."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int]] = {}
        self._kept: list[Any] = []  # as long as an id stands for an object, that object must live
        self._size = 0  # numbers, texts and so on

    def of(self, value: Any) -> Any:
        if not isinstance(value, dict | list | tuple | _Array | _DType):
            self._count(1)
            return value
        if id(value) not in self._done:
            before = self._size
            self._kept.append(value)
            done = self._made(value)
            self._done[id(value)] = done, self._size - before
            return done
        done, size = self._done[id(value)]
        self._count(size)
        return done

    def _count(self, items: int) -> None:
        self._size += items
        if self._size > limits().array_bytes // 8:
            raise ValueError("it unfolds to more than limits.array_bytes")

    def _made(self, value: Any) -> Any:
        self._count(1)
        match value:
            case dict():
                return {key: self.of(item) for key, item in value.items()}
            case list():
                return [self.of(item) for item in value]
            case tuple():
                return tuple(self.of(item) for item in value)
            case _DType():
                return value.dtype
            case _Scalar():
                return self._array(value)[()]
            case _Array():
                return self._array(value)

    def _array(self, kept: _Array) -> np.ndarray:
        if kept.kind.dtype.hasobject:
            array = np.empty(len(kept.values), object)
            for place, item in enumerate(kept.values):
                array[place] = self.of(item)
        else:
            array = np.frombuffer(kept.values, kept.kind.dtype)
            self._count(max(array.size, array.nbytes // 8))
        return array.reshape(kept.shape, order=kept.order)  # type: ignore[call-overload]
