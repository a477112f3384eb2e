"""Options of the later production variant: time at the input, semi-local attention, truncated upper layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hstu_dist.errors import UserError
from hstu_dist.models.config import HSTUConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.flops import Workload, encoder_work, visible_pairs
from hstu_dist.ops.mask import visible
from hstu_dist.ops.spec import AttentionSpec, JaggedLayout
from tests.models.cases import MAX_LENGTH, VARIANTS, batch_of, encode, tower_of
from tests.ops.cases import offsets_of


@pytest.mark.parametrize(("window", "prefix"), [(0, 0), (1, 0), (4, 0), (4, 3), (4, 9), (50, 2)])
@pytest.mark.parametrize("contextual", [0, 2, 6])
def test_pairs_are_those_of_the_mask(window: int, prefix: int, contextual: int) -> None:
    config = HSTUConfig(window=window, global_prefix=prefix)
    spec = AttentionSpec(normalizer=1.0, window=window, global_prefix=prefix)
    for length in (0, 1, 3, 4, 5, 13):
        place = torch.arange(length)
        leading = min(contextual, length)
        mask = visible(place[:, None], place[None, :], (length, leading, 0), spec)
        assert visible_pairs(config, length, contextual) == int(mask.sum())


def test_work_of_truncated_layers() -> None:
    config = HSTUConfig(num_layers=3, truncated_layers=2, truncated_length=4)
    skipped = sum(n * (n + 1) // 2 - min(n, 4) * (min(n, 4) + 1) // 2 for n in (9, 3, 4))
    expected = Workload(tokens=16, attention_pairs=45 + 6 + 10, skipped_tokens=5, skipped_pairs=skipped)
    assert encoder_work(config, [9, 3, 4]) == expected
    # of three contextual tokens of six, only one is among the last four: it sees itself alone
    assert encoder_work(config, [6], 3).skipped_pairs == (9 + 4 + 5 + 6) - (1 + 2 + 3 + 4)


def test_elapsed_is_the_time_since_the_token_before() -> None:
    batch = batch_of([3, 0, 1, 2])
    context = sequence_context(batch, MAX_LENGTH, None)
    t = batch.timestamps
    assert context.elapsed().tolist() == [0, int(t[1] - t[0]), int(t[2] - t[1]), 0, 0, int(t[5] - t[4])]
    # with keys of a cache and targets, all of which follow the history
    keys = torch.tensor([10, 20, 50, 60, 70])
    layout = JaggedLayout(offsets_of((3,)), key_offsets=offsets_of((5,)), num_targets=torch.tensor([2]))
    cached = replace(context, layout=layout, key_times=keys, positions=torch.tensor([2, 3, 3]))
    assert cached.elapsed().tolist() == [30, 10, 20]


def test_times_at_the_input_matter_and_the_future_does_not() -> None:
    timed = replace(VARIANTS["timed"], relative_bias="none")
    batch, items = batch_of([12]), torch.randn(12, 12)
    later = batch.timestamps + (torch.arange(12) >= 7) * 10**7
    a, b = encode(tower_of(timed), items, batch), encode(tower_of(timed), items, replace(batch, timestamps=later))
    assert torch.equal(a[:7], b[:7]) and (a[7:] != b[7:]).any(dim=1).all()


def test_old_tokens_skip_the_truncated_layers() -> None:
    truncated = VARIANTS["truncated"]
    assert isinstance(truncated, HSTUConfig) and truncated.truncated_length == 7
    tower = tower_of(truncated)
    lengths, items = [15, 4, 7], torch.randn(26, 12)
    batch = batch_of(lengths)
    out = encode(tower, items, batch)
    # the same tower without its upper layer
    tower.encoder.whole_layers, tower.encoder.layers = 1, tower.encoder.layers[:1]
    below = encode(tower, items, batch)
    skipped = torch.arange(26) < 15 - 7
    assert torch.equal(out[skipped], below[skipped])
    assert (out[~skipped] != below[~skipped]).any(dim=1).all()


def test_truncated_layers_see_recent_tokens_alone() -> None:
    tower = tower_of(replace(VARIANTS["truncated"], num_layers=2))
    context = sequence_context(batch_of([15, 4, 0, 7]), MAX_LENGTH, noise_key=1)
    rows, recent = context.recent(7)
    assert rows.tolist() == [*range(8, 15), *range(15, 19), *range(19, 26)]
    assert recent.layout.offsets.tolist() == [0, 7, 11, 11, 18]
    assert recent.positions.tolist() == [*range(8, 15), *range(4), *range(7)]
    assert context.noise is not None and recent.noise is not None
    assert torch.equal(recent.noise.tokens, context.noise.tokens[rows])
    leading = replace(context, layout=JaggedLayout(context.layout.offsets, num_contextual=torch.tensor([9, 2, 0, 1])))
    assert leading.recent(7)[1].layout.num_contextual.tolist() == [1, 2, 0, 1]
    assert tower.width == 12


def test_truncated_layers_refuse_targets() -> None:
    context = sequence_context(batch_of([5]), MAX_LENGTH, None)
    targets = replace(context, layout=JaggedLayout(context.layout.offsets, num_targets=torch.tensor([2])))
    with pytest.raises(UserError, match=r"model.truncated_layers: .* cannot reuse keys of a history"):
        targets.recent(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_prefix": 3}, "global_prefix: got 3, expected 0 without a window"),
        ({"num_layers": 2, "truncated_layers": 2}, "truncated_layers: got 2, expected less than num_layers"),
        ({"window": -1}, "greater than or equal to 0"),
    ],
)
def test_options_that_do_not_fit_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSTUConfig(**settings)
