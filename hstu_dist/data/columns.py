"""A piece of one raw column, of any reasonable type, as checked ids, times or actions.

Text that came from CSV is typed by all rows of its column, whose pieces are seen one after the other: a column is
integers if every value is a plain integer, numbers if every value is a number, and text otherwise (so `007` and `7`
stay different ids).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hstu_dist.actions import ActionField
from hstu_dist.data.config import TimestampUnit
from hstu_dist.errors import UserError

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# by bits: the float type holds every integer below, and may have rounded any other
EXACT_FLOAT = {16: 2**11, 32: 2**24, 64: 2**53}
INTEGER_TEXT = r"^(0|-?[1-9][0-9]*)$"
NUMBER_TEXT = r"^-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?$"


class Reading(IntFlag):
    """What every text of a column can be read as; of several columns or pieces, what is common (`&`)."""

    TEXT = 0
    INTEGERS = 1
    NUMBERS = 2
    DATES = 4
    ZONED_DATES = 8
    ANYTHING = 15


_DATES = {Reading.DATES: pa.timestamp("us"), Reading.ZONED_DATES: pa.timestamp("us", "UTC")}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column, or some of its rows, before it is checked.

    Attributes:
        name: as in the file.
        values: Arrow chunked array of any type.
        locate: file and row of an index, for messages.
        reading: what the texts of the whole column stand for. Text of a Parquet file stays text, unless it is times.
    """

    name: str
    values: pa.ChunkedArray
    locate: Callable[[int], str]
    reading: Reading = Reading.TEXT

    def reject(self, row: int, expected: str, remedy: str) -> NoReturn:
        """Raise the UserError that shows one value."""
        got = _shown(self.values[row])
        raise UserError(f"{self.locate(row)}: column '{self.name}': got {got}, expected {expected}", remedy)

    def reject_any(self, bad: Any, expected: str, remedy: str) -> None:
        """Raise for the first true value of a mask, if there is one."""
        row = pc.index(bad, True).as_py()
        if row >= 0:
            self.reject(row, expected, remedy)


def ids_of(column: Column) -> pa.Array:
    """[E] int64 or large_string.

    Raises:
        UserError: a missing value, a number that is not an int64, or another type.
    """
    column = _typed(_without_nulls(column))
    dtype = column.values.type
    if pa.types.is_integer(dtype):
        return _int64(column)
    if pa.types.is_floating(dtype):
        return _exact_floats(column, "store the ids as int64 or text")
    if pa.types.is_large_string(dtype):
        column.reject_any(pc.equal(column.values, ""), "an id", "drop such rows")
        flat = _flat(column.values)
        _check_unicode(column, flat)
        return flat
    _wrong_type(column, "integers or text")


def actions_of(column: Column) -> npt.NDArray[np.int32]:
    """[E] int32 >= 0.

    Raises:
        UserError: a missing value, something that is not an integer in [0, 2^31), or another type.
    """
    column = _typed(_without_nulls(column))
    remedy = "map the actions to small integers, or leave data.action_column unset"
    if pa.types.is_floating(column.values.type):
        values = _exact_floats(column, remedy)
    elif pa.types.is_integer(column.values.type):
        values = _int64(column)
    else:
        _wrong_type(column, "integers", remedy)
    actions: npt.NDArray[np.int64] = values.to_numpy(zero_copy_only=False)
    column.reject_any(pa.array((actions < 0) | (actions >= 2**31)), "an action in [0, 2^31)", remedy)
    return actions.astype(np.int32)


def packed_actions(columns: Sequence[Column], fields: Sequence[ActionField]) -> npt.NDArray[np.int32]:
    """[E] int32, the action words of one column for each field.

    Raises:
        UserError: as `actions_of`, or a number that its field cannot hold.
    """
    words: npt.NDArray[np.int32] = np.zeros(len(columns[0].values), dtype=np.int32)
    for column, field in zip(columns, fields, strict=True):
        values = actions_of(column)
        remedy = f"give {field.name} more bits in data.action_columns, or correct the column"
        column.reject_any(pa.array(values > field.largest), f"a number of {field.bits} bits", remedy)
        words |= values << field.shift
    return words


def reading_of(values: pa.ChunkedArray) -> Reading:
    """What all texts of a piece of a column can be read as; anything if there are none."""
    values = _plain(values)
    reading = Reading.TEXT
    if pc.all(pc.match_substring_regex(values, INTEGER_TEXT)).as_py() in (True, None):
        reading |= Reading.INTEGERS
    if pc.all(pc.match_substring_regex(values, NUMBER_TEXT)).as_py() in (True, None):
        reading |= Reading.NUMBERS
    for kind, dtype in _DATES.items():
        try:
            values.cast(dtype)
        except pa.ArrowInvalid:
            continue
        reading |= kind
    return reading


def is_text(dtype: pa.DataType) -> bool:
    """Whether values of a type may stand for numbers or dates."""
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return any(check(dtype) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def reject_times(column: Column, first: pa.Scalar) -> None:
    """Raise the UserError about texts that are neither all numbers nor all dates.

    Args:
        column: a piece; nothing happens if all of it is like the first value.
        first: value of the whole column.
    """
    expected, remedy = "a number or a date such as 2024-01-31 12:00:00", "correct or drop such rows"
    column = _without_nulls(column)
    first = first.cast(pa.large_string())
    if pc.match_substring_regex(first, NUMBER_TEXT).as_py():
        column.reject_any(pc.invert(pc.match_substring_regex(column.values, NUMBER_TEXT)), expected, remedy)
        return
    for row, value in enumerate(column.values):
        try:
            value.cast(pa.timestamp("us"))
        except pa.ArrowInvalid:
            column.reject(row, expected, remedy)


def times_of(column: Column, unit: TimestampUnit) -> tuple[npt.NDArray[Any], int]:
    """The times that order events, [E] in the column's own resolution, and how many of its units are a second.

    Raises:
        UserError: a missing, negative or infinite value, or another type.
    """
    column = _dated(_typed(_without_nulls(column)))
    dtype = column.values.type
    per_second = PER_SECOND[unit.value]
    if pa.types.is_date(dtype):
        column = replace(column, values=column.values.cast(pa.timestamp("s")))
        dtype = column.values.type
    if pa.types.is_timestamp(dtype):
        per_second = PER_SECOND[dtype.unit]
        times = _flat(column.values).view(pa.int64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(dtype):
        times = _int64(column).to_numpy(zero_copy_only=False)
    elif pa.types.is_floating(dtype):
        # no negative zeros, which engines might order differently
        times = _floats(column) + 0.0
        limit = EXACT_FLOAT[dtype.bit_width]
        column.reject_any(
            pa.array(~(np.abs(times) < limit)), f"a time that {dtype} holds exactly (below {limit})", "store int64"
        )
    else:
        _wrong_type(column, "numbers or dates")
    column.reject_any(pa.array(times < 0), "a time since 1970", "correct or drop such rows")
    return times, per_second


def _shown(value: pa.Scalar) -> str:
    try:
        return repr(value.as_py())
    except UnicodeDecodeError:
        return repr(value.as_buffer().to_pybytes())
    except (ValueError, OverflowError):
        # Python's dates have no nanoseconds, and no years beyond 9999
        return f"{value.value} as {value.type}"


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of any layout in the one that every function of Arrow takes."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.large_string()) if is_text(values.type) else values


def _without_nulls(column: Column) -> Column:
    values = _plain(column.values)
    column.reject_any(pc.is_null(values, nan_is_null=True), "a value", "fill or drop such rows")
    return replace(column, values=values)


def _typed(column: Column) -> Column:
    """Text as what it stands for."""
    values, reading = column.values, column.reading
    if not pa.types.is_large_string(values.type):
        return column
    if Reading.INTEGERS in reading:
        try:
            return replace(column, values=values.cast(pa.int64()))
        except pa.ArrowInvalid:
            # 19 digits can be too large: compare as text of equal width
            digits = pc.utf8_lpad(pc.utf8_ltrim(values, "-"), 32, "0")
            limit = pc.if_else(pc.starts_with(values, "-"), str(2**63).zfill(32), str(2**63 - 1).zfill(32))
            remedy = "correct it, or store such ids as text in Parquet"
            column.reject_any(pc.greater(digits, limit), "a number that fits int64", remedy)
    if Reading.NUMBERS in reading:
        return replace(column, values=values.cast(pa.float64()))
    return column


def _dated(column: Column) -> Column:
    for kind, dtype in _DATES.items():
        if kind in column.reading:
            return replace(column, values=column.values.cast(dtype))
    return column


def _int64(column: Column) -> pa.Array:
    values = column.values
    if values.type == pa.uint64():
        column.reject_any(
            pc.greater(values, pa.scalar(2**63 - 1, pa.uint64())),
            "a number that fits int64",
            "store such ids as text",
        )
    return _flat(values.cast(pa.int64()))


def _exact_floats(column: Column, remedy: str) -> pa.Array:
    """Floats that are integers which the type cannot have rounded."""
    limit = EXACT_FLOAT[column.values.type.bit_width]
    floats = _floats(column)
    whole = (np.abs(floats) < limit) & (floats == np.floor(floats))
    column.reject_any(pa.array(~whole), f"an integer that {column.values.type} holds exactly (below {limit})", remedy)
    return pa.array(floats.astype(np.int64))


def _floats(column: Column) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = _flat(column.values.cast(pa.float64())).to_numpy(zero_copy_only=False)
    return values


def _wrong_type(column: Column, expected: str, remedy: str = "convert the column") -> NoReturn:
    raise UserError(
        f"{column.locate(0)}: column '{column.name}': got type {column.values.type}, expected {expected}", remedy
    )


def _check_unicode(column: Column, texts: pa.Array) -> None:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(texts):
            try:
                value.as_py()
            except UnicodeDecodeError:
                column.reject(row, "text in UTF-8", "store the ids in UTF-8, or as int64")
        raise


def _flat(values: pa.ChunkedArray) -> pa.Array:
    flat = values.combine_chunks()
    # a chunked array without chunks combines to a chunked array
    return flat if isinstance(flat, pa.Array) else pa.concat_arrays(flat.chunks or [pa.array([], values.type)])
