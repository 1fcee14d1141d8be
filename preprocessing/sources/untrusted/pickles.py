"""Untrusted pickles, read as data: numbers, strings, lists, dicts and NumPy arrays. Nothing in them is executed.

A pickle is a program that imports names and calls them. The few names that NumPy's arrays need are mapped to functions
of this module, which check their arguments; all others are refused
(https://docs.python.org/3/library/pickle.html#restricting-globals). The pure Python unpickler is used because the C one
allocates memory by sizes that the pickle chooses.

A harmless pickle can still exhaust time and memory: it may reference one object many times, so that a few bytes unfold
beyond any machine's memory. Hence the bounds, and dict keys must be strings: deeply nested tuples take forever to hash,
or overflow the stack.
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

PLAIN = re.compile(r"[?biufSUO]\d*")  # booleans, numbers, strings, objects
MAX_STEPS = 2**21  # of a pickle; the largest known, CALVIN's annotations, takes a third
BROKEN = (ValueError, TypeError, SyntaxError, EOFError, OverflowError, RecursionError, MemoryError, tokenize.TokenError)


def read_pickle(data: bytes) -> Any:
    """Read a pickle, arrays as ``np.ndarray``. Raises BadEpisode if it needs anything else or breaks."""
    try:
        return _Arrays().of(_Unpickler(data).load())
    except Exception as error:  # foreign bytes break an unpickler in a dozen ways
        raise BadEpisode(f"the pickle cannot be read: {type(error).__name__}: {str(error)[:200]}") from None


def read_npy(data: bytes) -> Any:
    """Read a ``.npy`` file, of objects as well. Raises BadEpisode.

    The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = read(file)
        if kind.hasobject:
            values = read_pickle(data[file.tell() :])
            return values.item() if shape == () else values
        # NumPy itself would allocate as many values as the header declares before reading one.
        return np.frombuffer(data, kind, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    except BROKEN as error:
        why = f"{type(error).__name__}: {' '.join(str(error)[:200].split())}"
        raise BadEpisode(f"the .npy file cannot be read: {why}") from None


class _DType:
    """``numpy.dtype(code, ...)``; its state sets the byte order."""

    def __init__(self, code: str, *_: Any):
        if not PLAIN.fullmatch(code):
            raise ValueError(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """``numpy._reconstruct(ndarray, (0,), b"b")``; its state holds the contents."""

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
    return b""  # how protocols before 3 write b""


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
# Sets have keys of any type, copyreg's extensions bypass find_class, and arrays need REDUCE only.
REFUSED = {pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4}
REFUSED |= {pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX}
MAX_ARGUMENTS = 4  # of a call


class _Steps(dict[int, Any]):
    """The unpickler's dispatch table, which counts steps."""

    left = MAX_STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it takes more than {MAX_STEPS} steps")
        return super().__getitem__(code)


class _Unpickler(_Python):  # type: ignore[misc]
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
        """How protocols before 3 write bytes. Bounded: a pickle could ask for one long string over and over."""
        self._unwritten -= len(text)
        if self._unwritten < 0:
            raise ValueError("it asks for more bytes than it holds")
        return text.encode("latin1")

    def load_reduce(self) -> None:
        if len(self.stack[-1]) > MAX_ARGUMENTS:
            raise ValueError(f"it calls something with {len(self.stack[-1])} arguments")
        super().load_reduce()

    def load_build(self) -> None:
        """Only arrays may have a state: otherwise a pickle could change the functions above."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType):
            raise ValueError(f"it gives {type(self.stack[-1]).__name__} a state")
        self.stack[-1].__setstate__(state)

    def load_bytearray8(self) -> None:
        """Allocates no more bytes than exist."""
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
            raise ValueError("it has a dict with keys that are not strings")
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
    """Replaces placeholders with arrays. A shared object is converted once, but counted each time: that is the size of
    the result when written out."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, int]] = {}
        self._kept: list[Any] = []  # an id is valid only while its object lives
        self._size = 0  # in numbers, strings and so on

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
