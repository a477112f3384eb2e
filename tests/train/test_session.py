"""A session's loaders: only training cuts histories and batches by work, and costs are the model's own FLOPs."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hstu_dist.commands.session import Session, _check_records, sequence_cost
from hstu_dist.config import compose
from hstu_dist.data.record_split import RecordSplit
from hstu_dist.data.split import Split, split_rows
from hstu_dist.errors import UserError
from hstu_dist.models.flops import Workload
from tests.data.cases import dataset_of
from tests.train.cases import WORLD

DATA = dataset_of([12, 150, 90, 200, 33, 170, 64])


def session_of(*overrides: str) -> Session:
    """Without a model: loaders need none."""
    config, nothing = compose(["experiment=ml1m", *overrides]), cast(Any, None)
    return Session(config=config, world=WORLD, recommender=nothing, optimizers=nothing, average=None, dataset=DATA)


def lengths_of(session: Session, split: Split) -> dict[int, int]:
    batches = list(session.loader(split).epoch(0))
    return {row: n for b in batches for row, n in zip(b.row_ids.tolist(), b.lengths.tolist(), strict=True)}


@pytest.mark.parametrize(("validation", "test", "part"), [(0.01, 0.3, "validation"), (0.3, 0.01, "test")])
def test_records_leave_something_for_every_part(validation: float, test: float, part: str) -> None:
    _check_records(DATA, RecordSplit(validation_share=0.3, test_share=0.3))
    with pytest.raises(UserError, match=f"its {part} part has no record of two events"):
        _check_records(DATA, RecordSplit(validation_share=validation, test_share=test))


@pytest.mark.parametrize("train_on", [Split.TRAIN, Split.TRAIN_VALIDATION])
def test_only_training_cuts_histories(train_on: Split) -> None:
    session = session_of("data.stochastic_length={alpha: 1.01}", f"trainer.train_on={train_on}")
    for split in Split:
        rows = split_rows(DATA.lengths, split, 200)
        whole = dict(zip(rows.sequences.tolist(), rows.lengths.tolist(), strict=True))
        if split is train_on:
            assert sum(lengths_of(session, split).values()) < 0.7 * sum(whole.values())
        elif split in (Split.VALIDATION, Split.TEST):
            assert lengths_of(session, split) == whole


def test_only_training_is_batched_by_work() -> None:
    session = session_of("trainer.batching.by=tokens", "trainer.batching.budget=200")
    assert len(session.loader(Split.TRAIN)) == 4
    assert len(session.loader(Split.TEST)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hstu", "sasrec"])
@pytest.mark.parametrize("length", [1, 2, 77, 4096])
def test_cost_of_a_sequence_is_its_flops(model: str, length: int) -> None:
    session = session_of(f"model={model}")
    cost = session.loader(Split.TRAIN).config.cost
    expected = session.training_flops(Workload.causal([length]))
    assert cost.linear * length + cost.quadratic * length**2 == pytest.approx(expected, rel=1e-12)
    assert cost == sequence_cost(lambda n: session.training_flops(Workload.causal([n])), session.config.data.max_length)
