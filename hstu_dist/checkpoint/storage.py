"""Reading and writing one checkpoint folder through torch.distributed.checkpoint.

Tensors go into one flat dictionary: nested ones fail on table-wise shards, whose optimizer state exists on
one rank only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu_dist.errors import UserError

FORMAT_VERSION = 1
STATE_FILE = "state.json"
_TENSORS = "tensors"


def write_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """Every rank writes its shards; all ranks call it together."""
    dcp.save(tensors, storage_writer=FileSystemWriter(folder / _TENSORS, single_file_per_rank=True, sync_files=True))


def read_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """Fills tensors in place; shards may lie differently than when they were written.

    Args:
        folder: a complete checkpoint.
        tensors: what is wanted, as `write_tensors` was given.

    Raises:
        UserError: something is missing, or has another shape.
    """
    try:
        reader = FileSystemReader(folder / _TENSORS)
        _check_shapes(folder, reader, tensors)
        dcp.load(tensors, storage_reader=reader)
    except UserError:
        raise
    # what went wrong on any rank reaches all of them as a CheckpointException, which is no Exception
    except (Exception, CheckpointException) as error:
        raise UserError(
            f"checkpoint {folder}: cannot be read ({_cause(error)})",
            "delete this folder to continue from an older checkpoint",
        ) from error


def _cause(error: BaseException) -> str:
    """The first failure of any rank, as one short line."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items())
        return f"rank {rank}: {_cause(error)}"
    lines = str(error).splitlines()
    return f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


def _check_shapes(folder: Path, reader: FileSystemReader, tensors: dict[str, Any]) -> None:
    stored = reader.read_metadata().state_dict_metadata
    for name, wanted in tensors.items():
        shape = tuple(wanted.size())
        found = stored.get(name)
        got = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
        if got != shape:
            raise UserError(
                f"checkpoint {folder}: {name} is {'missing' if got is None else got}, expected shape {shape}",
                "continue with the configuration that wrote it, or choose another run name",
            )


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Plain values beside the tensors."""
    (folder / STATE_FILE).write_text(json.dumps({"format": FORMAT_VERSION, **state}, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """Plain values of a checkpoint.

    Raises:
        UserError: damaged, or written by a newer version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
        version = int(state.pop("format"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {folder}: {STATE_FILE} cannot be read ({error})",
            "delete this folder to continue from an older checkpoint",
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder}: got format {version}, expected at most {FORMAT_VERSION}", "update hstu_dist"
        )
    return state
