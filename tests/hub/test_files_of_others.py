"""Files that somebody else wrote: whatever stands in them, they are read or refused in words, and do nothing else."""

import gzip
import pickle
import struct
import time

import numpy as np
import pytest
from test_convert import TRAX_FIELDS

from hf_reformer.hub.convert import convert
from hf_reformer.hub.convert.trax import MOST_INSTRUCTIONS, from_trax, read_pickle

# ---- pickles, written instruction by instruction


def name(module, own):
    return b"c" + module.encode() + b"\n" + own.encode() + b"\n"


def value(x):
    """The instructions of a plain value."""
    return pickle.dumps(x, 2)[2:-1]


def call(function, *arguments):
    """Arguments are instructions already."""
    return function + b"(" + b"".join(arguments) + b"tR"


def state(*parts):
    return b"(" + b"".join(parts) + b"tb"


RECONSTRUCT, NDARRAY = name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray")
FROM_BUFFER = name("numpy._core.numeric", "_frombuffer")
NONE, FALSE = b"N", b"\x89"


def dtype(code="f4", *, order="<", subdtype=NONE, names=NONE, fields=NONE, size=-1, alignment=-1, flags=0, version=3):
    made = call(name("numpy", "dtype"), value(code) if isinstance(code, str) else code, value(False), value(True))
    described = (value(version), value(order), subdtype, names, fields, value(size), value(alignment), value(flags))
    return made + state(*described)


def array(shape=(2,), kind=None, values=b"\0" * 8, fortran=FALSE):
    """The instructions of an array; `values` are bytes or instructions within a list."""
    values = values[0] if isinstance(values, list) else value(values)
    kind = dtype() if kind is None else kind
    shape = shape[0] if isinstance(shape, list) else value(shape)
    return call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b")) + state(value(1), shape, kind, fortran, values)


POINTER = struct.pack("<Q", 0x4141414141414141)
OBJECT_FIELD = b"}" + value("a") + b"(" + dtype("O8", order="|", flags=63) + value(0) + b"ts"
HIDDEN = {"names": value(("a",)), "fields": OBJECT_FIELD, "size": 8, "alignment": 1}
SUBARRAY = b"(" + dtype("O8", order="|") + value((1,)) + b"t"

BAD_ARRAYS = {
    "objects": array((1,), dtype("O8", order="|", flags=63), POINTER),
    "objects in a list": array((1,), dtype("O8", order="|", flags=63), [b"]" + b"K\x01a"]),
    "objects in a hidden field": array((1,), dtype("V8", order="|", **HIDDEN), POINTER),
    "objects in a field": array((1,), dtype("V8", order="|", flags=63, **HIDDEN), POINTER),
    "objects in a subarray": array((1,), dtype("V8", order="|", subdtype=SUBARRAY, size=8), POINTER),
    "objects by another size": array((1,), dtype("f8", size=8), POINTER),
    "objects by flags": array((1,), dtype("f8", flags=63), POINTER),
    "an order that is none": array((2,), dtype(order="O")),
    "a version more": array((2,), dtype(version=4) + state(*[value(x) for x in (4, "<", None, None)])),
    "void": array((1,), dtype("V8", order="|"), POINTER),
    "text": array((1,), dtype("U2"), POINTER),
    "dates": array((1,), dtype("M8"), POINTER),
    "fields by a list": array((1,), dtype(b"]" + value(("a", "O8")) + b"a"), POINTER),
    "fields by commas": array((1,), dtype("O8,f4"), POINTER + b"\0" * 4),
    "a type that is a class": array((1,), call(name("numpy", "dtype"), name("builtins", "object"))),
    "a type that is text": array((2,), value("f4")),
    "a negative size": array((-2,), values=b"\0" * 8),
    "two negative sizes": array((-1, -2), values=b"\0" * 8),
    "a huge size": array((2**62,), values=b"\0" * 8),
    "a size that overflows": array((2**61, 2**61, 4), values=b""),
    "a size beyond all numbers": array((10**4000,), values=b""),
    "a size of nothing": array((0, 2**62), values=b""),
    "a size that is true": array((True, 2)),
    "a size that is a float": array((2.0,)),
    "a shape that is a list": array([b"]K\x02a"]),
    "many axes": array((1,) * 65 + (2,)),
    "too few values": array((3,)),
    "too many values": array((1,)),
    "no values": array(values=[NONE]),
    "values of another array": array(values=[array()]),
    "no state": call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b")) + state(value(1)),
    "a scalar of objects": call(name("numpy._core.multiarray", "scalar"), dtype("O8", order="|"), value(POINTER)),
    "a long scalar": call(name("numpy._core.multiarray", "scalar"), dtype(), value(POINTER)),
    "a buffer of objects": call(FROM_BUFFER, value(POINTER), dtype("O8"), value((1,)), value("C")),
    "a buffer that is short": call(FROM_BUFFER, value(POINTER), dtype(), value((3,)), value("C")),
    "a buffer of no order": call(FROM_BUFFER, value(POINTER), dtype(), value((2,)), value("A")),
    "axes that are none": call(FROM_BUFFER, value(POINTER), dtype(), value((2, 1)), value("K"), value((0, 7))),
    "a persistent id": b"Pobject\n",
    "a persistent object": value(("storage",)) + b"Q",
    "an extension": b"\x82\x01",
    "a buffer from elsewhere": b"\x97",
    "text called": call(value("numpy.dtype"), value("f4")),
    "no names": value(1) + value(2) + b"\x93",
    "an empty stack": b"0",
    "a mark alone": b"t",
    "a memo that is not there": b"h\x05",
    "an append to a number": value(1) + value(2) + b"a",
    "an item of a number": value(1) + value(2) + value(3) + b"s",
    "a key without value": b"}" + b"(" + value("a") + b"u",
    "a number without end": b"I" + b"9" * 100_000 + b"\n",
    "too many instructions": b"N" * (MOST_INSTRUCTIONS + 2),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_crafted_pickle_is_refused_in_words(case, tmp_path):
    file = tmp_path / "weights.pkl"
    file.write_bytes(b"\x80\x02" + BAD_ARRAYS[case] + b".")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"no pickle of Trax weights that can be read: .*\.$"):
        read_pickle(file)
    assert time.monotonic() - begin < 20


BAD_TREES = {
    "a function": (name("os", "system"), "found a `os.system`"),
    "what a function makes": (call(name("os", "system"), value("exit 1")), "found a `os.system`"),
    "an instance": (b"(" + value("exit 1") + b"ios\nsystem\n", "found a `os.system`"),
    "an old instance": (b"(" + name("os", "system") + value("exit 1") + b"o", "found a `os.system`"),
    "a new instance": (name("os", "system") + value(("exit 1",)) + b"\x81", "found a `os.system`"),
    "a name on the stack": (value("os") + value("system") + b"\x93" + value(("exit 1",)) + b"R", "`os.system`"),
    "a name of two lines": (value("os\n# ") + value("x" * 1000) + b"\x93", r"found a `os\\n# \.x{1,80}`"),
    "an array of another class": (call(RECONSTRUCT, name("a", "b"), value((0,)), value(b"b")), "_reconstruct`"),
    "an array without values": (call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b")), "found NoneType"),
    "whole numbers": (array(kind=dtype("i4")), "found int32 array"),
    "a list that holds itself": (b"]q\x00h\x00a", "more than 100,000 parts"),
    "lists of lists of lists": (b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60)), "100,000 parts"),
    "an array many times": (array((2**20,), values=bytes(2**22)) + b"q\x00](" + b"h\x00" * 2000 + b"e", "repeats"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_a_pickle_that_holds_no_weights_is_refused_in_words(case, tmp_path):
    instructions, message = BAD_TREES[case]
    (tmp_path / "weights.pkl").write_bytes(b"\x80\x02" + instructions + b".")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "weights.pkl", tmp_path / "out", kind="trax", fields=TRAX_FIELDS)
    assert not (tmp_path / "out").exists()


def test_keys_of_a_pickle_are_not_hashed(tmp_path):
    """Nested tuples take exponential time, and deep ones more stack than there is."""
    doubled = b")" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(100))
    deep = b")" + b"\x85" * 500_000
    for key in (doubled, deep, value((1, 2))):
        (tmp_path / "weights.pkl").write_bytes(b"\x80\x02}" + key + b"Ns" + value("a") + b"K\x05s.")
        assert read_pickle(tmp_path / "weights.pkl") == {"a": 5}


def test_a_pickle_changes_nothing_in_the_process(tmp_path):
    before = np._core.numeric._frombuffer.__defaults__
    changes = FROM_BUFFER + b"N}" + value("__defaults__") + value((1, 2, 3)) + b"s\x86b"
    for instructions in (changes, NDARRAY + b"N}" + value("x") + value(1) + b"s\x86b"):
        (tmp_path / "weights.pkl").write_bytes(b"\x80\x02" + instructions + b".")
        read_pickle(tmp_path / "weights.pkl")
    assert np._core.numeric._frombuffer.__defaults__ == before
    assert not hasattr(np.ndarray, "x")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_numbers_are_read_as_they_are(protocol, tmp_path):
    shuffled = np.arange(24, dtype=">f4").reshape(2, 3, 4)
    arrays = [np.zeros((0, 3)), np.float16(1.5), shuffled, shuffled.T, shuffled.transpose(1, 0, 2), shuffled[::2, 1:]]
    arrays += [np.arange(5).astype(kind) for kind in ("<i2", ">u8", "b", "?", "<f8")]
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    for found, expected in zip(read_pickle(tmp_path / "arrays.pkl"), arrays, strict=True):
        assert found.array.dtype == expected.dtype
        assert np.array_equal(found.array, expected)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    zeros = gzip.compress(bytes(2**22), 9)
    weights = gzip.compress(b"\x80\x04\x8e" + struct.pack("<Q", 2**36))  # bytes, so many
    for case, data in {
        "noise": zeros * 1000,
        "bytes": weights + zeros * 1000,
        "text": gzip.compress(b"I") + zeros * 1000,
    }.items():
        (tmp_path / case).write_bytes(data)
        begin = time.monotonic()
        with pytest.raises(ValueError, match="no pickle of Trax weights"):
            read_pickle(tmp_path / case)
        assert time.monotonic() - begin < 20


def test_trax_weights_of_sizes_that_contradict_each_other_take_no_memory():
    wide, narrow = np.zeros((1, 10**6), np.float32), np.zeros(1, np.float32)
    attention = [np.zeros((1, 10**6, 1), np.float32)] * 2 + [np.zeros((1, 1, 10**6), np.float32)]
    norm, dense = [np.zeros(10**6, np.float32)] * 2, [wide.T, np.zeros(10**6, np.float32)]
    tables = [np.zeros((1, 2, 1, 1), np.float32), np.zeros((1, 1, 2, 10**6 - 1), np.float32)]
    tree = [wide, tables, norm, attention, norm, [wide, *dense[1:]], dense, [narrow] * 2, [wide.T, narrow]]
    with pytest.raises(ValueError, match="contradict each other"):
        from_trax(tree, TRAX_FIELDS)
