"""Tensors of one checkpoint folder: torch.distributed.checkpoint plans who writes and reads what, we move the bytes.

Tensors go into one flat dictionary: nested ones fail on table-wise shards, whose optimizer state exists on
one rank only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    WriteItem,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hstu_dist.checkpoint.manifest import Chunk, FileRecord, Manifest, TensorRecord, chunk_name, write_manifest
from hstu_dist.checkpoint.safetensors_file import dtype_name, dtype_of, read_into, write_safetensors
from hstu_dist.errors import UserError

logger = logging.getLogger(__name__)


class NotWrittenError(Exception):
    """The system refused to write on some rank, for example because the disk is full; every rank raises it."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint is made of.

    Attributes:
        tensors: flat dictionary of plain and sharded tensors.
        state: plain values, equal on all ranks.
        copies: where to read the bytes from instead of `tensors`, by name and offset; None: from `tensors`.
    """

    tensors: dict[str, Any]
    state: dict[str, Any]
    copies: Mapping[MetadataIndex, Tensor] | None = None


def write_tensors(folder: Path, source: Source, group: dist.ProcessGroup | None = None) -> None:
    """Every rank writes its shards, then rank 0 the manifest; all ranks of `group` call it together.

    Args:
        folder: an existing, empty folder.
        source: what to write.
        group: None: all ranks, in their default group.

    Raises:
        NotWrittenError: the disk of a rank is full, or its system refused otherwise.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    if source.copies is not None:
        planner = _CopiesPlanner(source.copies)
    try:
        writer = _Writer(folder, dist.get_rank(group), dist.get_world_size(group), source.state)
        dcp.save(source.tensors, storage_writer=writer, planner=planner, process_group=group)
    # what went wrong on any rank reaches all of them as a CheckpointException, which is no Exception
    except CheckpointException as error:
        refused = all(isinstance(failure, OSError) for failure, _ in error.failures.values())
        raise (NotWrittenError if refused else RuntimeError)(_cause(error)) from error


def read_tensors(folder: Path, manifest: Manifest, tensors: dict[str, Any]) -> None:
    """Fills tensors in place; shards may lie differently than when they were written.

    Args:
        folder: a checkpoint.
        manifest: its manifest; its files are whole.
        tensors: what is wanted, as `write_tensors` was given.

    Raises:
        UserError: a tensor is missing, left over, or has another shape or dtype.
    """
    check_tensors(folder, manifest, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=_Reader(folder, manifest), planner=planner)
    except CheckpointException as error:
        raise UserError(
            f"checkpoint {folder}: cannot be read ({_cause(error)})", "check the disk, then give the same command again"
        ) from error


def check_tensors(folder: Path, manifest: Manifest, tensors: Mapping[str, Any]) -> None:
    """Whether a checkpoint holds exactly these tensors; all ranks call it together.

    Raises:
        UserError: it does not; the first difference is named, the same on every rank.
    """
    # a table-wise shard and its state are known to one rank only
    everywhere: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    mine = {name: _kind(dtype_name(value.dtype), tuple(value.size())) for name, value in tensors.items()}
    dist.all_gather_object(everywhere, mine)
    wanted = {name: kind for part in everywhere for name, kind in part.items()}
    stored = {name: _kind(record.dtype, record.shape) for name, record in manifest.tensors.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise UserError(
                f"checkpoint {folder}: {name}: got {stored.get(name, 'nothing')}, "
                f"expected {wanted.get(name, 'nothing')}",
                "continue with the configuration and data that wrote it, or choose another run name",
            )


def _kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} of shape {shape}"


def _cause(error: BaseException) -> str:
    """The first failure of any rank, as one short line."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {_cause(first)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}"


class _CopiesPlanner(DefaultSavePlanner):
    """Plans with the tensors of a run and takes their bytes from copies, so that the run may go on."""

    def __init__(self, copies: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index]


@dataclass(frozen=True)
class _Place:
    """Where an item was written."""

    file: str
    start: int
    record: FileRecord


class _Writer(StorageWriter):
    """Writes this rank's share of a plan into one file; rank 0 adds the manifest."""

    def __init__(self, folder: Path, rank: int, world_size: int, state: dict[str, Any]) -> None:
        self.folder = folder
        self.file = f"rank-{rank:05d}.safetensors"
        self.world_size = world_size
        self.state = state

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {_chunk_name(item.index): cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        results = []
        if tensors:
            written = write_safetensors(self.folder / self.file, tensors)
            for item in plan.items:
                name = _chunk_name(item.index)
                place = _Place(self.file, written.starts[name], written.record)
                results.append(WriteResult(item.index, tensors[name].nbytes, place))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: cast(_Place, result.storage_data) for rank in results for result in rank}
        tensors = {
            name: _record(name, cast(TensorStorageMetadata, stored), places)
            for name, stored in metadata.state_dict_metadata.items()
        }
        files = {place.file: place.record for place in places.values()}
        write_manifest(
            self.folder, Manifest(world_size=self.world_size, state=self.state, files=files, tensors=tensors)
        )

    # the rest of DCP's interface: nothing to prepare

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(StorageReader):
    """Reads the rows that a plan asks for straight into their tensors."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, record in manifest.tensors.items()
            for chunk in record.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=dtype_of(record.dtype)),
                    torch.Size(record.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in record.chunks],
                )
                for name, record in self.manifest.tensors.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = sorted(((self.chunks[item.storage_index], item) for item in plan.items), key=_position)
        for name, items in groupby(wanted, key=lambda pair: pair[0].file):
            with (self.folder / name).open("rb", buffering=0) as file:
                for chunk, item in items:
                    target = planner.resolve_tensor(item).detach()
                    _read_item(file, chunk, item, target)
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _chunk_name(index: MetadataIndex) -> str:
    return chunk_name(index.fqn, index.offset or ())


def _record(name: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, _Place]) -> TensorRecord:
    chunks = []
    for chunk in stored.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        chunks.append(Chunk(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), file=place.file, start=place.start))
    return TensorRecord(dtype=dtype_name(stored.properties.dtype), shape=tuple(stored.size), chunks=tuple(chunks))


def _position(pair: tuple[Chunk, ReadItem]) -> tuple[str, int]:
    return pair[0].file, pair[0].start


def _read_item(file: FileIO, chunk: Chunk, item: ReadItem, target: Tensor) -> None:
    """Reads rows of a chunk; of rows that are wanted in part, only that part is kept."""
    if not target.numel():
        return
    # a tensor without dimensions is one row
    first, count = (item.storage_offsets[0], item.lengths[0]) if chunk.sizes else (0, 1)
    row_shape = chunk.sizes[1:]
    whole_rows = tuple(item.lengths[1:]) == row_shape
    rows = target
    if not (whole_rows and target.is_cpu and target.is_contiguous()):
        rows = torch.empty((count, *row_shape), dtype=target.dtype)
    read_into(file, chunk.start + first * prod(row_shape) * target.element_size(), rows)
    if rows is not target:
        for dim in range(1, len(chunk.sizes)):
            rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        target.copy_(rows.view_as(target))
