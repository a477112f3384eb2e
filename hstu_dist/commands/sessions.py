"""The session of a run, by its task."""

from __future__ import annotations

from hstu_dist.commands.ranking_session import RankingSession
from hstu_dist.commands.session import Session
from hstu_dist.config import RunConfig
from hstu_dist.distributed.process_group import World
from hstu_dist.models.config import RankingConfig


def open_session(config: RunConfig, world: World) -> Session:
    """Opens the data of a run and builds its model, the same at any world size for a seed.

    Raises:
        UserError: the data is missing, damaged, or cannot serve the task.
    """
    kind = RankingSession if isinstance(config.task, RankingConfig) else Session
    return kind.build(config, world)
