"""Job: what a step of a run needs, as numbers of sequences, tokens and ids a rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hstu_dist.distributed.arrangement import check_arrangement
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, ParallelConfig, TableShape, TableSpec, stored_width
from hstu_dist.errors import UserError
from hstu_dist.losses.config import FullSoftmaxConfig, SampledSoftmaxConfig
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.flops import FlopCount, count_flops, encoder_work

_FLOAT, _ID = 4, 8

DRAWS_OF_EVERYTHING = 8
"""As in `train.step`: from so many draws per item on, a step looks up the whole table."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as a plan sees it.

    Attributes:
        model, loss, embedding: settings of the run.
        num_items: rows of the item table.
        global_batch_size: sequences of a step, over all ranks.
        mean_length: tokens of every sequence.
        parallel, micro_batches: as of the trainer.
        averaged: a moving average of all weights is kept.
    """

    model: HSTUConfig | TransformerConfig
    loss: SampledSoftmaxConfig | FullSoftmaxConfig
    embedding: EmbeddingConfig
    num_items: int
    global_batch_size: int
    mean_length: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batches: int = 1
    averaged: bool = False

    @property
    def negatives(self) -> int:
        """Negatives of a position; 0 where all items are scored."""
        return self.loss.num_negatives if isinstance(self.loss, SampledSoftmaxConfig) else 0

    @property
    def stored_width(self) -> int:
        """Elements of a table row, padding included."""
        return stored_width(self.model.width)

    @property
    def tables(self) -> dict[str, TableSpec]:
        """The item table, and further tables whose rows the settings name."""
        shapes = {ITEM: TableShape(self.num_items, self.model.width)}
        for name, table in self.embedding.tables.items():
            if table.rows is not None:
                shapes[name] = TableShape(table.rows, table.width or self.model.width)
        specs = self.embedding.specs(shapes)
        return {name: replace(spec, averaged=self.averaged) for name, spec in specs.items()}

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.global_batch_size * self.mean_length

    def sequences_of(self, ranks: int) -> int:
        """Sequences of the fullest rank."""
        return -(-self.global_batch_size // ranks)

    def can_be_arranged(self, ranks: int) -> bool:
        """Whether a launch on so many ranks would take it."""
        try:
            check_arrangement(self.parallel, self.embedding, self.micro_batches, self.global_batch_size, ranks)
        except UserError:
            return False
        return True

    def table_ranks(self, ranks: int) -> int:
        """Ranks that hold one set of tables."""
        return max(1, ranks // self.embedding.replicas)

    def part_tokens_of(self, ranks: int) -> int:
        """Tokens of a part of a step that the fullest rank computes at a time."""
        return -(-self.tokens_of(ranks) // self.micro_batches)

    def tokens_of(self, ranks: int) -> int:
        """Tokens of the fullest rank."""
        return self.sequences_of(ranks) * self.mean_length

    def ids_of(self, ranks: int) -> int:
        """Most distinct ids that a rank can look up: as if no item, target or negative came twice.

        How many do come twice depends on the data; with billions of rows, negatives hardly ever do.
        """
        everything = not self.negatives or self.tokens * self.negatives >= DRAWS_OF_EVERYTHING * self.num_items
        if everything:
            return self.num_items
        return min(self.num_items, self.tokens_of(ranks) * (2 + self.negatives))

    def answered_bytes(self, ranks: int, passes: int) -> int:
        """Ids and rows of the item table that the busiest rank exchanges for others' look-ups and its own.

        Args:
            ranks: how many there are.
            passes: how often a row travels, as float32: once, and once more as its gradient.
        """
        ids, row = self.ids_of(ranks), passes * self.stored_width * _FLOAT
        match self.embedding.sharding:
            case "data_parallel":
                return 0
            case "table_wise":
                return self.table_ranks(ranks) * ids * (_ID + row)
            case "column_wise":
                return ids * (self.table_ranks(ranks) * _ID + row)
        # its own share, if rows are spread evenly
        return ids * (_ID + row)

    def copied_gradient_bytes(self) -> int:
        """Of copies of the item table, whose gradients and counts of look-ups are added up over the ranks; else 0."""
        copied = self.embedding.sharding == "data_parallel"
        return self.num_items * (self.stored_width + 1) * _FLOAT if copied else 0

    def flops(self, sequences: int) -> FlopCount:
        """FLOPs of a forward pass over so many sequences."""
        work = encoder_work(self.model, [self.mean_length] * sequences)
        return count_flops(self.model, work, self.loss.scores_per_token(self.num_items))
