"""Which prepared data a run was trained on: enough to tell later whether a folder still holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from hstu_dist.data.contextual import contextual_values
from hstu_dist.data.schema import Manifest
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.validation import STRICT

ITEMS = "items"
"""What the values of the item table's ids go by."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataIdentity:
    """A prepared data set, told apart from others.

    Attributes:
        files: hash of every data file, by name.
        values: hash of the raw values that ids stand for, by `items` or `contextual.NAME`. Data that was prepared again
            with more events keeps them while it has the same items.
    """

    files: dict[str, str]
    values: dict[str, str]

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, contextual: Sequence[str]) -> DataIdentity:
        """Of a data set.

        Args:
            folder: of the data set.
            manifest: of the data set.
            contextual: names of the features that the run reads.

        Raises:
            UserError: a file is missing or damaged.
        """
        features = contextual_values(folder, manifest, contextual)
        raw = {ITEMS: Vocabulary.items(folder).raw} | {feature(name): values for name, values in features.items()}
        return cls(files=manifest.files, values={name: values_hash(values) for name, values in raw.items()})

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

    def other_files(self, files: Mapping[str, str]) -> list[str]:
        """Names of the files that are missing, new or not the same, in order."""
        return sorted(name for name in self.files | dict(files) if self.files.get(name) != files.get(name))

    def are_values_of(self, name: str, values: pa.Array) -> bool:
        """Whether the ids of `items` or a feature still stand for these values."""
        return self.values[name] == values_hash(values)


def feature(name: str) -> str:
    """What the values of a contextual feature go by."""
    return f"contextual.{name}"


def values_hash(values: pa.Array) -> str:
    """`sha256:` and the hexadecimal digest of values in their order, whatever Parquet layout they came from."""
    if not pa.types.is_primitive(values.type):
        values = values.cast(pa.string())
    digest = hashlib.sha256(str(values.type).encode())
    if pa.types.is_string(values.type):
        _, offsets, text = values.buffers()
        ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
        digest.update(np.diff(ends).tobytes())
        digest.update(memoryview(text or b"")[ends[0] : ends[-1]])
    else:
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return f"sha256:{digest.hexdigest()}"
