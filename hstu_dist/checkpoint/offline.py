"""Checkpoints without ranks: a tensor put together, and files written anew as another number of ranks would have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hstu_dist.checkpoint.manifest import Chunk, FileRecord, Manifest, TensorRecord, chunk_name, write_manifest
from hstu_dist.checkpoint.safetensors_file import dtype_of, read_into, write_safetensors
from hstu_dist.errors import UserError
from hstu_dist.files import sync

_TABLES = "table"
"""How the names of tables and of their optimizers' state begin."""


@dataclass(frozen=True)
class _Block:
    """Rows of a tensor: `sizes` elements a dimension from row `first` on; a tensor without dimensions is one row."""

    name: str
    first: int
    sizes: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.first, *(0 for _ in self.sizes[1:])) if self.sizes else ()


def read_whole(folder: Path, record: TensorRecord) -> Tensor:
    """A tensor put together from its chunks."""
    return _read(folder, record, _Block("", 0, record.shape))


def reshard(folder: Path, manifest: Manifest, ranks: int) -> Manifest:
    """Replaces the files of a checkpoint; the share of one rank at a time passes through memory.

    The new files appear beside the old ones, under other names, and become the checkpoint when its manifest is
    replaced, in one step: interrupted before, it is the old one, afterwards the new one.

    Args:
        folder: a checkpoint whose files are whole.
        manifest: its manifest.
        ranks: >= 1, another number than `manifest.world_size`.

    Returns:
        The new manifest.

    Raises:
        UserError: the system refused to write; the checkpoint is as before.
    """
    _keep_only(folder, manifest.files)
    files: dict[str, FileRecord] = {}
    chunks: dict[str, list[Chunk]] = {name: [] for name in manifest.tensors}
    try:
        for rank, blocks in enumerate(_layout(manifest.tensors, ranks)):
            file = f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
            named = {chunk_name(block.name, block.offsets): block for block in blocks}
            if not named:
                continue
            tensors = {key: _read(folder, manifest.tensors[block.name], block) for key, block in named.items()}
            written = write_safetensors(folder / file, tensors)
            files[file] = written.record
            for key, block in named.items():
                chunk = Chunk(offsets=block.offsets, sizes=block.sizes, file=file, start=written.starts[key])
                chunks[block.name].append(chunk)
        tensors_now = {name: replace(old, chunks=tuple(chunks[name])) for name, old in manifest.tensors.items()}
        new = replace(manifest, world_size=ranks, files=files, tensors=tensors_now)
        sync(folder)
        write_manifest(folder, new)
    except OSError as error:
        _keep_only(folder, manifest.files)
        raise UserError(
            f"checkpoint {folder}: cannot be rewritten ({error.strerror}), it is as before",
            "free as much space as it takes, then give the same command again",
        ) from error
    sync(folder)
    _keep_only(folder, files)
    return new


def _layout(tensors: Mapping[str, TensorRecord], ranks: int) -> list[list[_Block]]:
    """What each rank writes: of tensors that are split a run of rows, and its part of those that every rank holds."""
    shares: list[list[_Block]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    copied = []
    for name, record in sorted(tensors.items()):
        rows = record.shape[0] if record.shape else 0
        if not rows or not (name.startswith(_TABLES) or len(record.chunks) > 1):
            copied.append(_Block(name, 0, record.shape))
            continue
        most = -(-rows // ranks)
        for rank, first in enumerate(range(0, rows, most)):
            block = _Block(name, first, (min(most, rows - first), *record.shape[1:]))
            shares[rank].append(block)
            filled[rank] += _nbytes(record, block)
    for block in copied:
        rank = filled.index(min(filled))
        shares[rank].append(block)
        filled[rank] += _nbytes(tensors[block.name], block)
    return shares


def _nbytes(record: TensorRecord, block: _Block) -> int:
    return prod(block.sizes) * dtype_of(record.dtype).itemsize


def _read(folder: Path, record: TensorRecord, block: _Block) -> Tensor:
    found = torch.empty(block.sizes, dtype=dtype_of(record.dtype))
    for chunk in record.chunks:
        with (folder / chunk.file).open("rb", buffering=0) as file:
            if not chunk.sizes:
                read_into(file, chunk.start, found)
                continue
            first = max(chunk.offsets[0], block.first)
            count = min(chunk.offsets[0] + chunk.sizes[0], block.first + block.sizes[0]) - first
            if count <= 0:
                continue
            columns = (slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
            target = found[(slice(first - block.first, first - block.first + count), *columns)]
            # of column-wise chunks the rows lie apart
            rows = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
            skipped = (first - chunk.offsets[0]) * prod(chunk.sizes[1:]) * found.element_size()
            read_into(file, chunk.start + skipped, rows)
            if rows is not target:
                target.copy_(rows)
    return found


def _keep_only(folder: Path, names: Iterable[str]) -> None:
    """Removes files of tensors that are none of the checkpoint, left over by an interruption or no longer wanted."""
    kept = set(names)
    for file in folder.glob("rank-*.safetensors"):
        if file.name not in kept:
            file.unlink()
