"""A run assembled on one rank: data, model, optimizers, and the tensors that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from hstu_dist.config import RunConfig
from hstu_dist.data.balance import CostLaw
from hstu_dist.data.config import BatchingConfig, LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader, Shard, popularity
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.ranker import Ranker
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.models.flops import Workload, count_flops
from hstu_dist.train.evaluate import evaluate, evaluate_popularity
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.retrieval import RetrievalObjective
from hstu_dist.train.step import Objective


@dataclass(frozen=True)
class Session:
    """What training and evaluation share; of a retrieval run, unless a subclass says otherwise."""

    config: RunConfig
    world: World
    dataset: SequenceDataset
    recommender: Recommender | Ranker
    optimizers: Optimizers

    @classmethod
    def build(cls, config: RunConfig, world: World) -> Self:
        """Opens the data and builds the model, the same at any world size for a seed."""
        dataset = SequenceDataset.open(config.data.path)
        model, _ = config.retrieval
        recommender = Recommender(dataset.num_items, model, config.embedding, world.device, config.seed)
        optimizers = Optimizers(recommender.tower, recommender.table.optimizer, config.optimizer)
        return cls(config, world, dataset, recommender, optimizers)

    @property
    def shard(self) -> Shard:
        """This rank's share of every global batch."""
        return Shard(rank=self.world.rank, world_size=self.world.size)

    @property
    def training_split(self) -> Split:
        """The events that this run trains on."""
        return Split(self.config.trainer.train_on)

    def loader(self, split: Split) -> BatchLoader:
        """This rank's batches of a split."""
        return BatchLoader(self.dataset, self.loader_config(split), self.shard)

    def loader_config(self, split: Split) -> LoaderConfig:
        """How a split is fed: shuffled for training, in order for evaluation."""
        training = split in (Split.TRAIN, Split.TRAIN_VALIDATION)
        trainer = self.config.trainer
        return LoaderConfig(
            split=split,
            global_batch_size=trainer.global_batch_size if training else trainer.evaluation.batch_size,
            max_length=self.config.data.max_length,
            seed=self.config.seed,
            shuffle=training,
            batching=trainer.batching if training else BatchingConfig(),
            cost=sequence_cost(lambda n: self.training_flops(self.workload([n])), self.config.data.max_length),
            stochastic_length=self.config.data.stochastic_length if training else None,
        )

    def objective(self) -> Objective:
        """What a step minimises."""
        _, loss = self.config.retrieval
        return RetrievalObjective(self._retriever, loss, self.config.seed)

    @property
    def _retriever(self) -> Recommender:
        assert isinstance(self.recommender, Recommender)
        return self.recommender

    def workload(self, lengths: Sequence[int]) -> Workload:
        """Work of sequences of so many inputs."""
        return Workload.causal(lengths)

    def training_flops(self, work: Workload) -> int:
        """FLOPs that training on a batch needs: forward and backward of the tower and the loss."""
        model, loss = self.config.retrieval
        return count_flops(model, work, loss.scores_per_token(self.dataset.num_items)).training

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the current weights on a split."""
        return evaluate(self._retriever, self.loader(split).epoch(0), self.config.trainer.evaluation.cutoffs)

    def evaluate_popularity(self, split: Split) -> dict[str, float]:
        """Metrics of the popularity baseline on a split."""
        counts = popularity(self.dataset, self.training_split).to(self.world.device)
        return evaluate_popularity(counts, self.loader(split).epoch(0), self.config.trainer.evaluation.cutoffs)

    def tensors(self) -> dict[str, Any]:
        """Every tensor of the run, plain or sharded, under one flat name each; views, not copies."""
        recommender, optimizers = self.recommender, self.optimizers
        flat: dict[str, Any] = {f"tower.{name}": value for name, value in recommender.tower.state_dict().items()}
        flat |= {f"table.{name}": value for name, value in recommender.table.sharded.state_dict().items()}
        flat |= {f"optimizer.{name}": value for name, value in optimizers.state_tensors().items()}
        table_state = recommender.table.optimizer.state_tensors()
        flat |= {f"table_optimizer.{name}": value for name, value in table_state.items()}
        return flat


def sequence_cost(flops: Callable[[int], int], longest: int) -> CostLaw:
    """The law a·n + b·n² through the FLOPs of a sequence of the longest length and of half of it."""
    half = max(1, longest // 2)
    whole = 2 * half
    quadratic = (flops(whole) / whole - flops(half) / half) / half
    return CostLaw(linear=flops(half) / half - quadratic * half, quadratic=quadratic)
