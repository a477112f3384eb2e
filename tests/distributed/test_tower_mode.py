"""A tower drops nothing while it is evaluated, whatever layers of torch it is made of."""

from __future__ import annotations

import torch
from torch import nn

from hstu_dist.distributed.parallel import DenseSettings, ParallelTower
from hstu_dist.distributed.process_group import process_group
from tests.distributed.ranks import run_ranks


def called() -> tuple[list[float], list[float], list[bool]]:
    """What a dropout makes of ones in evaluation and in training, and the modes of all layers afterwards."""
    with process_group("cpu", 60):
        tower = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        # one that its owner froze
        tower[1].eval()
        parallel, ones = ParallelTower(tower, DenseSettings()), torch.ones(64, 1)
        evaluated = parallel.local(ones)
        modes = [module.training for module in tower.modules()]
        return evaluated.flatten().tolist(), parallel(ones).flatten().tolist(), modes


def test_layers_of_torch_drop_in_training_only() -> None:
    ((evaluated, trained, modes),) = run_ranks(1, called)
    assert set(evaluated) == {1.0} and set(trained) == {0.0, 2.0}
    assert modes == [True, True, False]
