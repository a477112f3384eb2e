"""Batches cut into parts."""

from __future__ import annotations

import pytest
import torch

from hstu_dist.batch import JaggedBatch


def batch_of(lengths: list[int]) -> JaggedBatch:
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.arange(total)
    return JaggedBatch(
        offsets=offsets,
        item_ids=tokens,
        timestamps=tokens + 100,
        actions=tokens.to(torch.int32),
        target_ids=tokens + 1,
        query_times=tokens + 101,
        row_ids=torch.arange(len(lengths)) * 7,
    )


@pytest.mark.parametrize("lengths", [[], [5], [1, 1, 1, 9], [0, 3, 0, 0, 2, 8, 1, 0], [4] * 12])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_the_batch_in_order(lengths: list[int], count: int) -> None:
    batch = batch_of(lengths)
    parts = batch.parts(count)
    assert len(parts) == count
    for part in parts:
        assert part.offsets[0] == 0 and part.offsets[-1] == part.num_tokens
        assert part.offsets.numel() == part.num_sequences + 1
    for name in ("item_ids", "timestamps", "actions", "target_ids", "query_times", "row_ids", "lengths"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_parts_have_about_equally_many_tokens() -> None:
    batch = batch_of([3, 1, 8, 2, 2, 4, 9, 1, 7, 3])
    for count in (2, 3, 4):
        sizes = [part.num_tokens for part in batch.parts(count)]
        # no further off than half of the longest sequence at either end
        assert all(abs(size - batch.num_tokens / count) <= 9 for size in sizes)
        assert min(sizes) > 0
