"""The moving average of the weights: its values, and that evaluation uses it without disturbing training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.train import average as average_module
from hstu_dist.train.average import WeightAverage
from hstu_dist.train.state import TrainState
from tests.distributed.cases import build, snapshot, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks


def test_an_average_forgets_its_start_and_then_keeps_its_decay() -> None:
    weight = torch.randn(5, dtype=torch.float64)
    average, expected = WeightAverage({"w": weight}, decay=0.9), weight.clone()
    for step in range(1, 200):
        weight += torch.randn(5, dtype=torch.float64)
        average.update(step)
        decay = min(0.9, step / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.averages["w"], expected)


def test_weights_come_back_also_after_an_error() -> None:
    weight = torch.zeros(3)
    average = WeightAverage({"w": weight}, decay=0.5)
    weight.fill_(4)
    average.update(1000)

    def fails() -> None:
        with average.applied():
            assert weight.tolist() == [2, 2, 2]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert weight.tolist() == [4, 4, 4] and average.averages["w"].tolist() == [2, 2, 2]


def test_a_tensor_of_two_names_and_one_that_is_not_floating(monkeypatch: pytest.MonkeyPatch) -> None:
    # more than one part, the last one shorter
    monkeypatch.setattr(average_module, "_EXCHANGED_ELEMENTS", 4)
    shared, mask, scale = torch.zeros(5, 2), torch.tensor([True, False]), torch.tensor(8.0)
    average = WeightAverage({"first": shared, "second": shared, "mask": mask, "scale": scale}, decay=0.5)
    shared.fill_(4)
    average.update(1000)
    with average.applied():
        assert shared.tolist() == [[2, 2]] * 5 and mask.tolist() == [True, False] and scale == 8
    assert shared.tolist() == [[4, 4]] * 5 and list(average.averages) == ["first", "second", "scale"]
    assert average.averages["first"].tolist() == average.averages["second"].tolist() == [[2, 2]] * 5


def exchanged() -> tuple[list[list[float]], list[list[float]]]:
    """What a rank holds of a split weight, in more than one part, while its average is applied and afterwards."""
    average_module._EXCHANGED_ELEMENTS = 4
    with process_group("cpu", 60):
        weight = distribute_tensor(torch.zeros(7, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
        average = WeightAverage({"w": weight}, decay=0.5)
        weight.to_local().fill_(4)
        average.update(1000)
        with average.applied():
            inside = weight.to_local().tolist()
        return inside, weight.to_local().tolist()


@pytest.mark.distributed
def test_a_split_weight_is_exchanged_where_it_lies() -> None:
    for rank, (inside, afterwards) in enumerate(run_ranks(2, exchanged)):
        assert inside == [[2, 2]] * (4 - rank) and afterwards == [[4, 4]] * (4 - rank)


def evaluated(data: Path) -> tuple[dict[str, float], dict[str, float], bool]:
    """Metrics of the average, of a model whose weights are that average, and whether evaluating changed anything."""
    with process_group("cpu", 60) as world:
        session = build(tiny_config(data, Path("unused"), "optimizer.average_decay=0.9"), world)
        trainer_of(session, TrainState(), epochs=2).fit()
        before = snapshot(session)
        values = session.evaluate(Split.VALIDATION)
        after = snapshot(session)
        assert session.average is not None
        for name, average in session.average.averages.items():
            weight = session.tensors()[name]
            if hasattr(weight, "local_shards"):
                for mine, theirs in zip(weight.local_shards(), average.local_shards(), strict=True):
                    mine.tensor.copy_(theirs.tensor)
            else:
                weight.copy_(average)
        unchanged = all(torch.equal(value, after[name]) for name, value in before.items())
        return values, session.evaluate(Split.VALIDATION), unchanged


@pytest.mark.distributed
def test_evaluation_uses_the_average_of_all_ranks(tiny_data: Path) -> None:
    (averaged, copied, unchanged), other = run_ranks(2, evaluated, tiny_data)
    assert averaged == copied == other[0] and unchanged
