"""Settings of embedding tables, their sharding, and of the tower's; importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.validation import STRICT

_LANES = 4
"""fbgemm stores rows in multiples of four elements; narrower rows are padded and the padding is never read."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.05},
    "rowwise_adagrad": {"learning_rate": 0.05, "eps": 1e-8},
    "adamw": {"learning_rate": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0},
    "rowwise_adamw": {"learning_rate": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0},
}
"""What each kind uses; any other setting must stay null."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TableOptimizerConfig:
    """How the rows that a step looked up are updated; all other rows, and their state, stay as they are.

    Null stands for the kind's default, and for settings that the kind does not have.

    Attributes:
        kind: sgd keeps no state; rowwise_adagrad one accumulator a row; adamw two moments an element;
            rowwise_adamw the first moment and, for the second, one mean of squares a row.
        learning_rate: step size, scaled by the schedule of the dense optimizer; 0.05, for the AdamWs 1e-3.
        betas: decay of the first and second moment (AdamWs); (0.9, 0.98).
        eps: added to the root of the second moment or accumulator (all but sgd); 1e-8.
        weight_decay: decoupled decay of a row in the steps that touch it (AdamWs); 0.
    """

    kind: Literal["sgd", "rowwise_adagrad", "adamw", "rowwise_adamw"] = "rowwise_adagrad"
    learning_rate: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] | None = None
    eps: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)

    def __post_init__(self) -> None:
        known = _DEFAULTS[self.kind]
        for name in ("learning_rate", "betas", "eps", "weight_decay"):
            value = getattr(self, name)
            if value is None:
                # a run's saved settings must not change their meaning with the defaults of a later version
                object.__setattr__(self, name, known.get(name))
            elif name not in known:
                raise ValueError(f"{name}: got {value}, expected null: {self.kind} has no {name}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers in [0, 1)")

    def state_per_row(self, width: int) -> int:
        """Floats of optimizer state that a row of `width` stored elements costs."""
        return {"sgd": 0, "rowwise_adagrad": 1, "adamw": 2 * width, "rowwise_adamw": width + 1}[self.kind]


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
        stored = stored_width(width)
        return rows * 4 * (stored + self.optimizer.state_per_row(stored))


def stored_width(width: int) -> int:
    """Elements that a row of `width` takes in the table, on every device alike: checkpoints move between them."""
    return -(-width // _LANES) * _LANES


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    """How the ranks share the tower and the state of its optimizer; tables have a sharding of their own.

    Attributes:
        kind: ddp keeps a copy on every rank; fsdp splits every tensor over all ranks (FSDP2); hsdp splits it over the
            ranks of a group and keeps a copy in each group (hybrid FSDP2).
        shard_ranks: neighbouring ranks of a group, usually those of one machine; of hsdp only, null for the others.
    """

    kind: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_ranks: int | None = Field(default=None, gt=1)

    def __post_init__(self) -> None:
        if (self.kind == "hsdp") != (self.shard_ranks is not None):
            expected = "the ranks of a group, of hsdp" if self.kind == "hsdp" else f"null: {self.kind} has no groups"
            raise ValueError(f"shard_ranks: got {self.shard_ranks}, expected {expected}")

    def check(self, world_size: int) -> None:
        """Whether so many ranks can be arranged that way.

        Raises:
            UserError: they cannot.
        """
        if self.kind == "ddp":
            return
        if world_size == 1:
            raise UserError(
                f"trainer.parallel.kind: got {self.kind} on 1 rank, which has nothing to share",
                "use trainer.parallel.kind=ddp or more ranks",
            )
        group = self.shard_ranks
        if group is not None and (world_size % group or world_size == group):
            raise UserError(
                f"trainer.parallel.shard_ranks: got {group}, expected a divisor of the {world_size} ranks, and smaller",
                "use one, such as the ranks of a machine, or trainer.parallel.kind=fsdp",
            )
