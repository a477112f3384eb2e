"""One of everything that a run can take from outside the package: encoder, loss, metric, data set and hook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from hstu_dist.models.config import PluginEncoderConfig
from hstu_dist.models.context import SequenceContext
from hstu_dist.models.flops import Workload
from hstu_dist.ops.jagged import sequence_of
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.trainer import Hook, Trainer


class Gru(nn.Module):
    """GRU4Rec's encoder: every event sees the ones before it through a recurrent state."""

    def __init__(self, config: PluginEncoderConfig) -> None:
        super().__init__()
        self.state = nn.GRU(config.width, config.settings["hidden"], batch_first=True)
        self.out = nn.Linear(config.settings["hidden"], config.width)

    def forward(self, x_TD: Tensor, context: SequenceContext) -> Tensor:
        """[T, D] for [T, D] embedded events."""
        offsets = context.layout.offsets
        lengths = offsets.diff()
        # a rank's share of a batch may be empty
        longest = max(1, int(lengths.max())) if len(lengths) else 1
        padded_BND = x_TD.new_zeros(max(1, len(lengths)), longest, x_TD.shape[1])
        sequences = sequence_of(offsets)
        padded_BND[sequences, context.positions] = x_TD
        states_BNH, _ = self.state(padded_BND)
        encoded: Tensor = self.out(states_BNH[sequences, context.positions])
        return encoded

    @staticmethod
    def flops(config: PluginEncoderConfig, work: Workload) -> int:
        """Multiplications and additions of all gates and of the last layer."""
        hidden = int(config.settings["hidden"])
        return 2 * work.tokens * (3 * hidden * (config.width + hidden) + hidden * config.width)


def bpr(positive_T: Tensor, negative_TR: Tensor, margin: float = 0.0) -> Tensor:
    """Bayesian personalised ranking: the positive is to score above each negative."""
    return nn.functional.softplus(negative_TR - positive_T[:, None] + margin).mean(1)


def reciprocal_log_rank(ranks: Tensor) -> Tensor:
    """1 for the best rank, and falling slowly."""
    return 1 / (1 + torch.log(ranks.to(torch.float64)))


class Walks:
    """Users who walk through a catalogue with strides of their own; the next item can be learned."""

    def __init__(self, users: int, items: int, seed: int = 1) -> None:
        self.users, self.items, self.seed = users, items, seed

    def fingerprint(self) -> dict[str, str]:
        """Everything that the events depend on."""
        return {"walks": f"{self.users} users, {self.items} items, seed {self.seed}"}

    def batches(self) -> Iterator[pa.RecordBatch]:
        """A user at a time."""
        random = np.random.default_rng(self.seed)
        for user in range(self.users):
            steps = np.arange(random.integers(6, 21))
            items = (random.integers(self.items) + steps * (1 + user % 3)) % self.items
            columns = {"user_id": np.full(len(steps), user), "item_id": items, "timestamp": 1_600_000_000 + 60 * steps}
            yield pa.RecordBatch.from_pydict(columns)


class WeightNorm(Hook):
    """Logs the norm of the tower's weights after every epoch."""

    def __init__(self, session: Any, log: MetricsLog | None, power: float = 2.0) -> None:
        self.parameters = list(session.recommender.tower.parameters())
        self.log = log
        self.power = power

    def after_epoch(self, trainer: Trainer) -> None:
        """Takes the norm; only one rank has a log."""
        norms = torch.stack([parameter.detach().norm(self.power) for parameter in self.parameters])
        if self.log is not None:
            self.log.write(trainer.state.step, {"own/weight_norm": float(norms.norm(self.power))})
