"""Optimizers of tables: one configuration, updated by our kernel on the CPU and by fbgemm's on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.optim import SGD, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from hstu_dist.distributed.config import TableOptimizerConfig, TableSpec
from hstu_dist.distributed.replicated_table import ReplicatedTable
from hstu_dist.distributed.row_update import row_rule
from hstu_dist.distributed.table_kernel import RowSharder, RowUpdate, update_in_backward

FBGEMM: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "adamw": Adam,
    "rowwise_adamw": PartialRowWiseAdam,
}
"""The optimizers by which TorchRec asks fbgemm for its own."""


def row_update(spec: TableSpec) -> RowUpdate:
    """What our kernels do with the rows of a table."""
    assert spec.optimizer.learning_rate is not None
    return RowUpdate(row_rule(spec.optimizer, spec.shape.width), spec.optimizer.learning_rate)


def sharder_of(parameters: Mapping[str, tuple[nn.Parameter, TableSpec]], kernel: str) -> EmbeddingCollectionSharder:
    """What makes TorchRec shard tables whose optimizers run inside the backward.

    Args:
        parameters: of the collections' tables, not sharded yet, by table; they are marked with their optimizers.
        kernel: `ours`, for the CPU, or `fbgemm`.
    """
    for parameter, spec in parameters.values():
        if kernel == "ours":
            update_in_backward(parameter, row_update(spec))
        else:
            settings = spec.optimizer
            apply_optimizer_in_backward(FBGEMM[settings.kind], [parameter], fbgemm_arguments(settings))
    return RowSharder() if kernel == "ours" else EmbeddingCollectionSharder()


def fbgemm_arguments(config: TableOptimizerConfig) -> dict[str, float]:
    """A configuration in fbgemm's words.

    The meaning is the same but for one thing: fbgemm takes the mean of squares of the row-wise optimizers over the
    stored width, so a width that is no multiple of four counts its padding.
    """
    arguments = {"lr": config.learning_rate, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.betas is not None:
        arguments["beta1"], arguments["beta2"] = config.betas
    return {name: value for name, value in arguments.items() if value is not None}


class TableOptimizer:
    """Tells the kernels of all tables what step comes next, and shows the state that a checkpoint needs.

    Attributes:
        step: steps taken, on every rank alike, also where no row lives; a tensor, because checkpoints fill it in place.
    """

    def __init__(
        self, specs: Mapping[str, TableSpec], fused: KeyedOptimizer | None, replicated: Mapping[str, ReplicatedTable]
    ) -> None:
        """Takes the optimizers of sharded tables as TorchRec combines them, if there are any, and the copied tables."""
        self.kernels = [] if fused is None else list(kernel_optimizers(fused))
        self.replicated = replicated
        self.step = torch.zeros((), dtype=torch.int64)
        self._counts_steps = any(spec.optimizer.betas is not None for spec in specs.values())
        self._rates = [(group, group["lr"]) for kernel in self.kernels for group in kernel.param_groups]

    def prepare(self, factor: float) -> None:
        """Begins a step; one lookup with a backward may follow, which updates its rows.

        Args:
            factor: of the learning rates.
        """
        self.step += 1
        for group, rate in self._rates:
            group["lr"] = rate * factor
        for kernel in self.kernels:
            # a fused optimizer's step only hands its learning rate to the kernel
            kernel.step()
            _set_step(kernel, int(self.step))
        for table in self.replicated.values():
            table.prepare(factor, int(self.step))

    def state_tensors(self) -> dict[str, Any]:
        """State of all rows, laid out like the tables, and the number of steps where an update depends on it.

        Returns:
            `collection.embeddings.<table>.weight.<table>.<state>` → tensor, whatever the width of the table.
        """
        tensors: dict[str, Any] = {}
        if self._counts_steps:
            tensors["step"] = self.step
        for kernel in self.kernels:
            for state in kernel.state_dict()["state"].values():
                tensors |= {_state_name(name): value for name, value in state.items()}
        for table, held in self.replicated.items():
            tensors |= {_state_name(f"{table}.{name}"): value for name, value in held.rows.state.items()}
        return tensors


def _state_name(name: str) -> str:
    table = name.partition(".")[0]
    return f"collection.embeddings.{table}.weight.{name}"


def kernel_optimizers(optimizer: KeyedOptimizer) -> Iterator[KeyedOptimizer]:
    """The optimizer of each kernel of this rank; TorchRec nests them by module."""
    if not isinstance(optimizer, CombinedOptimizer):
        yield optimizer
        return
    for _, inner in optimizer.optimizers:
        yield from kernel_optimizers(inner)


def _set_step(optimizer: KeyedOptimizer, step: int) -> None:
    if not isinstance(optimizer, EmbeddingFusedOptimizer):
        optimizer.set_optimizer_step(step)
        return
    # fbgemm counts lookups, those of an evaluation too, and adds one before it uses the count
    for count in (optimizer._emb_module.iter, optimizer._emb_module.iter_cpu):
        assert isinstance(count, Tensor)
        count.fill_(step - 1)
