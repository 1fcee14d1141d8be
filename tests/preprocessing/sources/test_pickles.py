"""Pickles are read as data: nothing that they name is run."""

from __future__ import annotations

import contextlib
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import limits
from preprocessing.errors import BadEpisode
from preprocessing.sources.untrusted.pickles import read_npy, read_pickle


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_read_as_data(protocol, capsys):
    arrays = [np.arange(6).reshape(2, 3).T, np.array(["a", None, [1]], object), np.zeros((0, 3)), np.array("é")]
    arrays += [np.arange(3, dtype=">f4"), np.array([True])]
    held = {"arrays": arrays, "pair": (1, 2.5), "bytes": b"\xff", "scalar": np.float32(3), "type": np.dtype("<i4")}
    held["again"] = held["arrays"]
    found = read_pickle(pickle.dumps(held, protocol))
    for array, expected in zip(found["arrays"], arrays, strict=True):
        assert array.dtype == expected.dtype and array.shape == expected.shape and np.all(array == expected)
    assert found["again"] is found["arrays"]
    assert [found[key] for key in ("pair", "bytes", "scalar", "type")] == [(1, 2.5), b"\xff", 3, np.dtype("<i4")]
    with pytest.raises(BadEpisode, match=r"it asks for .*print"):
        read_pickle(pickle.dumps({"a": Evil()}, protocol))
    assert not capsys.readouterr().out


TUPLES = b")\x94" + b"".join(b"h%c\x86\x94" % at for at in range(60))  # each holds the one before it twice
LISTS = b"]\x94" + b"".join(b"](h%ch%ce\x94" % (at, at) for at in range(60))
LONG = 2**20
TEXT = b"X" + struct.pack("<I", LONG) + b"a" * LONG
SCALAR = b"cnumpy.core.multiarray\nscalar\n\x940cnumpy\ndtype\nX\x08\0\0\0S1048576\x85R\x940"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n\x940"


@pytest.mark.parametrize(
    "steps, says",
    [
        (b"}" + TUPLES + b"Ns.", "keys that are not strings"),  # hashed in 2 ** 60 steps
        (b"}" + b")" + b"\x85" * 300_000 + b"Ns.", "keys that are not strings"),  # hashed on the C stack
        (b"(" + TUPLES + b"Nd.", "keys that are not strings"),
        (b"}(" + TUPLES + b"Nu.", "keys that are not strings"),
        (b"\x8f(" + TUPLES + b"\x90.", "KeyError"),
        (b"(" + TUPLES + b"\x91.", "KeyError"),
        (b"ccollections\nOrderedDict\n](](" + TUPLES + b"Nee\x85R.", "_no_items"),
        (LISTS + b".", "unfolds to more than limits.array_bytes"),
        (b"](" + b"]" * 3_000_000 + b"e.", "takes more than 2097152 steps"),
        (b"]c_codecs\nencode\n\x940" + TEXT + b"\x940" + b"h\0h\1\x85Ra" * 2000 + b".", "more bytes than it holds"),
        (b"]" + SCALAR + b"B" + TEXT[1:] + b"\x940" + b"h\0h\1h\2\x86Ra" * 2000 + b".", "unfolds to more than"),
        (b"]" + RECONSTRUCT + b"](" + b"N" * LONG + b"e\x940" + b"h\0h\1R0" * 99 + b".", "1048576 arguments"),
        (
            RECONSTRUCT + b"h\0)R(K\1X\4\0\0\0aaaaJ\xff\xff\xff\x3f\x86cnumpy\ndtype\nX\2\0\0\0O8\x85R\x89]tb.",
            "TypeError",
        ),
        (b"cnumpy\ndtype\nX\2\0\0\0M8\x85R.", "an array of 'M8'"),
        (b"cnumpy\ndtype\n}X\5\0\0\0dtypeNsb.", "it gives type a state"),
        (b"cnumpy\ndtype\n)\x81.", "KeyError"),
        (b"(cnumpy\ndtype\no.", "KeyError"),
        (b"(inumpy\ndtype\n.", "KeyError"),
        (b"\x82\1.", "KeyError"),
        (b"c" + b"a" * LONG + b"\nb\n.", "it asks for a{188}$"),
    ],
    ids=range(20),
)
def test_a_pickle_bomb_is_refused(monkeypatch, steps, says):
    monkeypatch.setattr(limits, "_limits", limits.Limits(array_bytes=2**27))
    tracemalloc.start()
    with pytest.raises(BadEpisode, match=says):
        read_pickle(b"\x80\4" + steps)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_a_deeply_nested_header_is_refused():
    head = b"-" * 9000 + b"1\n"
    with pytest.raises(BadEpisode, match=r"the \.npy file cannot be read"):
        read_npy(b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(noise, at):
    data = bytearray(pickle.dumps({"a": [np.arange(9.0), np.array([None, "b"], object)], "b": np.int8(1)}, 4))
    data[at : at + len(noise)] = noise
    for broken in (noise, bytes(data)):
        with contextlib.suppress(BadEpisode):
            read_pickle(broken)
