"""Tensors <-> records: number formats, measured bytes. What does not fit its schema is refused by name.

A schema is known to the receiver before it parses anything: which arrays, which dtype, which shape. An array is one
flat block per kind (each costs 128 bytes of header), in numpy's npy format, which is never allowed to hold objects.

Quantised arrays are encoded once, by whoever makes them, and stay so in the record, the ledger and the catch-up of a
node; :func:`decode` is applied where values are used. So all see the same values.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkrso_app.core import quantize
from fedkrso_app.records.schema import SCALES, Schema

_NPY_HEADER_LIMIT = 1024
_INFINITE = np.uint16(0x7F80)  # the exponent of what is not finite, in a bfloat16


class Refused(ValueError):
    """A message that does not fit; the text says which part and why. The run continues without it."""


def encode(arrays: Mapping[str, np.ndarray], schema: Schema, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """``arrays`` in the formats of ``schema``, randomly rounded by ``rng``; without a format an array stays itself.
    Those that are always empty are left out."""
    encoded = {}
    for name, value in arrays.items():
        form = schema.fields[name].dtype
        if 0 in schema.fields[name].shape:
            continue
        encoded[name] = value
        if form in quantize.FORMATS:
            encoded[name], encoded[name + SCALES] = quantize.encode(value, form, rng)
    return encoded


def decode(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What :func:`encode` was given, as precise as the format is: float32 for every array that has scales."""
    return {
        name: quantize.decode(value, arrays[name + SCALES]) if name + SCALES in arrays else value
        for name, value in arrays.items()
        if not name.endswith(SCALES)
    }


def pack(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays of any shape and plain dtype as one record."""
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in arrays.items()})


def unpack(record: ArrayRecord, schema: Schema) -> dict[str, np.ndarray]:
    """The arrays of ``record``, still encoded and read-only, once all of them fit ``schema``; else :class:`Refused`.

    Fitting means: nothing missing, nothing else, dtypes, shapes, finite values, codes and scales that can be.
    """
    plain, schema = schema, schema.encoded()
    missing = [name for name, f in schema.fields.items() if name not in record and not f.optional]
    if missing:
        raise Refused(f"array {missing[0]!r} is missing")
    extra = [name for name in record if name not in schema.fields]
    if extra:
        raise Refused(f"array {extra[0]!r} is not expected; expected: {', '.join(schema.fields)}")
    lengths: dict[str, int] = {}
    arrays = {name: _read(name, array, schema, lengths) for name, array in record.items()}
    for name, f in plain.fields.items():
        if f.dtype in quantize.FORMATS and (name in arrays or name + SCALES in arrays):
            _check_codes(name, arrays, f.shape[-1])
        if f.dtype == "bfloat16" and name in arrays and (arrays[name] & _INFINITE == _INFINITE).any():
            raise Refused(f"array {name!r} holds NaN or infinite values")
    return arrays


def measured_bytes(content: RecordDict) -> int:
    """Bytes of the serialised record: every object that Flower would send for it, headers included, repeats once."""
    sizes: dict[str, int] = {}

    def visit(item: Any) -> None:
        sizes[item.object_id] = len(item.deflate())
        for child in (item.children or {}).values():
            visit(child)

    visit(content)
    return sum(sizes.values())


def number(record: ConfigRecord | MetricRecord, key: str, kind: type, low: float, high: float) -> Any:
    """``record[key]`` as ``kind`` (int or float), within [low, high]; else :class:`Refused`."""
    value = record.get(key)
    wanted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise Refused(f"{key} = {value!r} is not of type {kind.__name__}")
    if not low <= value <= high:  # type: ignore[operator]  # NaN fails this comparison too
        raise Refused(f"{key} = {value} is not between {low:g} and {high:g}")
    return kind(value)


def _check_codes(name: str, arrays: Mapping[str, np.ndarray], n: int | str) -> None:
    if name not in arrays or name + SCALES not in arrays:
        raise Refused(f"array {name!r} and its scales must come together")
    try:
        quantize.check(arrays[name], arrays[name + SCALES])
    except ValueError as error:
        raise Refused(f"array {name!r}: {error}") from None
    length = quantize.length(arrays[name])
    if isinstance(n, int) and arrays[name].size and length != n:
        raise Refused(f"array {name!r} has {length} values in a row, expected {n}")


def _read(name: str, array: Array, schema: Schema, lengths: dict[str, int]) -> np.ndarray:
    dtype, shape = schema.fields[name].dtype, schema.fields[name].shape
    if array.stype != "numpy.ndarray":
        raise Refused(f"array {name!r} has the format {array.stype!r}, expected 'numpy.ndarray'")
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        real_shape, fortran, real_dtype = read(stream, max_header_size=_NPY_HEADER_LIMIT)
    except Exception as error:  # a forged header is parsed as a Python literal, which fails in many ways
        raise Refused(f"array {name!r} is damaged: {error}") from None
    if real_dtype != np.dtype(dtype).newbyteorder("<"):
        raise Refused(f"array {name!r} has dtype {real_dtype}, expected {dtype}")
    if fortran and len(real_shape) > 1:
        raise Refused(f"array {name!r} is stored column by column, expected row by row")
    if len(real_shape) != len(shape):
        raise Refused(f"array {name!r} has shape {real_shape}, expected {shape}")
    for real, wanted in zip(real_shape, shape, strict=True):
        if isinstance(wanted, str):
            most = schema.limits[wanted]
            if not 0 <= real <= most:
                raise Refused(f"array {name!r} has shape {real_shape}, expected {shape} with {wanted} at most {most}")
            wanted = lengths.setdefault(wanted, real)
        if real != wanted:
            raise Refused(f"array {name!r} has shape {real_shape}, expected {shape}")
    offset, count = stream.tell(), math.prod(real_shape)
    if len(array.data) - offset != count * real_dtype.itemsize:
        raise Refused(
            f"array {name!r} carries {len(array.data) - offset} bytes, expected {count * real_dtype.itemsize}"
        )
    values = np.frombuffer(array.data, dtype=real_dtype, offset=offset, count=count).reshape(real_shape)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise Refused(f"array {name!r} holds NaN or infinite values")
    return values
