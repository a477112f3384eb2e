"""`checkpoint`: without starting ranks, what checkpoints hold, whether they are whole, their weights, their files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

from rich.filesize import decimal

from hstu_dist.checkpoint.manifest import Manifest, TensorRecord, check_file, read_manifest, step_of
from hstu_dist.config import load
from hstu_dist.distributed.config import ITEM
from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder

_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
TABLE = "table."
"""What names of the item table's tensors begin with."""

VOCABULARY = "table_vocabulary."
"""What names of the tensors of vocabularies begin with."""

TOWER = "tower."
"""What names of the tower's tensors begin with."""

_AVERAGE = "average."


def inspect(path: Path, say: Callable[[str], None]) -> None:
    """Prints step, position, writer and all tensors of a checkpoint; reads its manifest only.

    Args:
        path: a checkpoint, or a run, of which the newest one is meant.
        say: prints a line for the user.

    Raises:
        UserError: there is none, or its manifest is damaged.
    """
    folder = find(path)[-1]
    manifest = read_manifest(folder)
    state = manifest.state
    position = ", ".join(f"{name} {state[name]}" for name in ("step", "epoch", "batch") if name in state)
    size = sum(file.bytes for file in manifest.files.values())
    say(f"checkpoint {folder}: {position}")
    say(f"written by {manifest.world_size} ranks in {len(manifest.files)} files, {decimal(size)}")
    for name, table in state.get("tables", {}).items():
        optimizer = ", ".join(f"{key} {value}" for key, value in table["optimizer"].items() if value is not None)
        say(f"table {name}: {table['rows']:,} rows x {table['width']}, {table['dtype']}; optimizer: {optimizer}")
        if "vocabulary" in table:
            named = ", ".join(f"{key} {value}" for key, value in table["vocabulary"].items() if value is not None)
            say(f"table {name}: vocabulary: {named}")
    rows = [("tensor", "dtype", "shape", "parts", "bytes")]
    for name, record in sorted(manifest.tensors.items()):
        count = prod(record.shape) * _BITS[record.dtype] // 8
        shape = " x ".join(map(str, record.shape)) or "scalar"
        rows.append((name, record.dtype, shape, str(len(record.chunks)), f"{count:,}"))
    for line in _columns(rows):
        say(line)


def verify(path: Path, say: Callable[[str], None]) -> None:
    """Reads every file of a checkpoint, or of all checkpoints of a run, and compares it with its checksum.

    Raises:
        UserError: there is none, or one is damaged; the first damage of each is named.
    """
    damaged = []
    for folder in find(path):
        try:
            manifest = read_manifest(folder)
            for name, record in sorted(manifest.files.items()):
                check_file(folder, name, record)
        except UserError as error:
            damaged.append(error)
            say(error.problem)
            continue
        size = sum(file.bytes for file in manifest.files.values())
        say(f"checkpoint {folder}: whole, {len(manifest.files)} files, {decimal(size)}")
    if damaged:
        raise UserError(f"{len(damaged)} checkpoints are damaged, the first: {damaged[0].problem}", damaged[0].remedy)


def export(path: Path, output: Path, say: Callable[[str], None]) -> None:
    """Writes table and tower of a checkpoint as one safetensors file; all of it passes through memory.

    `item_table.weight` has a row for each item, in the order of the prepared data's items; where items have rows by a
    vocabulary that grows, `item_table.ids` has the item of each row, an integer or the hash of a text, if
    `item_table.occupied` is 1 there. Further tables are `<name>_table.weight`, and the tower's tensors keep their
    names, after `tower.`. A moving average of the weights, where the run has one, takes their place. State of
    optimizers stays behind.

    Args:
        path: a checkpoint, or a run, of which the newest one is meant.
        output: the new file.
        say: prints a line for the user.

    Raises:
        UserError: the checkpoint is missing or damaged, its run is not around it, or the output cannot be written.
    """
    # torch takes seconds to import
    import torch

    from hstu_dist.checkpoint.offline import read_whole
    from hstu_dist.checkpoint.safetensors_file import write_safetensors
    from hstu_dist.distributed.zch import EMPTY, ids_of

    folder = find(path)[-1]
    manifest = read_manifest(folder)
    for name, file in manifest.files.items():
        check_file(folder, name, file)
    tables = manifest.state.get("tables")
    # older checkpoints do not say, and have an item table only
    widths = {name: table["width"] for name, table in tables.items()} if tables else {ITEM: _model_width(folder)}
    weights = {}
    for name, record in manifest.tensors.items():
        if name.startswith(VOCABULARY) and name.endswith(".keys"):
            table = name.removeprefix(VOCABULARY).partition(".")[0]
            keys = read_whole(folder, record)
            weights[f"{table}_table.occupied"] = (keys != EMPTY).to(torch.uint8)
            weights[f"{table}_table.ids"] = ids_of(keys)
    for name, record in weight_records(manifest).items():
        if name.startswith(TABLE):
            table = table_of(name)
            # stored rows are padded to a width that the kernels like
            weights[f"{table}_table.weight"] = read_whole(folder, record)[:, : widths[table]]
        else:
            weights[name] = read_whole(folder, record)
    try:
        written = write_safetensors(output, weights)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})", "give the name of a new file") from error
    say(f"{output}: {len(weights)} tensors, {decimal(written.record.bytes)}, of {folder}")


def reshard(path: Path, ranks: int, say: Callable[[str], None]) -> None:
    """Rewrites the files of a checkpoint as `ranks` ranks would have written them, in place.

    Runs need it for nothing: they read what any number of ranks has written. It puts as many files where they are
    going to be read as there will be readers.

    Args:
        path: a checkpoint, or a run, of which the newest one is meant.
        ranks: how many.
        say: prints a line for the user.

    Raises:
        UserError: there is none, it is damaged, its run is training, or it cannot be written; it stays as it was.
    """
    if ranks < 1:
        raise UserError(f"--ranks: got {ranks}, expected at least 1", "give the number of ranks that will read it")
    # torch takes seconds to import
    from hstu_dist.checkpoint import offline

    folder = find(path)[-1]
    run = RunFolder(folder.resolve().parent.parent)
    with run.lock() if run.config_file.exists() else contextlib.nullcontext():
        manifest = read_manifest(folder)
        before = manifest.world_size
        for name, file in manifest.files.items():
            check_file(folder, name, file)
        if ranks != before:
            manifest = offline.reshard(folder, manifest, ranks)
    size = decimal(sum(file.bytes for file in manifest.files.values()))
    said = "already as" if ranks == before else f"written by {before} ranks, now as"
    say(f"checkpoint {folder}: {said} {ranks} ranks write it, {len(manifest.files)} files, {size}")


def weight_records(manifest: Manifest) -> dict[str, TensorRecord]:
    """Tensors of table and tower, by name; of their moving average where the run has one."""
    weights = {name: record for name, record in manifest.tensors.items() if name.startswith((TABLE, TOWER))}
    # what has no mean, such as a mask, stays as it is
    averages = {
        name.removeprefix(_AVERAGE): record for name, record in manifest.tensors.items() if name.startswith(_AVERAGE)
    }
    return weights | averages


def table_of(name: str) -> str:
    """Name of the table that a stored tensor's rows belong to."""
    return name.split(".")[-2]


def find(path: Path) -> list[Path]:
    """Checkpoints at a path, oldest first: one checkpoint's folder, a run's, or the folder of a run's checkpoints.

    Raises:
        UserError: there is none.
    """
    if step_of(path.resolve()) is not None and path.is_dir():
        return [path]
    for folder in (RunFolder(path).checkpoints, path):
        found = _steps(folder.iterdir()) if folder.is_dir() else []
        if found:
            return found
    raise UserError(f"{path}: got no checkpoint", "give the folder of a run, or one of its checkpoints/step-NNNNNNNN")


def _steps(entries: Iterable[Path]) -> list[Path]:
    numbered = [(step, entry) for entry in entries if (step := step_of(entry)) is not None]
    return [entry for _, entry in sorted(numbered)]


def _model_width(folder: Path) -> int:
    run = RunFolder(folder.resolve().parent.parent)
    if not run.config_file.exists():
        raise UserError(
            f"checkpoint {folder}: its run's {run.config_file.name} is not where it belongs, {run.config_file}",
            "export it from within its run",
        )
    return load(run.config_file).model.width


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    """Left-aligned columns; the last one, a number, to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True))
        yield f"{left}  {row[-1]:>{widths[-1]}}"
