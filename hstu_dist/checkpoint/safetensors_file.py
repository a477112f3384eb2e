"""Files in the safetensors format, written block by block with their checksum: no copy of the tensors is made.

The library `safetensors` reads them; its own writer takes a second copy of everything and gives no checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from hstu_dist.checkpoint.manifest import BLOCK_BYTES, FileRecord

_WINDOW_BYTES = 8 * BLOCK_BYTES
"""How much the system may hold back before it is asked to write it."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Written:
    """A finished file, and the byte that each tensor starts at."""

    record: FileRecord
    starts: Mapping[str, int]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in the words of safetensors.

    Raises:
        ValueError: safetensors does not know it.
    """
    if dtype not in _NAMES:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name of safetensors.

    Raises:
        ValueError: it is unknown.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype: got {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes and syncs a file; where that fails, nothing of it stays.

    Args:
        path: of the new file.
        tensors: of any shape and device.

    Raises:
        OSError: it exists already, the disk is full, or the system refused otherwise.
    """
    # wide elements first, as the library does it: every tensor is aligned to its elements
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header, starts = _header(ordered)
    digest = xxhash.xxh3_128()
    with path.open("xb", buffering=0) as file:
        try:
            _write(file, digest, memoryview(header))
            for tensor in ordered.values():
                _write(file, digest, bytes_of(tensor.detach().cpu().contiguous()))
            size = file.tell()
            os.fsync(file.fileno())
            _let_go(file)
        except BaseException:
            path.unlink()
            raise
    return Written(FileRecord(bytes=size, xxh3=digest.hexdigest()), starts)


def read_into(file: FileIO, start: int, target: Tensor) -> None:
    """Fills a contiguous CPU tensor from byte `start` of a file.

    Raises:
        OSError: the file ends before.
    """
    wanted = bytes_of(target)
    file.seek(start)
    while len(wanted):
        count = file.readinto(wanted)
        if not count:
            raise OSError(f"{Path(str(file.name)).name} ends {len(wanted)} bytes too early")
        wanted = wanted[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Length and JSON that a file begins with, and where each tensor starts in it."""
    entries, starts, end = {}, {}, 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _let_go(file: FileIO) -> None:
    """Asks the system, where it can be asked, to write what it holds of a file and to forget what is written.

    The disk then works while more is produced, and the same few pages of memory are used over and over: a gigabyte of
    new ones costs more than the disk does, and pushes out what a training reads.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write(file: FileIO, digest: xxhash.xxh3_128, content: memoryview) -> None:
    for start in range(0, len(content), BLOCK_BYTES):
        if start and start % _WINDOW_BYTES == 0:
            _let_go(file)
        block = content[start : start + BLOCK_BYTES]
        digest.update(block)
        # a nearly full disk takes a part and says so only at the next call
        while len(block):
            block = block[file.write(block) :]
