"""Packages of a trained tower that need torch and nothing of ours: `torch.export`, and AOTInductor for a CPU.

A folder holds `exported.pt2` (torch.export.load; compile it for other devices), `compiled.pt2` (compiled for this kind
of CPU; torch._inductor.aoti_load_package), `items.safetensors` (`item_table.weight`, a row for each item), and
`model.json`, which says what goes in and out and names the rows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from hstu_dist.checkpoint.safetensors_file import write_safetensors
from hstu_dist.errors import UserError
from hstu_dist.inference.dense import DenseTower
from hstu_dist.models.tower import Tower

EXPORTED, COMPILED, ITEMS, DESCRIPTION = "exported.pt2", "compiled.pt2", "items.safetensors", "model.json"
_FILES = (EXPORTED, COMPILED, ITEMS, DESCRIPTION)
_UNFINISHED = ".unfinished"

_INPUTS = {
    "history": "[B, N, D] float32, rows of item_table.weight, oldest event first, padded with zeros",
    "timestamps": "[B, N] int64 seconds, padded with 0",
    "lengths": "[B] int64, events of each history, 0 to N",
    "request_times": "[B] int64 seconds",
    "candidates": "[B, M, D] float32, rows of item_table.weight",
}
_OUTPUTS = {
    "scores": "[B, M] float32, cosines; of an empty history 0",
    "users": "[B, D] float32 of length 1, of an empty history 0: for a search over unit rows of the item table",
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Largest sizes that an exported tower takes; the smallest is 1.

    Attributes:
        users: of a batch.
        history: of a padded history.
        candidates: of a user.
    """

    users: int
    history: int
    candidates: int


def exported(tower: Tower, bounds: Bounds, target_aware: bool = False) -> ExportedProgram:
    """The tower as a graph of ATen operators, dynamic in users, history and candidates.

    Args:
        tower: on the CPU, with plain PyTorch row kernels (backend reference or blocked).
        bounds: sizes; the history leaves room for a candidate if the tower is target-aware.
        target_aware: see `DenseTower`.
    """
    dense = DenseTower(tower.requires_grad_(False).eval(), target_aware)
    users, history, candidates = (
        Dim(name, min=1, max=most)
        for name, most in (("users", bounds.users), ("history", bounds.history), ("candidates", bounds.candidates))
    )
    shapes = (
        {0: users, 1: history},
        {0: users, 1: history},
        {0: users},
        {0: users},
        {0: users, 1: candidates},
    )
    with torch.no_grad():
        return torch.export.export(dense, _example(tower.width, bounds), dynamic_shapes=shapes)


def _example(width: int, bounds: Bounds) -> tuple[Tensor, ...]:
    # sizes that differ from each other and from 1, where the bounds allow: export takes equal ones for one size
    B, N, M = min(2, bounds.users), min(5, bounds.history), min(3, bounds.candidates)
    times = torch.arange(N).expand(B, N).contiguous()
    lengths = torch.full((B,), N)
    return torch.randn(B, N, width), times, lengths, lengths.clone(), torch.randn(B, M, width)


def write_package(
    folder: Path, program: ExportedProgram, table_VD: Tensor, description: Mapping[str, Any], compile_it: bool
) -> None:
    """Writes a folder; a new one appears whole or not at all, in one that is there `model.json` comes last.

    Args:
        folder: new, empty, or a package of an earlier export, which is replaced when all of the new one is written.
        program: of `exported`.
        table_VD: item vectors.
        description: of the model, for `model.json`.
        compile_it: also compile it for this machine's CPU.

    Raises:
        UserError: the folder holds something else, or there is no compiler.
    """
    _check_replaceable(folder)
    # a folder that is there may be mounted: it cannot be renamed, and nothing may be writable beside it
    is_new = not folder.exists()
    unfinished = folder.parent / f".{folder.name}{_UNFINISHED}" if is_new else folder / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        torch.export.save(program, unfinished / EXPORTED)
        if compile_it:
            _compile(program, unfinished / COMPILED)
        write_safetensors(unfinished / ITEMS, {"item_table.weight": table_VD})
        content = {**description, "inputs": _INPUTS, "outputs": _OUTPUTS, "torch": torch.__version__}
        (unfinished / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")
        if is_new:
            os.replace(unfinished, folder)
        else:
            _move_package(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    """Only an empty folder or a package may be replaced: a mistyped path must not cost anyone their files."""
    if not folder.exists():
        return
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"a file"}
    foreign = sorted(names - {*_FILES, _UNFINISHED})
    if foreign:
        raise UserError(f"{folder}: holds {foreign[0]}, which no export writes", "set output to a new or empty folder")


def _move_package(source: Path, target: Path) -> None:
    # what has no description is no package: files of two exports lie side by side meanwhile
    for name in reversed(_FILES):
        (target / name).unlink(missing_ok=True)
    for name in _FILES:
        if (source / name).exists():
            os.replace(source / name, target / name)


def _compile(program: ExportedProgram, path: Path) -> None:
    # takes seconds to import, and is not needed without compiling
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        aoti_compile_and_package(program, package_path=str(path))
    except InvalidCxxCompiler as error:
        raise UserError("export: there is no working C++ compiler", "install g++, or set compile=false") from error
