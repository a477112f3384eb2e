"""One raw column of any reasonable type as checked ids, times or actions.

Text that came from CSV is typed here, on all its rows: a column is integers if every value is a plain
integer, numbers if every value is a number, and text otherwise (so `007` and `7` stay different ids).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hstu_dist.data.config import TimestampUnit
from hstu_dist.errors import UserError

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# by bits: the float type holds every integer below, and may have rounded any other
EXACT_FLOAT = {16: 2**11, 32: 2**24, 64: 2**53}
INTEGER_TEXT = r"^(0|-?[1-9][0-9]*)$"
NUMBER_TEXT = r"^-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?$"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column before it is checked.

    Attributes:
        name: as in the file.
        values: Arrow chunked array of any type.
        locate: file and row of an index, for messages.
        is_untyped: text of a CSV file, which may stand for numbers; text of a Parquet file stays text.
    """

    name: str
    values: pa.ChunkedArray
    locate: Callable[[int], str]
    is_untyped: bool

    def reject(self, row: int, expected: str, remedy: str) -> NoReturn:
        """Raise the UserError that shows one value."""
        got = self.values[row].as_py()
        raise UserError(f"{self.locate(row)}: column '{self.name}': got {got!r}, expected {expected}", remedy)

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
    column = _without_nulls(column)
    column = _typed(column) if column.is_untyped else column
    dtype = column.values.type
    if pa.types.is_integer(dtype):
        return _int64(column)
    if pa.types.is_floating(dtype):
        return _exact_floats(column, "store the ids as int64 or text")
    if pa.types.is_large_string(dtype):
        column.reject_any(pc.equal(column.values, ""), "an id", "drop such rows")
        return _flat(column.values)
    _wrong_type(column, "integers or text")


def actions_of(column: Column) -> npt.NDArray[np.int32]:
    """[E] int32 >= 0.

    Raises:
        UserError: a missing value, something that is not an integer in [0, 2^31), or another type.
    """
    column = _without_nulls(column)
    column = _typed(column) if column.is_untyped else column
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


def times_of(column: Column, unit: TimestampUnit) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The times that order events, in the column's own resolution, and whole seconds >= 0, both [E].

    Raises:
        UserError: a missing, negative or infinite value, or another type.
    """
    column = _typed(_without_nulls(column))
    if pa.types.is_large_string(column.values.type):
        column = _parse_dates(column)
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
        times = _floats(column)
        limit = EXACT_FLOAT[dtype.bit_width]
        column.reject_any(
            pa.array(~(np.abs(times) < limit)), f"a time that {dtype} holds exactly (below {limit})", "store int64"
        )
    else:
        _wrong_type(column, "numbers or dates")
    column.reject_any(pa.array(times < 0), "a time since 1970", "correct or drop such rows")
    return times, (times // per_second).astype(np.int64)


def _without_nulls(column: Column) -> Column:
    values = column.values
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    column.reject_any(pc.is_null(values, nan_is_null=True), "a value", "fill or drop such rows")
    return replace(column, values=values)


def _typed(column: Column) -> Column:
    """Text as integers or floats where every value is one."""
    values = column.values
    if not pa.types.is_large_string(values.type):
        return column
    if pc.all(pc.match_substring_regex(values, INTEGER_TEXT)).as_py():
        try:
            return replace(column, values=values.cast(pa.int64()))
        except pa.ArrowInvalid:
            # 19 digits can be too large: compare as text of equal width
            digits = pc.utf8_lpad(pc.utf8_ltrim(values, "-"), 32, "0")
            limit = pc.if_else(pc.starts_with(values, "-"), str(2**63).zfill(32), str(2**63 - 1).zfill(32))
            remedy = "correct it, or store such ids as text in Parquet"
            column.reject_any(pc.greater(digits, limit), "a number that fits int64", remedy)
    if pc.all(pc.match_substring_regex(values, NUMBER_TEXT)).as_py():
        return replace(column, values=values.cast(pa.float64()))
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


def _parse_dates(column: Column) -> Column:
    for dtype in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return replace(column, values=column.values.cast(dtype))
        except pa.ArrowInvalid:
            continue
    expected, remedy = "a number or a date such as 2024-01-31 12:00:00", "correct or drop such rows"
    numbers = pc.match_substring_regex(column.values, NUMBER_TEXT)
    if numbers[0].as_py():
        column.reject_any(pc.invert(numbers), expected, remedy)
    for row, value in enumerate(column.values):
        try:
            value.cast(pa.timestamp("us"))
        except pa.ArrowInvalid:
            column.reject(row, expected, remedy)
    raise AssertionError("a column that does not parse has a value that does not parse")


def _wrong_type(column: Column, expected: str, remedy: str = "convert the column") -> NoReturn:
    raise UserError(
        f"{column.locate(0)}: column '{column.name}': got type {column.values.type}, expected {expected}", remedy
    )


def _flat(values: pa.ChunkedArray) -> pa.Array:
    flat = values.combine_chunks()
    # a chunked array without chunks combines to a chunked array
    return flat if isinstance(flat, pa.Array) else pa.concat_arrays(flat.chunks or [pa.array([], values.type)])
