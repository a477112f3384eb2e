"""A run assembled on one rank: data, model, optimizers, and the tensors that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hstu_dist.commands.checkpoint import VOCABULARY
from hstu_dist.config import RunConfig
from hstu_dist.data.balance import CostLaw
from hstu_dist.data.config import BatchingConfig, LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.identity import DataIdentity
from hstu_dist.data.loader import BatchLoader, Shard, popularity
from hstu_dist.data.record_split import RecordSplit
from hstu_dist.data.split import Moments, Split
from hstu_dist.data.time_split import first_events, moments_of
from hstu_dist.distributed.config import ITEM
from hstu_dist.distributed.parallel import DenseSettings
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.ranker import Ranker
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.errors import UserError
from hstu_dist.metrics.ranking import Measures
from hstu_dist.models.config import RankingConfig, RecordSplitConfig, RetrievalConfig, TaskConfig
from hstu_dist.models.flops import Workload, count_flops, encoder_work
from hstu_dist.preflight import memory_limit, table_shapes
from hstu_dist.train.average import WeightAverage
from hstu_dist.train.evaluate import evaluate, evaluate_popularity, measures_of
from hstu_dist.train.evaluate_targets import CountedTargets, evaluate_target_popularity, evaluate_targets
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.retrieval import RetrievalObjective
from hstu_dist.train.step import Objective


@dataclass(frozen=True)
class ModelSession:
    """The model of a run, whatever it trains on; of a retrieval run, unless a subclass says otherwise.

    Attributes:
        config: the run.
        world: this rank among the others.
        recommender: the model.
        optimizers: of its tower and table.
        average: of its weights; None: none is configured.
    """

    config: RunConfig
    world: World
    recommender: Recommender | Ranker
    optimizers: Optimizers
    average: WeightAverage | None = None

    @property
    def shard(self) -> Shard:
        """This rank's share of every global batch."""
        return Shard(rank=self.world.rank, world_size=self.world.size)

    def objective(self) -> Objective:
        """What a step minimises."""
        _, loss = self.config.retrieval
        return RetrievalObjective(self.retriever, loss, self.config.seed)

    @property
    def num_items(self) -> int:
        """Rows of the item table."""
        return self.recommender.tables.specs[ITEM].shape.num_rows

    @property
    def dense_parameters(self) -> int:
        """Trained numbers of the tower."""
        return sum(parameter.numel() for parameter in self.recommender.tower.parameters())

    @property
    def retriever(self) -> Recommender:
        """The model of a retrieval run."""
        assert isinstance(self.recommender, Recommender)
        return self.recommender

    def workload(self, lengths: Sequence[int]) -> Workload:
        """Work of sequences of so many inputs."""
        model, _ = self.config.retrieval
        return encoder_work(model, lengths)

    def training_flops(self, work: Workload) -> int:
        """FLOPs that training on a batch needs: forward and backward of the tower and the loss."""
        model, loss = self.config.retrieval
        return count_flops(model, work, loss.scores_per_token(self.num_items)).training

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model's weights are those to be used: their average where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def average_replicas(self) -> None:
        """Makes all sets of tables, their state and their averages alike, where groups of ranks hold one each."""
        # vocabularies are one for all; to hand them out would also make them derive anew what they know
        self.recommender.tables.group.average(self._learnt())

    def saved_tensors(self) -> dict[str, Any]:
        """As `tensors`, after `average_replicas`: what a checkpoint is made of."""
        self.average_replicas()
        return self.tensors()

    def tensors(self) -> dict[str, Any]:
        """Every tensor of the run, plain or sharded, under one flat name each; views, not copies."""
        vocabularies = self.recommender.tables.vocabulary_tensors()
        return self._learnt() | {f"{VOCABULARY}{name}": value for name, value in vocabularies.items()}

    def _learnt(self) -> dict[str, Any]:
        flat = _weights(self.recommender)
        if self.average is not None:
            flat |= {f"average.{name}": value for name, value in self.average.averages.items()}
        flat |= {f"optimizer.{name}": value for name, value in self.optimizers.state_tensors().items()}
        table_state = self.recommender.tables.optimizer.state_tensors()
        return flat | {f"table_optimizer.{name}": value for name, value in table_state.items()}


@dataclass(frozen=True)
class Session(ModelSession):
    """What training and evaluation on a prepared data set share.

    Attributes:
        dataset: what it trains on.
        moments: where a split by time cuts; None: leave-one-out.
    """

    dataset: SequenceDataset = field(kw_only=True)
    moments: Moments | None = field(kw_only=True, default=None)

    @property
    def num_items(self) -> int:
        """Rows of the item table: one for each item of the data set, unless a vocabulary has a number of its own."""
        return self.config.embedding.vocabulary.rows or self.dataset.num_items

    @classmethod
    def build(cls, config: RunConfig, world: World) -> Self:
        """Opens the data and builds the model, the same at any world size for a seed.

        Raises:
            UserError: a split by time or of records leaves nothing to train on or nothing to predict.
        """
        dataset = SequenceDataset.open(config.prepared.path)
        moments = retrieval_moments(dataset, config.task)
        if config.record_split is not None:
            _check_records(dataset, config.record_split)
        return cls(**vars(build_model(config, world, dataset.num_items)), dataset=dataset, moments=moments)

    def data_identity(self, known: DataIdentity | None) -> DataIdentity:
        """Which data this is, for whoever goes on with the run or uses it; `known` if that says so already."""
        if known is not None and known.files == self.dataset.manifest.files:
            return known
        task, folder = self.config.task, Path(self.config.prepared.path)
        features = task.contextual if isinstance(task, RankingConfig) else ()
        return DataIdentity.of(folder, self.dataset.manifest, features)

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
        trainer, data = self.config.trainer, self.config.prepared
        return LoaderConfig(
            split=split,
            global_batch_size=trainer.global_batch_size if training else trainer.evaluation.batch_size,
            max_length=data.max_length,
            window=data.window if training else "recent",
            seed=self.config.seed,
            shuffle=training and not (self.records and self.records.in_order),
            batching=trainer.batching if training else BatchingConfig(),
            cost=sequence_cost(lambda n: self.training_flops(self.workload([n])), data.max_length),
            stochastic_length=data.stochastic_length if training else None,
            emission=trainer.emission if training else None,
            cut=self.cut,
        )

    @property
    def cut(self) -> Moments | RecordSplit | None:
        """Where the split cuts; None: leave-one-out."""
        return self.config.record_split or self.moments

    @property
    def records(self) -> RecordSplitConfig | None:
        """How whole sequences are trained on and evaluated; None: the run does not split them."""
        task = self.config.task
        return task.records if isinstance(task, RetrievalConfig) and task.split == "record" else None

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the current weights on a split, or of their average where there is one."""
        batches, measures = self.loader(split).epoch(0), measures_of(self.config.trainer.evaluation)
        with self.averaged():
            if self.records is None:
                return evaluate(self.retriever, batches, measures)
            _, loss = self.config.retrieval
            return evaluate_targets(self.retriever, batches, self._counted(measures, loss.temperature))

    def evaluate_popularity(self, split: Split) -> dict[str, float]:
        """Metrics of the popularity baseline on a split."""
        batches, measures = self.loader(split).epoch(0), measures_of(self.config.trainer.evaluation)
        counts = popularity(self.dataset, self.training_split, self.cut).to(self.world.device)
        if self.records is None:
            return evaluate_popularity(counts, batches, measures)
        return evaluate_target_popularity(counts, batches, self._counted(measures, 1.0))

    def _counted(self, measures: Measures, temperature: float) -> CountedTargets:
        assert self.records is not None
        return CountedTargets(measures, temperature, self.records.scored)


def retrieval_moments(dataset: SequenceDataset, task: TaskConfig) -> Moments | None:
    """Where a retrieval run's split by time cuts; None: it leaves one out.

    Raises:
        UserError: a part has no sequence with something to predict.
    """
    if not isinstance(task, RetrievalConfig) or task.split != "time":
        return None
    moments = moments_of(dataset, task.validation_share, task.test_share)
    for split in (Split.TRAIN, Split.VALIDATION, Split.TEST):
        if first_events(dataset, moments, split).max(initial=0) < 2:
            raise UserError(
                f"data set {dataset.manifest.name}: its {split} part by time has nothing to predict, "
                "expected a user with an event before it" + ("" if split is Split.TRAIN else " and one in it"),
                "change task.validation_share and task.test_share, or use task.split=leave_one_out",
            )
    return moments


def _check_records(dataset: SequenceDataset, cut: RecordSplit) -> None:
    for split in (Split.TRAIN, Split.VALIDATION, Split.TEST):
        if cut.parts(dataset.lengths, split).max(initial=0) < 2:
            raise UserError(
                f"data set {dataset.manifest.name}: its {split} part has no record of two events to learn or predict",
                "change task.records, task.validation_share and task.test_share, or use longer records",
            )


def build_model(config: RunConfig, world: World, num_items: int) -> ModelSession:
    """A retrieval model with a table of `num_items` rows, the same at any world size for a seed."""
    model, _ = config.retrieval
    tables, dense = open_tables(config, num_items, world), dense_settings(config)
    recommender = Recommender(tables, model, world.device, config.seed, dense)
    optimizers = Optimizers(recommender.tower, recommender.tables.optimizer, config.optimizer)
    return ModelSession(config, world, recommender, optimizers, average_of(recommender, config.optimizer.average_decay))


def open_tables(config: RunConfig, num_items: int, world: World) -> EmbeddingTables:
    """The tables that a run's model looks up, sharded over the ranks."""
    shapes = table_shapes(config, num_items)
    return build_tables(config.embedding, shapes, world.device, config.seed, memory_limit(config))


def dense_settings(config: RunConfig) -> DenseSettings:
    """How a run's tower is shared and computed."""
    return DenseSettings(parallel=config.trainer.parallel, precision=config.trainer.precision)


def average_of(recommender: Recommender | Ranker, decay: float | None) -> WeightAverage | None:
    """The moving average of a model's weights; None: there is no decay."""
    return None if decay is None else WeightAverage(_weights(recommender), decay)


def _weights(recommender: Recommender | Ranker) -> dict[str, Any]:
    """Weights of tower and table under the names that checkpoints use."""
    flat: dict[str, Any] = {f"tower.{name}": value for name, value in recommender.tower.state_dict().items()}
    return flat | {f"table.{name}": value for name, value in recommender.tables.weights().items()}


def sequence_cost(flops: Callable[[int], int], longest: int) -> CostLaw:
    """The law a·n + b·n² through the FLOPs of a sequence of the longest length and of half of it."""
    half = max(1, longest // 2)
    whole = 2 * half
    quadratic = (flops(whole) / whole - flops(half) / half) / half
    return CostLaw(linear=flops(half) / half - quadratic * half, quadratic=quadratic)
