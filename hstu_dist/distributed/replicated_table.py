"""A table that every rank holds whole: no rows travel, their gradients are added up over the ranks.

This is an embedding under data parallelism, but for one thing: DDP's dense gradient does not tell a row that was
looked up from one that was not, and all but plain SGD must know.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu_dist.distributed.row_update import Moment, RowRule, Rows, update_rows
from hstu_dist.distributed.table_kernel import RowUpdate, look_up


class ReplicatedTable(nn.Module):
    """Rows on this rank, the same as on every other; on any device, in plain PyTorch."""

    def __init__(self, weight_RD: Tensor, update: RowUpdate, key: int) -> None:
        """Takes `weight_RD`, equal on all ranks, as the table; `key`: as of `Rows`."""
        super().__init__()
        self.rule: RowRule = update.rule
        self.learning_rate = update.learning_rate
        self.rows = Rows(weight_RD, self.rule.new_state(weight_RD), key)
        self.moment = Moment(learning_rate=0.0, step=1)
        # autograd needs an input that requires a gradient
        self._handle = torch.empty(0, device=weight_RD.device, requires_grad=True)

    def forward(self, ids_N: Tensor) -> Tensor:
        """Rows [N, D] in fp32 of ids [N] int64; the backward updates them, on all ranks together."""
        return look_up(self._handle, ids_N, self.rows, self._update)

    def prepare(self, factor: float, step: int) -> None:
        """Begins step number `step`, from 1, whose learning rate is scaled by `factor`."""
        self.moment = Moment(self.learning_rate * factor, step)

    def _update(self, rows: Rows, lookup: tuple[Tensor, Tensor]) -> None:
        if dist.get_world_size() == 1:
            update_rows(self.rule, rows, lookup, self.moment)
            return
        ids_N, gradient_ND = lookup
        count, width = rows.weight.shape
        # one column more counts the look-ups
        total = gradient_ND.new_zeros(count, width + 1)
        total.index_add_(0, ids_N, torch.cat([gradient_ND, gradient_ND.new_ones(ids_N.numel(), 1)], dim=1))
        dist.all_reduce(total)
        touched = total[:, width].nonzero().squeeze(1)
        mean = total[:, :width].index_select(0, touched).div_(dist.get_world_size())
        update_rows(self.rule, rows, (touched, mean), self.moment)
