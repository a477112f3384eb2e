"""Raw user and item ids, integers or text, as 64-bit keys and rows of a table; no loop over rows.

Hashing N distinct items into R rows lets an item share its row with another one with probability 1 - (1 - 1/R)^(N-1),
about N/R: 10% at R = 10 N. Users are told apart by 64 bits: of 10^9 of them a pair is confused with a chance of 3%.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hstu_dist.data.columns import INTEGER_TEXT
from hstu_dist.data.draws import GOLDEN, Words, mix
from hstu_dist.data.stream.config import ItemIds
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]


def user_keys(ids: pa.Array) -> Ints:
    """[E] int64: integers as they are, also where they are written as text; other text hashed."""
    return _words(ids).view(np.int64)


def item_ids(ids: pa.Array, num_items: int, kind: ItemIds) -> Ints:
    """[E] int64 in [0, num_items); of kind `raw` as of `user_keys`.

    Raises:
        UserError: dense ids are expected, and one is no integer in that range.
    """
    if kind == "raw":
        return user_keys(ids)
    if kind == "hashed":
        return (mix(_words(ids)) % np.uint64(num_items)).astype(np.int64)
    remedy = "number the items from 0, raise data.num_items, or set data.item_ids=hashed"
    if not pa.types.is_integer(ids.type):
        raise UserError(f"got items of type {ids.type}, expected integers in [0, {num_items})", remedy)
    rows: Ints = ids.to_numpy()
    bad = (rows < 0) | (rows >= num_items)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"row {row + 1}: got item {rows[row]}, expected one in [0, {num_items})", remedy)
    return rows


def _words(ids: pa.Array) -> Words:
    if pa.types.is_integer(ids.type):
        integers: Ints = ids.to_numpy()
        return integers.view(np.uint64)
    # ids repeat: each distinct text is hashed once
    encoded = ids.dictionary_encode()
    words = text_words(encoded.dictionary)
    places, integers = _integers_among(encoded.dictionary)
    words[places] = integers.view(np.uint64)
    found: Words = words[encoded.indices.to_numpy()]
    return found


def _integers_among(texts: pa.Array) -> tuple[Ints, Ints]:
    """Places and values of the texts that are int64 in the one way that it is written in."""
    lengths, limits = pc.binary_length(texts), np.iinfo(np.int64)
    # as many digits as the limits: of equally long texts the order is that of the digits
    fits = pc.and_(pc.less_equal(lengths, 18), pc.match_substring_regex(texts, INTEGER_TEXT))
    for pattern, limit in ((r"^[1-9][0-9]{18}$", limits.max), (r"^-[1-9][0-9]{17,18}$", limits.min)):
        small = pc.or_(pc.less(lengths, len(str(limit))), pc.less_equal(texts, pa.scalar(str(limit), texts.type)))
        fits = pc.or_(fits, pc.and_(pc.match_substring_regex(texts, pattern), small))
    places: Ints = fits.to_numpy(zero_copy_only=False).nonzero()[0]
    return places, texts.take(pa.array(places)).cast(pa.int64()).to_numpy()


def text_words(texts: pa.Array) -> Words:
    """[N] hashes of N non-empty texts (large_string): a sum over bytes of a hash of place and byte, hashed again."""
    if not len(texts):
        return np.empty(0, dtype=np.uint64)
    texts = pa.concat_arrays([texts])
    _, offsets_buffer, data = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    bytes_ = np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64)
    lengths = np.diff(offsets)
    starts = offsets[:-1] - offsets[0]
    places = (np.arange(len(bytes_)) - np.repeat(starts, lengths)).astype(np.uint64)
    sums = np.add.reduceat(mix(places * np.uint64(256) + bytes_ + GOLDEN), starts)
    return mix(sums + lengths.astype(np.uint64) * GOLDEN)
