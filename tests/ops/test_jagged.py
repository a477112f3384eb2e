"""Index arithmetic of jagged batches against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.ops import jagged
from hstu_dist.ops.jagged import IdSet, last_rows, positions, sequence_of
from tests.ops.cases import offsets_of

lengths_strategy = st.lists(st.integers(0, 6), max_size=8).map(tuple)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_strategy)
def test_positions_and_owners(lengths: tuple[int, ...]) -> None:
    offsets = offsets_of(lengths)
    assert positions(offsets).tolist() == [i for n in lengths for i in range(n)]
    assert sequence_of(offsets).tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert positions(offsets).dtype == sequence_of(offsets).dtype == torch.int64
    if all(lengths):
        ends = [sum(lengths[: b + 1]) - 1 for b in range(len(lengths))]
        assert last_rows(offsets).tolist() == ends
    else:
        with pytest.raises(ValueError, match=f"empty sequence at {lengths.index(0)}"):
            last_rows(offsets)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=3),
    use_table=st.booleans(),
)
def test_id_set_holds_each_id_once_and_finds_it(parts: list[list[int]], use_table: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jagged, "_TABLE_LIMIT", 1 << 24 if use_table else 0)
        ids = IdSet.of([torch.tensor(part, dtype=torch.int64) for part in parts], 31)
    assert ids.ids.tolist() == sorted({i for part in parts for i in part})
    assert ids.ids.dtype == torch.int64
    for part in parts:
        wanted = torch.tensor(part, dtype=torch.int64)
        places = ids.places(wanted)
        assert places.dtype == torch.int64
        assert torch.equal(ids.ids[places], wanted)


@pytest.mark.parametrize("high", [1 << 24, (1 << 24) + 1, 1 << 61])
def test_id_set_keeps_shapes_and_large_ids(high: int) -> None:
    # float32 would merge the two largest
    grid = torch.tensor([[high - 1, 0, high - 2], [5, high - 1, 5]])
    ids = IdSet.of([grid, torch.tensor([3])], high)
    assert ids.ids.tolist() == [0, 3, 5, high - 2, high - 1]
    assert ids.places(grid).tolist() == [[4, 0, 3], [2, 4, 2]]


@pytest.mark.parametrize("high", [0, 1, 7])
def test_the_set_of_everything_leaves_ids_where_they_are(high: int) -> None:
    everything = IdSet.everything(high, torch.device("cpu"))
    assert everything.ids.tolist() == list(range(high))
    wanted = torch.arange(high).flip(0)
    assert torch.equal(everything.places(wanted), wanted)
