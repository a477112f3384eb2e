"""Settings of embedding tables and their sharding; importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

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
