"""The schema holds the door: what fits survives bit for bit, everything else is refused with its reason."""

import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused, measured_bytes, number, pack, unpack

SCHEMA = Schema(
    {"seeds": Field("uint64", ("s",)), "B": Field("float32", ("s", 6)), "head": Field("float32", (4,))}, limits={"s": 3}
)


def good() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "seeds": np.array([2**64 - 1, 5], dtype=np.uint64),
        "B": rng.normal(size=(2, 6)).astype(np.float32),
        "head": rng.normal(size=4).astype(np.float32),
    }


def npy(header: str, data: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> Array:
    text = header.encode()
    text += b" " * (118 - len(text)) + b"\n"
    return Array("float32", (4,), "numpy.ndarray", magic + len(text).to_bytes(2, "little") + text + data)


def with_array(name: str, array: Array) -> ArrayRecord:
    return ArrayRecord({**pack(good()), name: array})


def test_an_update_survives_the_wire_bit_for_bit():
    back = unpack(pack(good()), SCHEMA)
    for name, value in good().items():
        assert back[name].tobytes() == value.tobytes() and back[name].dtype == value.dtype


def test_what_is_read_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        unpack(pack(good()), SCHEMA)["head"][0] = 1


BAD = {
    "missing array": ({"head": None}, "'head' is missing"),
    "extra array": ({"tail": np.zeros(1, np.float32)}, "'tail' is not expected"),
    "NaN": ({"head": np.array([0, np.nan, 0, 0], np.float32)}, "NaN or infinite"),
    "infinity": ({"head": np.array([0, -np.inf, 0, 0], np.float32)}, "NaN or infinite"),
    "float64": ({"head": np.zeros(4)}, "dtype float64, expected float32"),
    "float16": ({"head": np.zeros(4, np.float16)}, "dtype float16"),
    "big endian": ({"head": np.zeros(4, ">f4")}, "dtype >f4"),
    "integers": ({"head": np.zeros(4, np.int32)}, "dtype int32"),
    "booleans": ({"head": np.zeros(4, bool)}, "dtype bool"),
    "complex": ({"head": np.zeros(4, np.complex64)}, "dtype complex64"),
    "strings": ({"head": np.array(["a"] * 4)}, "dtype <U1"),
    "signed seeds": ({"seeds": np.zeros(2, np.int64)}, "dtype int64, expected uint64"),
    "too long": ({"head": np.zeros(5, np.float32)}, r"shape \(5,\)"),
    "too short": ({"head": np.zeros(3, np.float32)}, r"shape \(3,\)"),
    "broadcastable": ({"head": np.zeros(1, np.float32)}, r"shape \(1,\)"),
    "one more axis": ({"head": np.zeros((1, 4), np.float32)}, r"shape \(1, 4\)"),
    "transposed": ({"B": np.zeros((6, 2), np.float32)}, r"shape \(6, 2\)"),
    "more than the limit": ({"seeds": np.zeros(4, np.uint64), "B": np.zeros((4, 6), np.float32)}, "at most 3"),
    "lengths disagree": ({"seeds": np.zeros(1, np.uint64)}, r"'B' has shape \(2, 6\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_array_that_does_not_fit_is_refused_by_name(case):
    changes, reason = BAD[case]
    arrays = {name: value for name, value in (good() | changes).items() if value is not None}
    with pytest.raises(Refused, match=reason):
        unpack(pack(arrays), SCHEMA)


def column_major() -> Array:
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.zeros((2, 6), np.float32)), allow_pickle=False)
    return Array("float32", (2, 6), "numpy.ndarray", stream.getvalue())


def pickled() -> Array:
    stream = io.BytesIO()
    np.save(stream, np.array([{}] * 4, dtype=object), allow_pickle=True)
    return Array("object", (4,), "numpy.ndarray", stream.getvalue())


FORGED = {
    "empty": (Array("float32", (4,), "numpy.ndarray", b""), "damaged"),
    "noise": (Array("float32", (4,), "numpy.ndarray", b"\x00" * 200), "damaged"),
    "header only": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"), "carries 0 bytes"),
    "cut short": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }", b"\0" * 15), "carries 15 bytes"),
    "too much": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }", b"\0" * 17), "carries 17 bytes"),
    "huge shape": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,), }"), "damaged|shape"),
    "huge literal": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999,), }"), "shape"),
    "negative shape": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }"), "damaged|shape"),
    "code for a header": (npy("__import__('os').system('true')"), "damaged"),
    "unknown version": (npy("{}", magic=b"\x93NUMPY\x09\x00"), "damaged"),
    "other format": (Array("float32", (4,), "pickle", b"\x80\x04."), "format 'pickle'"),
    "objects": (pickled(), "dtype object"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_bytes_are_refused(case):
    array, reason = FORGED[case]
    with pytest.raises(Refused, match=reason):
        unpack(with_array("head", array), SCHEMA)


def test_column_major_arrays_are_refused():
    with pytest.raises(Refused, match="column by column"):
        unpack(with_array("B", column_major()), SCHEMA)


@pytest.mark.parametrize("value", [None, True, "7", 7.5, [7]])
def test_a_number_of_another_type_is_refused(value):
    record = ConfigRecord({"n": value} if value is not None else {})
    with pytest.raises(Refused, match=r"n = .* is not of type int"):
        number(record, "n", int, 0, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 11.0])
def test_a_number_out_of_range_is_refused(value):
    with pytest.raises(Refused, match=r"n = .* is not between 0 and 10"):
        number(MetricRecord({"n": value}), "n", float, 0, 10)


def test_measured_bytes_are_the_payload_and_a_small_header():
    content = RecordDict({"update": pack({"B": np.random.default_rng(0).normal(size=100_000).astype(np.float32)})})
    assert 400_000 < measured_bytes(content) < 402_000


def test_equal_arrays_count_once_in_a_record_and_in_every_message_that_holds_them():
    x = np.arange(1000, dtype=np.float32)
    one, twice = (RecordDict({"a": pack({str(i): x for i in range(count)})}) for count in (1, 2))
    other = RecordDict({"a": pack({"0": x, "1": x + 1})})
    assert measured_bytes(twice) - measured_bytes(one) < 300 < x.nbytes < measured_bytes(other) - measured_bytes(one)
