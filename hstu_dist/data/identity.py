"""Which prepared data a run was trained on: enough to tell later whether a folder still holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from hstu_dist.data.contextual import USER, contextual_values
from hstu_dist.data.schema import Manifest
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.validation import STRICT

ITEMS = "items"
"""What the values of the item table's ids go by."""

_MADE_FROM = ("name", "recipe", "sources", "action_fields", "num_users", "num_items", "num_events")
"""Of a manifest: the same give the same sequences, in however many files they are."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataIdentity:
    """A prepared data set, told apart from others.

    Attributes:
        files: hash of every data file, by name.
        made_from: hash of what the data set was made from, and of how much came out.
        values: hash of the raw values that ids stand for, by `items` or `contextual.NAME`. Data that was prepared again
            with more events keeps them while it has the same items.
    """

    files: dict[str, str]
    made_from: str
    values: dict[str, str]

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, contextual: Sequence[str]) -> DataIdentity:
        """Of a data set; reads all of its values once.

        Args:
            folder: of the data set.
            manifest: of the data set.
            contextual: names of the features that the run reads.

        Raises:
            UserError: a file is missing or damaged.
        """
        values = {ITEMS: values_hash(Vocabulary.raw_items(folder))}
        for name in contextual:
            # users are as many as there are: not all of them at once
            is_user = name == USER
            raw = Vocabulary.raw_users(folder) if is_user else contextual_values(folder, manifest, [name]).values()
            values[feature(name)] = values_hash(raw)
        return cls(files=manifest.files, made_from=_made_from(manifest), values=values)

    @classmethod
    def from_json(cls, text: bytes) -> DataIdentity:
        """What `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        return TypeAdapter(DataIdentity).validate_json(text)

    def to_json(self) -> bytes:
        """Readable JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    def is_of(self, manifest: Manifest) -> bool:
        """Whether a data set is this one: by its files, or because it was made from the same.

        The number of files depends on the memory of the machine, their bytes on versions of libraries.
        """
        return self.files == manifest.files or self.made_from == _made_from(manifest)

    def are_values_of(self, name: str, values: pa.Array) -> bool:
        """Whether the ids of `items` or a feature still stand for these values."""
        return self.values[name] == values_hash([values])


def feature(name: str) -> str:
    """What the values of a contextual feature go by."""
    return f"contextual.{name}"


def values_hash(parts: Iterable[pa.Array]) -> str:
    """`sha256:` and the hexadecimal digest of values in their order, however they are stored and cut into parts."""
    kind, numbers, texts = "", hashlib.sha256(), hashlib.sha256()
    for part in parts:
        values = part if pa.types.is_primitive(part.type) else part.cast(pa.string())
        kind = str(values.type)
        if pa.types.is_string(values.type):
            _, offsets, text = values.buffers()
            ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
            numbers.update(np.diff(ends).tobytes())
            texts.update(memoryview(text or b"")[ends[0] : ends[-1]])
        else:
            numbers.update(values.to_numpy(zero_copy_only=False).tobytes())
    whole = hashlib.sha256(f"{kind} {numbers.hexdigest()} {texts.hexdigest()}".encode())
    return f"sha256:{whole.hexdigest()}"


def _made_from(manifest: Manifest) -> str:
    known: dict[str, Any] = {name: getattr(manifest, name) for name in _MADE_FROM}
    # the fields of an action lie in their order
    known["action_fields"] = list(manifest.action_fields.items())
    return f"sha256:{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()}"
