"""A run assembled on one rank: data, model, optimizers, and the tensors that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hstu_dist.config import RunConfig
from hstu_dist.data.balance import CostLaw
from hstu_dist.data.config import BatchingConfig, LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader, Shard, popularity
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.models.flops import Workload, count_flops
from hstu_dist.train.evaluate import evaluate, evaluate_popularity
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.retrieval import RetrievalObjective
from hstu_dist.train.step import Objective


@dataclass(frozen=True)
class Session:
    """What training and evaluation share."""

    config: RunConfig
    world: World
    dataset: SequenceDataset
    recommender: Recommender
    optimizers: Optimizers

    @classmethod
    def build(cls, config: RunConfig, world: World) -> Session:
        """Opens the data and builds the model, the same at any world size for a seed."""
        dataset = SequenceDataset.open(config.data.path)
        recommender = Recommender(dataset.num_items, config.model, config.embedding, world.device, config.seed)
        optimizers = Optimizers(recommender.tower, recommender.table.optimizer, config.optimizer)
        return cls(config, world, dataset, recommender, optimizers)

    @property
    def training_split(self) -> Split:
        """The events that this run trains on."""
        return Split(self.config.trainer.train_on)

    def loader(self, split: Split) -> BatchLoader:
        """This rank's batches of a split: shuffled for training, in order for evaluation."""
        training = split in (Split.TRAIN, Split.TRAIN_VALIDATION)
        trainer = self.config.trainer
        settings = LoaderConfig(
            split=split,
            global_batch_size=trainer.global_batch_size if training else trainer.evaluation.batch_size,
            max_length=self.config.data.max_length,
            seed=self.config.seed,
            shuffle=training,
            batching=trainer.batching if training else BatchingConfig(),
            cost=sequence_cost(lambda n: self.training_flops(Workload.causal([n])), self.config.data.max_length),
            stochastic_length=self.config.data.stochastic_length if training else None,
        )
        return BatchLoader(self.dataset, settings, Shard(rank=self.world.rank, world_size=self.world.size))

    def objective(self) -> Objective:
        """What a step minimises."""
        return RetrievalObjective(self.recommender, self.config.loss, self.config.seed)

    def training_flops(self, work: Workload) -> int:
        """FLOPs that training on a batch needs: forward and backward of the tower and the loss."""
        scores_per_token = self.config.loss.scores_per_token(self.dataset.num_items)
        return count_flops(self.config.model, work, scores_per_token).training

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the current weights on a split."""
        return evaluate(self.recommender, self.loader(split).epoch(0), self.config.trainer.evaluation.cutoffs)

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
