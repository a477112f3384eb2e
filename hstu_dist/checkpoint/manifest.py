"""The manifest of a checkpoint: which file holds what, and checksums that tell whole files from damaged ones; no torch.

A checkpoint is a folder `step-NNNNNNNN` of safetensors files, one a rank that wrote any, and `manifest.json`, written
last. Nothing in it is code: reading one runs none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.validation import STRICT

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 1 << 22
"""How much is read, hashed or written at once: small enough to stay in the cache in between."""

_NAME = re.compile(r"step-(\d{8,})")
_FIRST_FORMAT_FILE = "state.json"

Count = Annotated[int, Field(ge=0)]


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was written: something is missing, cut short or altered."""

    def __init__(self, problem: str, remedy: str = "delete this folder to continue from an older checkpoint") -> None:
        super().__init__(problem, remedy)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Chunk:
    """A block of a tensor: `sizes` elements a dimension from `offsets` on, row-major from byte `start` of `file`."""

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    # a plain name: a manifest must not lead out of its folder
    file: Annotated[str, Field(pattern=r"^rank-\d{5,}(-of-\d{5,})?\.safetensors$")]
    start: Count


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TensorRecord:
    """A tensor in the words of safetensors, and the chunks that make it up."""

    dtype: str
    shape: tuple[Count, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileRecord:
    """What a file must be: its bytes and their XXH3 checksum of 128 bits in hexadecimal."""

    bytes: Count
    xxh3: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """A whole checkpoint.

    Attributes:
        world_size: ranks that wrote it; any other number can read it.
        state: plain values: step, position in the data, history.
        files: by name.
        tensors: by name.
    """

    world_size: Annotated[int, Field(ge=1)]
    state: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint's folder, by its name; None for any other name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def chunk_name(tensor: str, offsets: Sequence[int]) -> str:
    """A chunk's name in its file; chunks of one tensor differ by their offsets."""
    return f"{tensor}@{','.join(map(str, offsets))}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes and syncs the file that makes a folder of tensors a checkpoint."""
    content = asdict(manifest)
    document = {"format": FORMAT_VERSION, "xxh3": content_hash(content), "manifest": content}
    write_atomically(folder / MANIFEST_FILE, json.dumps(document, indent=1).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, checked.

    Raises:
        DamagedCheckpointError: it is missing or damaged.
        UserError: there is no such checkpoint, or it is of another format.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder}: not found", "give the same command again to continue from another one")
    if (folder / _FIRST_FORMAT_FILE).exists():
        _refuse_format(folder, 1)
    try:
        document = json.loads((folder / MANIFEST_FILE).read_bytes())
        version = document["format"]
        if isinstance(version, int) and version != FORMAT_VERSION:
            _refuse_format(folder, version)
        if document["xxh3"] != content_hash(document["manifest"]):
            raise DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST_FILE} has another checksum than it names")
        return TypeAdapter(Manifest).validate_python(document["manifest"])
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST_FILE} is missing") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST_FILE}: {where}: {first['msg']}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST_FILE} cannot be read ({error})") from error


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Reads a whole file and compares it with what was written.

    Raises:
        DamagedCheckpointError: it is missing, of another size, or altered.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(BLOCK_BYTES, record.bytes + 1)))
    size = 0
    try:
        with (folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {name} is missing") from error
    except OSError as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: {name} cannot be read ({error.strerror})") from error
    if size != record.bytes:
        raise DamagedCheckpointError(f"checkpoint {folder}: {name} has {size} bytes, expected {record.bytes}")
    if digest.hexdigest() != record.xxh3:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: {name} is altered (checksum {digest.hexdigest()}, expected {record.xxh3})"
        )


def _refuse_format(folder: Path, version: int) -> None:
    newer = version > FORMAT_VERSION
    raise UserError(
        f"checkpoint {folder}: got format {version}, expected {FORMAT_VERSION}",
        "update hstu_dist" if newer else "finish the run with the version that wrote it, or choose another run name",
    )


def content_hash(content: Any) -> str:
    """Checksum of a manifest's content, whatever the layout of its JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
