"""The prepared data set on disk: file names, Parquet schemas and the manifest that describes them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.validation import STRICT

FORMAT_VERSION = 1
MANIFEST_FILE = "dataset.json"
SEQUENCES_FILE = "sequences.parquet"
USERS_FILE = "users.parquet"
ITEMS_FILE = "items.parquet"
CONTEXT_FILE = "context.parquet"
"""What is known of the users, a row each, raw values; only where contextual columns were prepared."""
DATA_FILES = (SEQUENCES_FILE, USERS_FILE, ITEMS_FILE)
LENGTHS_PLOT = "lengths"


def _list_of(value_type: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value_type, nullable=False))


SEQUENCE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_ids", _list_of(pa.int64()), nullable=False),
        pa.field("timestamps", _list_of(pa.int64()), nullable=False),
        pa.field("actions", _list_of(pa.int32()), nullable=False),
    ]
)
"""One row a user, in order of user_id = 0, 1, ...; events sorted by time, times in whole seconds."""


def sequence_file(part: int, parts: int) -> str:
    """Name of a file of sequences: of a small data set the only one."""
    return SEQUENCES_FILE if parts == 1 else f"sequences-{part:05d}.parquet"


def is_part_of_data_set(name: str) -> bool:
    """Whether a file or folder may lie in the folder of a data set."""
    plots = (f"{LENGTHS_PLOT}.png", f"{LENGTHS_PLOT}.svg")
    known = (MANIFEST_FILE, USERS_FILE, ITEMS_FILE, CONTEXT_FILE, *plots)
    return name in known or name.startswith("columns") or re.fullmatch(r"sequences(-\d{5})?\.parquet", name) is not None


def vocabulary_schema(raw_type: pa.DataType) -> pa.Schema:
    """Dense id, the raw value it stands for (int64 or string), and how many events it has."""
    fields = (("id", pa.int64()), ("raw", raw_type), ("count", pa.int64()))
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in fields])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """What a prepared data set is, and what it was made from.

    Attributes:
        format_version: of the layout; another version is prepared anew.
        name: the kind of data set.
        created_by: program and version.
        num_users: rows of the sequence file.
        num_items: item ids are 0 to num_items - 1.
        num_events: over all sequences.
        mean_length: events a sequence.
        max_length: events of the longest sequence.
        recipe: settings that shaped it.
        sources: hash of every input, in reading order.
        files: hash of every data file.
        action_fields: what an action packs, name → bits from the lowest bit up; empty: one plain number.
        contextual: columns of what is known of a user.
        statistics: of sequence lengths, items and times; see docs/data.md.
    """

    format_version: int
    name: str
    created_by: str
    num_users: int = Field(ge=1)
    num_items: int = Field(ge=1)
    num_events: int = Field(ge=1)
    mean_length: float
    max_length: int
    recipe: dict[str, str | int | float | None]
    sources: dict[str, str]
    files: dict[str, str]
    action_fields: dict[str, int] = Field(default_factory=dict)
    contextual: tuple[str, ...] = ()
    statistics: dict[str, float] = Field(default_factory=dict)

    @property
    def sequence_files(self) -> dict[str, str]:
        """Hashes of the files of sequences, in order."""
        return {name: value for name, value in sorted(self.files.items()) if name.startswith("sequences")}

    def to_json(self) -> str:
        """Readable JSON; the same manifest always gives the same text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def load_manifest(folder: Path, command: str = "python -m hstu_dist prepare") -> Manifest:
    """Read the manifest of a prepared data set.

    Args:
        folder: of the data set.
        command: what prepares it, for messages.

    Raises:
        UserError: there is none, it cannot be read, or it is of another format version.
    """
    file = folder / MANIFEST_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared data set here", f"run `{command}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})", f"run `{command}` again") from error
    try:
        content = json.loads(text)
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file}: got format version {version}, expected {FORMAT_VERSION}",
                f"run `{command}` again",
            )
        return TypeAdapter(Manifest).validate_python(content)
    except (json.JSONDecodeError, ValidationError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else error.errors()[0]["msg"]
        raise UserError(f"{file}: is damaged ({reason})", f"run `{command}` again") from error


def file_hash(file: Path) -> str:
    """`sha256:` and the hexadecimal digest of the file's content."""
    with file.open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"
