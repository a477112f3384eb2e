"""A ranking run assembled on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hstu_dist.actions import WORD_BITS, action_fields
from hstu_dist.commands.ranking_model import ranking_parts, ranking_shape
from hstu_dist.commands.session import Session, average_of, dense_settings, open_tables
from hstu_dist.config import RunConfig
from hstu_dist.data.config import DataSetConfig, prepare_command
from hstu_dist.data.contextual import contextual_features
from hstu_dist.data.dataset import Ints, SequenceDataset
from hstu_dist.data.loader import BatchLoader
from hstu_dist.data.split import Moments, Split
from hstu_dist.data.time_split import moments_of, own_action_rows
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.ranker import Ranker
from hstu_dist.errors import UserError
from hstu_dist.losses.multi_task import head_fields
from hstu_dist.models.flops import Workload
from hstu_dist.models.ranking_flops import count_ranking_flops, ranking_work
from hstu_dist.models.ranking_shape import RankingShape
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.ranking import (
    HeadSet,
    RankingObjective,
    evaluate_item_averages,
    evaluate_ranking,
    item_averages,
)
from hstu_dist.train.step import Objective


@dataclass(frozen=True, kw_only=True)
class RankingSession(Session):
    """What training and evaluation of a ranking model share.

    Attributes:
        ranker: the model; the same object as `recommender`.
        heads: what it predicts, and from which part of the action.
        moments: where time is cut.
        contextual: [S, C] int64, codes of every user's contextual features.
    """

    ranker: Ranker
    heads: HeadSet
    moments: Moments
    contextual: Ints

    @classmethod
    def build(cls, config: RunConfig, world: World) -> RankingSession:
        """Opens the data, checks that its labels can be learned, and builds the model.

        Raises:
            UserError: a label is out of range, or a part of the data has labels of one class only.
        """
        task, loss = ranking_parts(config)
        dataset = SequenceDataset.open(config.data.path)
        fields = action_fields(dataset.manifest.action_fields)
        heads = HeadSet(loss.heads, head_fields(loss.heads, fields))
        moments = moments_of(dataset, task.validation_share, task.test_share)
        check_labels(dataset, heads, moments, config.prepared)
        features = contextual_features(config.data.path, dataset.manifest, task.contextual)
        shape = ranking_shape(config, dataset.num_items, fields, features.sizes)
        check_actions(dataset, shape)
        tables = open_tables(config, dataset.num_items, world)
        ranker = Ranker(tables, config.model, shape, world.device, config.seed, dense_settings(config))
        return cls(
            config=config,
            world=world,
            dataset=dataset,
            recommender=ranker,
            optimizers=Optimizers(ranker.tower, tables.optimizer, config.optimizer),
            average=average_of(ranker, config.optimizer.average_decay),
            ranker=ranker,
            heads=heads,
            moments=moments,
            contextual=features.codes,
        )

    def objective(self) -> Objective:
        """What a step minimises."""
        return RankingObjective(self.ranker, self.heads, self.config.seed)

    def loader(self, split: Split) -> BatchLoader:
        """This rank's batches of a split by time."""
        settings = replace(self.loader_config(split), targets="own")
        return BatchLoader(self.dataset, settings, self.shard, self.contextual)

    def workload(self, lengths: Sequence[int]) -> Workload:
        """Work of sequences of so many events."""
        return ranking_work(self.config.model, lengths, len(self.ranker.shape.contextual))

    def training_flops(self, work: Workload) -> int:
        """FLOPs that training on a batch needs: forward and backward of the tower and its heads."""
        return count_ranking_flops(self.config.model, self.ranker.shape, work).training

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the current weights on a split, or of their average where there is one."""
        with self.averaged():
            batches = self.loader(split).epoch(0)
            return evaluate_ranking(self.ranker, batches, self.heads, self.moments.before(split))

    def evaluate_popularity(self, split: Split) -> dict[str, float]:
        """Metrics of predicting each item's average over all training events."""
        until = self.moments.until(self.training_split)
        assert until is not None
        trained = self.dataset.timestamps <= until
        labels_EK = self.heads.labels(torch.from_numpy(self.dataset.actions[trained]))
        items = torch.from_numpy(self.dataset.item_ids[trained])
        averages_VK = item_averages(items, labels_EK, self.heads.configs, self.dataset.num_items)
        batches, device = self.loader(split).epoch(0), self.world.device
        return evaluate_item_averages(averages_VK.to(device), batches, self.heads, self.moments.before(split))


def check_labels(dataset: SequenceDataset, heads: HeadSet, moments: Moments, config: DataSetConfig) -> None:
    """Whether the heads can be trained and measured on every part of a split by time.

    Events that no part scores, because a user has more than `max_length` of them, do not count.

    Args:
        dataset: the data.
        heads: what is predicted.
        moments: where time is cut.
        config: settings of the data.

    Raises:
        UserError: no action was recorded, a part has no events, or labels of one class (of one value) only.
    """
    where = dataset.manifest.name
    if not dataset.actions.any():
        raise UserError(
            f"data set {where}: every action is 0, so there is nothing to rank by",
            f"prepare it with a column of actions: `{prepare_command(config)} data.action_column=NAME`",
        )
    for part, events in _parts(dataset, moments, config.max_length):
        labels_EK = heads.labels(torch.from_numpy(dataset.actions[events])).numpy()
        for index, head in enumerate(heads.configs):
            values = np.unique(labels_EK[:, index])
            if len(values) == 2 or (head.kind == "regression" and len(values) > 2):
                continue
            found = "no event" if not len(values) else f"only labels {values[0]:g}"
            measure = "NE and AUC are" if head.kind == "binary" else "R² is"
            raise UserError(
                f"head {head.name}: got {found} in the {part} part of {where} ({events.sum()} events), "
                f"expected different ones: {measure} undefined",
                "change its threshold or column, or task.validation_share and task.test_share",
            )


def _parts(dataset: SequenceDataset, moments: Moments, max_length: int) -> Iterator[tuple[str, np.ndarray]]:
    times = dataset.timestamps
    yield "training", times <= moments.train_until
    for part, split in (("validation", Split.VALIDATION), ("test", Split.TEST)):
        rows = own_action_rows(dataset, moments, split, max_length)
        first = dataset.offsets[rows.sequences] + rows.starts
        changes = np.zeros(len(times) + 1, dtype=np.int8)
        # an end may be another one's start
        np.add.at(changes, first, 1)
        np.add.at(changes, first + rows.lengths, -1)
        yield part, (np.cumsum(changes[:-1], dtype=np.int8) > 0) & (times > moments.before(split))


def check_actions(dataset: SequenceDataset, shape: RankingShape) -> None:
    """Whether the model has a row for every action.

    Raises:
        UserError: the action is one plain number, and larger than the rows it may have.
    """
    largest = int(dataset.actions.max(initial=0))
    for field, rows in shape.actions:
        if field.bits == WORD_BITS and largest >= rows:
            raise UserError(
                f"data set {dataset.manifest.name}: got action {largest}, expected actions in [0, {rows}) "
                "(task.action_levels)",
                "set task.action_levels above it, or prepare the column with data.action_columns={NAME: BITS}",
            )
