"""Where a run is: what a checkpoint stores besides tensors, the same on every rank and at any world size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Position and history of a run.

    Attributes:
        epoch: epochs finished.
        batch: global batches finished in the current epoch.
        step: optimizer steps taken.
        tokens: positions trained on, over all ranks.
        best_step: step of the best validation, -1 before the first.
        best_epoch: epochs finished at the best validation.
        best_value: the monitored metric there.
        validations_since_best: for early stopping.
        stopped_early: no further epoch will run.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    tokens: int = 0
    best_step: int = -1
    best_epoch: int = 0
    best_value: float = float("-inf")
    validations_since_best: int = 0
    stopped_early: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["best_value"] = self.best_value if self.best_step >= 0 else None
        return values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for key, value in values.items():
            setattr(self, key, float("-inf") if key == "best_value" and value is None else value)
