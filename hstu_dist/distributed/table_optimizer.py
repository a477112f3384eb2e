"""The optimizer of a sharded table: one configuration, updated by our kernel on the CPU and by fbgemm's on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingCollection
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.optim import SGD, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from hstu_dist.distributed.config import TableOptimizerConfig
from hstu_dist.distributed.row_update import row_rule
from hstu_dist.distributed.table_kernel import RowSharder

_FBGEMM: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "adamw": Adam,
    "rowwise_adamw": PartialRowWiseAdam,
}


def sharder_of(
    collection: EmbeddingCollection, config: TableOptimizerConfig, width: int, device: torch.device
) -> EmbeddingCollectionSharder:
    """What makes TorchRec shard `collection` with this optimizer inside the backward.

    Args:
        collection: the tables, not sharded yet.
        config: the optimizer.
        width: elements of a row without padding.
        device: where the rows will live.
    """
    if device.type == "cpu":
        return RowSharder(row_rule(config, width))
    apply_optimizer_in_backward(_FBGEMM[config.kind], collection.parameters(), fbgemm_arguments(config))
    return EmbeddingCollectionSharder()


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
    """Tells the kernels of a sharded table what step comes next, and shows the state that a checkpoint needs."""

    def __init__(self, config: TableOptimizerConfig, fused: CombinedOptimizer) -> None:
        assert config.learning_rate is not None
        self.learning_rate = config.learning_rate
        self.fused = fused
        self._counts_steps = config.betas is not None
        # steps taken, on every rank alike, also where no row lives; a tensor, because checkpoints fill it in place
        self.step = torch.zeros((), dtype=torch.int64)

    def prepare(self, factor: float) -> None:
        """Begins a step; one lookup with a backward may follow, which updates its rows.

        Args:
            factor: of the learning rate.
        """
        self.step += 1
        for optimizer in kernel_optimizers(self.fused):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * factor
            # a fused optimizer's step only hands its learning rate to the kernel
            optimizer.step()
            _set_step(optimizer, int(self.step))

    def take_back(self) -> None:
        """Ends a step without a backward: the next one has its number."""
        self.step -= 1

    def state_tensors(self) -> dict[str, Any]:
        """State of all rows, sharded like the table, and the number of steps where the update depends on it."""
        tensors: dict[str, Any] = {}
        if self._counts_steps:
            tensors["step"] = self.step
        for weight, state in self.fused.state_dict()["state"].items():
            tensors |= {f"{weight}.{name}": value for name, value in state.items()}
        return tensors


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
