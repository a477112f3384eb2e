"""Pictures of who does what: tables and towers over ranks, a training step, the files of a checkpoint."""

from __future__ import annotations

from itertools import pairwise

from hstu_dist.distributed.config import EmbeddingConfig, TableShape
from hstu_dist.distributed.table_plan import configured_plan
from tests.docs.svg import BLUE, GREEN, ORANGE, Drawing

RANKS, ROWS, WIDTH = 4, 1000, 64


def sharding() -> str:
    """Four ranks: their shares of batch and table, what they exchange, and copies of the tower."""
    drawing = Drawing(736, 420)
    specs = EmbeddingConfig().specs({"item": TableShape(ROWS, WIDTH)})
    shards = sorted(configured_plan(specs, RANKS).tables["item"].shards, key=lambda shard: shard.rank)
    for rank, shard in enumerate(shards):
        x = 20 + 178 * rank
        drawing.text(x + 80, 22, f"rank {rank}", "middle bold")
        drawing.box(x, 34, (160, 46), ["share of the batch", "its own sequences"], ORANGE)
        rows = f"rows {shard.row} to {shard.row + shard.rows - 1}"
        drawing.box(x, 156, (160, 62), ["item table", rows, "and their optimizer state"], BLUE)
        drawing.box(x, 288, (160, 62), ["tower", "a copy (DDP)", "or a part (FSDP2)"], GREEN)
    for rank in range(RANKS):
        for owner in range(RANKS):
            start, end = 100 + 178 * rank, 100 + 178 * owner
            drawing.line((start, 82), (end, 154), dashed=rank != owner)
            drawing.line((start, 220), (end, 286), dashed=rank != owner)
    drawing.cell(232, 104, (272, 24), "#ffffff", "all-to-all: ids to the owners of their rows")
    drawing.cell(232, 240, (272, 24), "#ffffff", "all-to-all: rows to those who asked")
    for rank in range(RANKS - 1):
        drawing.line((180 + 178 * rank, 319), (198 + 178 * rank, 319))
    drawing.text(
        368, 372, "all-reduce (DDP), or all-gather and reduce-scatter (FSDP2), of the tower's gradients", "middle"
    )
    drawing.text(
        368,
        400,
        "Backward: gradients of rows go back the same way, and each owner updates its rows at once.",
        "middle small",
    )
    return drawing.svg()


def step() -> str:
    """From the ids of a batch to the update."""
    drawing = Drawing(690, 488)
    column = 400
    boxes = (
        (20, 20, ["JaggedBatch", "ids, times, offsets, targets"], ORANGE),
        (20, 100, ["draw negatives", "function of seed, step, token"], ORANGE),
        (20, 180, ["distinct ids U", "inputs, targets and negatives"], ORANGE),
        (20, 260, ["look up rows [U, D]", "one exchange a step"], BLUE),
        (20, 340, ["tower: [T, D] unit vectors", "positions, layers, norm"], GREEN),
        (20, 420, ["softmax loss", "sum over the targets"], GREEN),
        (column, 420, ["backward", "of every micro-batch"], GREEN),
        (column, 340, ["gradient of rows [U, D]", "added up over micro-batches"], BLUE),
        (column, 260, ["all finite, on all ranks?", "no: once more, then refuse the step"], ORANGE),
        (column, 180, ["table: backward of the look-up", "updates rows and their state"], BLUE),
        (column, 100, ["tower: AdamW", "mean over all targets of all ranks"], GREEN),
        (column, 20, ["hooks", "log, validate, save a checkpoint"], ORANGE),
    )
    size = (270, 48)
    for x, y, lines, colour in boxes:
        drawing.box(x, y, size, lines, colour)
    for upper, lower in pairwise(boxes[:6]):
        drawing.arrow((155, upper[1] + 48), (155, lower[1] - 1))
    drawing.arrow((290, 444), (column - 2, 444))
    for lower, upper in pairwise(boxes[6:]):
        drawing.arrow((column + 135, lower[1]), (column + 135, upper[1] + 49))
    return drawing.svg()


def checkpoint() -> str:
    """Files that two ranks wrote, and which parts of a table three others read."""
    drawing = Drawing(736, 380)
    drawing.text(20, 24, "runs/NAME/checkpoints/step-00000500/", "bold")
    drawing.box(
        20,
        40,
        (210, 118),
        [
            "manifest.json",
            "step, place in the data",
            "of each tensor: dtype, shape,",
            "chunks: file, first byte",
            "of each file: bytes, checksum",
        ],
        ORANGE,
    )
    drawing.text(20, 180, "written last; one rename makes", "small")
    drawing.text(20, 196, "the folder a checkpoint", "small")
    writers = configured_plan(EmbeddingConfig().specs({"item": TableShape(ROWS, WIDTH)}), 2).tables["item"].shards
    readers = configured_plan(EmbeddingConfig().specs({"item": TableShape(ROWS, WIDTH)}), 3).tables["item"].shards
    scale, top = 0.26, 66
    drawing.text(290, 56, "files of 2 ranks", "bold")
    drawing.text(600, 56, "read by 3 ranks", "bold")
    drawing.text(440, 24, "item table, 1,000 rows", "small")
    for shard, colour in zip(writers, (BLUE, GREEN), strict=True):
        y, height = top + shard.row * scale, shard.rows * scale - 3
        drawing.cell(290, y, (190, height), colour)
        drawing.text(385, y + height / 2 - 4, f"rank-{shard.rank:05d}.safetensors", "middle white")
        drawing.text(
            385, y + height / 2 + 14, f"rows {shard.row} to {shard.row + shard.rows - 1}", "middle white small"
        )
    for shard in readers:
        y, height = top + shard.row * scale, shard.rows * scale - 3
        drawing.box(
            600, y, (116, height), [f"rank {shard.rank}", f"rows {shard.row} to {shard.row + shard.rows - 1}"], ORANGE
        )
        for part in writers:
            first, last = max(shard.row, part.row), min(shard.row + shard.rows, part.row + part.rows)
            if first < last:
                middle = top + (first + last) / 2 * scale
                drawing.arrow((482, middle), (598, middle))
    for number, line in enumerate(
        (
            "Tensors are global: a reader takes the bytes that it is going to hold, whoever wrote them. The tower,",
            "optimizer states and moving averages lie in the same files. Checksums are compared before loading.",
        )
    ):
        drawing.text(20, 352 + 17 * number, line, "small")
    return drawing.svg()
