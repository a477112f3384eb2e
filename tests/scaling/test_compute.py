"""Compute of every rung of the ladder: against torch's counter, and Stochastic Length against its law."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_dist.commands.scale_cells import training_compute
from hstu_dist.config import RunConfig, compose, conf_dir
from hstu_dist.data.config import StochasticLengthConfig
from hstu_dist.data.stochastic_length import StochasticLength
from hstu_dist.models.flops import Workload, count_flops, encoder_work
from hstu_dist.scaling.compute import training_flops
from tests.models.cases import batch_of, encode, tower_of

LADDER = sorted(file.stem for file in (conf_dir() / "size").glob("s[0-9][0-9].yaml"))
RUN_HERE = [f"s{rung:02}" for rung in range(1, 9)]
FAMILIES = ("scaling_hstu", "scaling_sasrec")


@cache
def config_of(family: str, size: str) -> RunConfig:
    return compose([f"experiment={family}", f"size={size}"])


@pytest.mark.slow
@pytest.mark.parametrize("size", RUN_HERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_counts_the_same(family: str, size: str) -> None:
    config = config_of(family, size)
    model, loss = config.retrieval
    length, scores = model.max_length, loss.scores_per_token(config.data.num_items)  # type: ignore[union-attr]
    tower = tower_of(replace(model, backend="reference"))  # type: ignore[arg-type]
    batch = batch_of([length], 50)
    items = torch.randn(length, model.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        candidates = torch.randn(length, scores, model.width, requires_grad=True)
        vectors = encode(tower, items, batch)
        torch.einsum("td,tcd->tc", vectors, candidates).log_softmax(1)[:, 0].sum().backward()
    # the reference computes hidden pairs, too
    hidden = Workload.full([length]).attention_pairs - Workload.causal([length]).attention_pairs
    more = count_flops(model, Workload(attention_pairs=hidden), 0).training  # type: ignore[arg-type]
    records = config.task.records.train  # type: ignore[union-attr]
    assert records is not None
    assert training_compute(config) == (counter.get_total_flops() - more) * records


@pytest.mark.slow
def test_the_ladder_grows_in_everything_and_goes_on_to_clusters() -> None:
    for family in FAMILIES:
        configs = [config_of(family, size) for size in LADDER]
        computes = [training_compute(config) or 0 for config in configs]
        assert computes == sorted(computes)
        assert computes[7] / computes[0] > 1000 and computes[7] < 1e14 and computes[-1] > 1e21
        for one, next_one in pairwise(configs):
            assert one.model.width <= next_one.model.width and one.data.max_length <= next_one.data.max_length
            assert one.model.num_layers <= next_one.model.num_layers  # type: ignore[union-attr]
    seeds = [compose(["experiment=scaling_hstu", f"size=s{rung:02}_seed2"]) for rung in range(1, 5)]
    assert [config.seed for config in seeds] == [2] * 4
    assert [config.model for config in seeds] == [
        config_of("scaling_hstu", f"s{rung:02}").model for rung in range(1, 5)
    ]


@pytest.mark.slow
def test_iso_flop_sizes_have_the_same_compute() -> None:
    for budget in ("a", "b", "c"):
        names = sorted(file.stem for file in (conf_dir() / "size").glob(f"iso_{budget}*.yaml"))
        computes = [training_compute(compose(["experiment=scaling_hstu", f"size={name}"])) or 0 for name in names]
        assert len(names) >= 5 and max(computes) / min(computes) < 1.02


@pytest.mark.slow
def test_stochastic_length_counts_what_is_kept() -> None:
    config = compose(
        ["experiment=scaling_hstu", "size=s08", "data.stochastic_length={alpha: 1.4, selection: greedy}", "seed=3"]
    )
    model, _ = config.retrieval
    law = StochasticLength(StochasticLengthConfig(alpha=1.4), 127, 3)
    cut = config.record_split
    assert cut is not None and cut.train is not None
    chosen = np.arange(490_000 - cut.train, 490_000)
    lengths = law.kept_lengths(chosen, np.full(cut.train, 127), 0)
    assert set(lengths.tolist()) == {127, law.cut_length}
    work = sum((encoder_work(model, [int(n)] * int((lengths == n).sum())) for n in set(lengths.tolist())), Workload())  # type: ignore[arg-type]
    expected = count_flops(model, work, 129).training  # type: ignore[arg-type]
    assert training_compute(config) == expected
    whole = training_compute(config_of("scaling_hstu", "s08"))
    assert whole is not None and expected < 0.6 * whole


@pytest.mark.slow
def test_passes_add_up(tiny_data: Path) -> None:
    words = ["name=x", "data=events", f"data.path={tiny_data}", "data.max_length=16", "trainer.epochs=3"]
    once = training_compute(compose([*words, "trainer.stop_epoch=1"]))
    assert once is not None and training_compute(compose(words)) == 3 * once
    assert training_compute(compose([*words, "task.split=time"])) is None
    config = compose(words)
    model, loss = config.retrieval
    assert training_flops(model, loss, 40, {}) == 0
