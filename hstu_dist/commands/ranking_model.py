"""What a ranking run reads and predicts, from its settings and its data; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from hstu_dist.actions import ActionField
from hstu_dist.config import RunConfig
from hstu_dist.losses.config import MultiTaskConfig
from hstu_dist.models.config import RankingConfig
from hstu_dist.models.ranking_shape import RankingShape, embedding_rows


def ranking_parts(config: RunConfig) -> tuple[RankingConfig, MultiTaskConfig]:
    """Task and loss of a run with task=ranking."""
    assert isinstance(config.task, RankingConfig)
    assert isinstance(config.loss, MultiTaskConfig)
    return config.task, config.loss


def ranking_shape(
    config: RunConfig, num_items: int, fields: Sequence[ActionField], contextual: Sequence[int]
) -> RankingShape:
    """Of the model of a ranking run.

    Args:
        config: of the run.
        num_items: V.
        fields: of the action word.
        contextual: number of values of each contextual feature.
    """
    task, loss = ranking_parts(config)
    return RankingShape(
        num_items=num_items,
        actions=tuple((field, embedding_rows(field, task.action_levels)) for field in fields),
        contextual=tuple(contextual),
        outputs=len(loss.heads),
        head_width=task.head_width or config.model.width,
    )
