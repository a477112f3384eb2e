"""Where a run is: what a checkpoint stores besides tensors, the same on every rank and at any world size."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Position and history of a run.

    Attributes:
        epoch: epochs finished.
        batch: global batches finished in the current epoch.
        step: optimizer steps taken, refused ones included.
        refused_steps: steps that changed nothing, because a loss or gradient was not finite.
        tokens: positions computed, over all ranks.
        attention_pairs: visible (query, key) pairs trained on, over all ranks.
        context: of these positions, those whose targets the loss left out.
        skipped_tokens: of these positions, those that truncated layers left out.
        skipped_pairs: of these pairs, those that truncated layers left out.
        best_step: step of the best validation, -1 before the first.
        best_epoch: epochs finished at the best validation.
        best_value: the monitored metric there.
        validations_since_best: for early stopping.
        stopped_early: no further epoch will run.
        best_test_epoch: epochs finished at the best tracked reading of the test split, 0 before the first; never used
            to choose anything.
        best_test: all test metrics there.
        tables: by name: rows, width and dtype, kind and settings of the optimizer; for whoever reads a checkpoint.
        train_seconds: on rank 0, over all sessions of the run and without evaluation.
        evaluation_seconds: of validation and whatever else ranks or waits during training.
        available_flops: what the devices of all ranks could have done in `train_seconds`; None once their peak was
            unknown.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    refused_steps: int = 0
    tokens: int = 0
    attention_pairs: int = 0
    context: int = 0
    skipped_tokens: int = 0
    skipped_pairs: int = 0
    best_step: int = -1
    best_epoch: int = 0
    best_value: float = float("-inf")
    validations_since_best: int = 0
    stopped_early: bool = False
    best_test_epoch: int = 0
    best_test: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict, compare=False)
    # not compared: clocks differ between runs that compute the same
    train_seconds: float = field(default=0.0, compare=False)
    evaluation_seconds: float = field(default=0.0, compare=False)
    available_flops: float | None = field(default=0.0, compare=False)

    def add_training_time(self, seconds: float, peak_flops: float | None) -> None:
        """Counts time in which devices of `peak_flops` FLOP/s together trained; None: nobody knows their peak."""
        self.train_seconds += seconds
        if self.available_flops is not None:
            self.available_flops = None if peak_flops is None else self.available_flops + seconds * peak_flops

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["best_value"] = self.best_value if self.best_step >= 0 else None
        return values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for key, value in values.items():
            setattr(self, key, float("-inf") if key == "best_value" and value is None else value)
