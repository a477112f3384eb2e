"""Settings of embedding tables and their sharding; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.validation import STRICT

_LANES = 4
"""fbgemm stores rows in multiples of four elements; narrower rows are padded and the padding is never read."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TableOptimizerConfig:
    """Optimizer fused into the table's backward.

    Attributes:
        kind: rowwise_adagrad keeps one accumulator a row; sgd keeps nothing.
        learning_rate: step size, scaled by the schedule of the dense optimizer.
        eps: added to the root of the accumulator (rowwise_adagrad).
    """

    kind: Literal["rowwise_adagrad", "sgd"] = "rowwise_adagrad"
    learning_rate: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)

    @property
    def state_per_row(self) -> int:
        """Floats of optimizer state that a row costs."""
        return 1 if self.kind == "rowwise_adagrad" else 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbeddingConfig:
    """The item table.

    Attributes:
        sharding: row_wise splits the rows over the ranks; table_wise keeps the table whole on one rank.
        init_std: standard deviation of the truncated normal initialisation.
        optimizer: how rows are updated.
    """

    sharding: Literal["row_wise", "table_wise"] = "row_wise"
    init_std: float = Field(default=0.02, gt=0)
    optimizer: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)

    def bytes_per_rank(self, num_rows: int, width: int, world_size: int) -> int:
        """Largest share of weights and optimizer state that one rank holds, in bytes (fp32)."""
        rows = -(-num_rows // world_size) if self.sharding == "row_wise" else num_rows
        return rows * 4 * (stored_width(width) + self.optimizer.state_per_row)


def stored_width(width: int) -> int:
    """Elements that a row of `width` takes in the table."""
    return -(-width // _LANES) * _LANES
