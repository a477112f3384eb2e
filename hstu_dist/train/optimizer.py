"""AdamW for the dense part and one learning-rate schedule for dense part and tables."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hstu_dist.distributed.table_optimizer import TableOptimizer
from hstu_dist.errors import UserError
from hstu_dist.train.config import OptimizerConfig, ScheduleConfig


def schedule_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning-rate factor of optimizer step `step`, counted from 0.

    Args:
        config: shape.
        step: steps already taken.
        total_steps: steps of the whole run.

    Returns:
        A factor in [0, 1].
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    # the last step of the run has progress 1
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final_factor + (1 - config.final_factor) * remaining


class Optimizers:
    """Steps the dense part; the table steps inside its backward and only hears from here that a step begins."""

    def __init__(self, dense: nn.Module, table: TableOptimizer, config: OptimizerConfig) -> None:
        self.config = config
        self.names = {parameter: name for name, parameter in dense.named_parameters()}
        self.dense = torch.optim.AdamW(
            list(self.names),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.table = table

    def prepare(self, step: int, total_steps: int) -> float:
        """Sets the learning rates of a step, before its backward; returns the factor."""
        factor = schedule_factor(self.config.schedule, step, total_steps)
        for group in self.dense.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.table.prepare(factor)
        self.dense.zero_grad()
        return factor

    def step(self) -> None:
        """Clips if configured and updates the dense part.

        Raises:
            UserError: the gradient's norm, which clipping needs, is NaN or infinite.
        """
        if self.config.clip_norm is not None:
            # of the whole averaged gradient, wherever its parts are: every rank clips alike
            norm = torch.nn.utils.clip_grad_norm_(list(self.names), self.config.clip_norm)
            if isinstance(norm, DTensor):
                norm = norm.full_tensor()
            if not norm.isfinite():
                raise UserError(
                    f"the norm of the dense gradient is {float(norm)}",
                    "lower the learning rates; the last checkpoint is intact",
                )
        self.dense.step()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Moments and step counts of the dense part, `name.moment` → tensor; created if no step was taken yet."""
        tensors: dict[str, torch.Tensor] = {}
        for parameter, name in self.names.items():
            state = self.dense.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors |= {f"{name}.{key}": value for key, value in state.items()}
        return tensors
