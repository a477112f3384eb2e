"""Settings of embedding tables, their sharding, and of the tower's; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.validation import STRICT

ITEM = "item"
"""Name of the item table."""

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

_CACHE_LOAD_FACTOR = 0.2
"""fbgemm's own."""

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


_ZCH_DEFAULTS: dict[str, Any] = {"eviction": "distance_lfu", "eviction_interval": 10, "buckets": 16}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VocabularyConfig:
    """How ids become rows of a table; see docs/embedding.md.

    Null stands for the kind's default, and for settings that the kind does not have.

    Attributes:
        kind: static: ids are row numbers; hash: any id, hashed to a row that it shares with others; zch: any id, which
            gets a row of its own as long as it is met often or lately enough (zero-collision hashing, TorchRec's
            managed collision), and until then shares one with other ids that have none.
        rows: of the table; null: as many as the data names.
        eviction: whose rows new ids get (zch): lfu, of the id met least often; lru, of the one not met for the longest
            time; distance_lfu, of the one with the least look-ups per step of that time; distance_lfu.
        decay_exponent: power of that time (zch with distance_lfu); 1.
        eviction_interval: training steps between two changes of the vocabulary, for which new ids wait (zch); 10.
        buckets: parts that ids and rows are split into, an upper limit of the ranks that share the work (zch); 16.
    """

    kind: Literal["static", "hash", "zch"] = "static"
    rows: int | None = Field(default=None, gt=0)
    eviction: Literal["lfu", "lru", "distance_lfu"] | None = None
    decay_exponent: float | None = Field(default=None, gt=0)
    eviction_interval: int | None = Field(default=None, gt=0)
    buckets: int | None = Field(default=None, gt=0)

    def __post_init__(self) -> None:
        known = {**_ZCH_DEFAULTS, "decay_exponent": None} if self.kind == "zch" else {}
        if (self.eviction or known.get("eviction")) == "distance_lfu":
            known["decay_exponent"] = 1.0
        for name in ("eviction", "decay_exponent", "eviction_interval", "buckets"):
            value = getattr(self, name)
            if value is None:
                # a run's saved settings must not change their meaning with the defaults of a later version
                object.__setattr__(self, name, known.get(name))
            elif known.get(name) is None:
                owner = self.eviction if name == "decay_exponent" and self.kind == "zch" else self.kind
                raise ValueError(f"vocabulary.{name}: got {value}, expected null: {owner} has no {name}")
        if self.kind == "static" and self.rows is not None:
            raise ValueError(f"vocabulary.rows: got {self.rows}, expected null: static rows follow from the data")
        if self.kind == "zch" and self.rows is not None:
            self.check_rows(self.rows)

    def check_rows(self, rows: int) -> None:
        """Whether a table has rows enough for every bucket.

        Raises:
            ValueError: it has not.
        """
        if self.buckets is not None and rows < 2 * self.buckets:
            raise ValueError(
                f"vocabulary.buckets: got {self.buckets}, expected at most half of the table's {rows} rows: "
                "each has one that ids without a row share"
            )

    @property
    def bytes_per_row(self) -> int:
        """Memory for ids and what eviction goes by, index included, shared by all ranks."""
        if self.kind != "zch":
            return 0
        remembered = 2 if self.eviction == "distance_lfu" else 1
        waiting = 3 if self.eviction_interval != 1 else 0
        return 8 * (1 + remembered + waiting + 2)

    @property
    def bytes_per_row_everywhere(self) -> int:
        """Memory of every rank on top: which rows are taken, as a mask and as numbers."""
        return 5 if self.kind == "zch" else 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TableConfig:
    """One table: where its rows live, what they are stored as and how they begin.

    Attributes:
        sharding: row_wise splits the rows over the ranks; table_wise keeps the table whole on one rank; column_wise
            splits every row, for optimizers that treat elements alone; data_parallel keeps a copy on every rank, for
            small tables; planner leaves the choice to TorchRec's planner.
        compute_kernel: memory that rows and their state live in: fused the device's; fused_uvm the host's;
            fused_uvm_caching the host's behind a cache on the device; key_value an SSD's, for plans only: checkpoints
            cannot hold its rows. All but fused need CUDA.
        cache_load_factor: share of the rows that the cache of fused_uvm_caching holds; null: 0.2, or no cache.
        dtype: of the stored rows; state and arithmetic are fp32, and updates of shorter rows are rounded at random, so
            that they do not vanish. bf16 needs CUDA.
        initialiser: truncated_normal (cut at two standard deviations before scaling) or uniform.
        init_std: standard deviation of the initialisation.
        vocabulary: how ids become rows.
    """

    sharding: Literal["row_wise", "table_wise", "column_wise", "data_parallel", "planner"] = "row_wise"
    compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "key_value"] = "fused"
    cache_load_factor: float | None = Field(default=None, gt=0, lt=1)
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    initialiser: Literal["truncated_normal", "uniform"] = "truncated_normal"
    init_std: float = Field(default=0.02, gt=0)
    vocabulary: VocabularyConfig = Field(default_factory=VocabularyConfig)

    def __post_init__(self) -> None:
        if self.vocabulary.kind == "zch" and self.compute_kernel in ("fused_uvm_caching", "key_value"):
            raise ValueError(
                f"compute_kernel: got {self.compute_kernel}, expected fused or fused_uvm with vocabulary.kind=zch: "
                "rows of evicted ids are reset in place, not behind a cache"
            )
        caches = self.compute_kernel == "fused_uvm_caching"
        if caches and self.cache_load_factor is None:
            object.__setattr__(self, "cache_load_factor", _CACHE_LOAD_FACTOR)
        if not caches and self.cache_load_factor is not None:
            raise ValueError(f"cache_load_factor: got {self.cache_load_factor}, expected null: {self.compute_kernel}")
        if self.sharding == "data_parallel" and self.compute_kernel != "fused":
            raise ValueError(f"compute_kernel: got {self.compute_kernel}, expected fused: every rank holds a copy")

    def needs_cuda(self) -> str | None:
        """What of this table runs on CUDA only, and why; None: nothing."""
        if self.compute_kernel != "fused":
            return f"compute_kernel: got {self.compute_kernel}, which fbgemm has for CUDA only"
        if self.dtype == "bf16":
            return "dtype: got bf16, in which fbgemm keeps rows on CUDA only"
        return None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FurtherTableConfig(TableConfig):
    """A table besides the item table.

    Attributes:
        rows: null: as many as the feature has ids; more leaves room.
        width: null: as wide as the model asks for.
        sharding: as of any table.
        optimizer: how rows are updated; null: as the item table's.
    """

    rows: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    sharding: Literal["row_wise", "table_wise", "column_wise", "data_parallel", "planner"] = "data_parallel"
    optimizer: TableOptimizerConfig | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbeddingConfig(TableConfig):
    """The item table, whose rows and width follow from data and model, and further tables.

    Attributes:
        optimizer: how rows of the item table are updated.
        replicas: groups of neighbouring ranks that each hold a full set of tables, so that look-ups stay in a group; 1:
            all ranks share one. Each group trains its tables on its own sequences. Small copied tables stay alike.
        sync_steps: steps after which the groups average rows and optimizer state; they also do so before every
            evaluation and checkpoint.
        plan: file with a plan of an earlier run (`embedding_plan.json` of its folder), used in place of `sharding`;
            null: none.
        tables: settings of further tables, by the name of the feature whose ids they hold.
    """

    optimizer: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)
    replicas: int = Field(default=1, gt=0)
    sync_steps: int = Field(default=1, gt=0)
    plan: str | None = None
    tables: dict[str, FurtherTableConfig] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if ITEM in self.tables:
            raise ValueError(f"tables.{ITEM}: got a second one, expected the item table's settings outside of tables")
        for name in self.tables:
            if not name.isidentifier():
                raise ValueError(f"tables: got {name!r}, expected a name of letters, digits and underscores")
        for name, spec in self.configured().items():
            table = "" if name == ITEM else f"tables.{name}."
            if spec.config.sharding == "column_wise" and spec.optimizer.kind.startswith("rowwise"):
                raise ValueError(
                    f"{table}sharding: got column_wise, expected another with {spec.optimizer.kind}, "
                    "whose state belongs to whole rows"
                )

    def check_replicas(self, world_size: int) -> None:
        """Whether so many ranks make up the groups.

        Raises:
            UserError: they do not.
        """
        if self.replicas > 1 and (world_size % self.replicas or world_size == self.replicas):
            raise UserError(
                f"embedding.replicas: got {self.replicas}, expected a divisor of the {world_size} ranks, and smaller",
                "use one, such as the number of machines, or sharding=data_parallel for a copy on every rank",
            )

    def configured(self) -> dict[str, TableSpec]:
        """The tables that have settings, before their sizes are known."""
        return self.specs({ITEM: _ANY, **dict.fromkeys(self.tables, _ANY)})

    def specs(self, needed: Mapping[str, TableShape]) -> dict[str, TableSpec]:
        """The tables of a run.

        Args:
            needed: by name of a table: a row for every id, and the width that the model asks for. A table without
                settings of its own is small: every rank holds a copy.

        Raises:
            ValueError: a table is to have fewer rows than there are ids, or than its vocabulary needs.
        """
        found = {}
        for name, shape in needed.items():
            config = self if name == ITEM else self.tables.get(name, FurtherTableConfig())
            rows = config.vocabulary.rows or shape.num_rows
            if shape != _ANY:
                config.vocabulary.check_rows(rows)
            if not isinstance(config, FurtherTableConfig):
                found[name] = TableSpec(TableShape(rows, shape.width), self, self.optimizer)
                continue
            rows, width = config.rows or rows, config.width or shape.width
            if rows < shape.num_rows and config.vocabulary.kind == "static":
                raise ValueError(f"tables.{name}.rows: got {rows}, expected at least {shape.num_rows} for its ids")
            found[name] = TableSpec(TableShape(rows, width), config, config.optimizer or self.optimizer)
        return found


@plain_dataclass(frozen=True)
class TableShape:
    """Rows and width of a table."""

    num_rows: int
    width: int


@plain_dataclass(frozen=True)
class TableSpec:
    """Everything about one table of a run but who holds it.

    Attributes:
        shape: rows and width.
        config: its settings.
        optimizer: of its rows; never null.
        averaged: a moving average of the rows is kept beside them.
    """

    shape: TableShape
    config: TableConfig
    optimizer: TableOptimizerConfig
    averaged: bool = False

    @property
    def stored_width(self) -> int:
        """Elements of a stored row."""
        return stored_width(self.shape.width)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint of the table depends on, as plain values."""
        shape = {"rows": self.shape.num_rows, "width": self.shape.width, "dtype": self.config.dtype}
        vocabulary = self.config.vocabulary
        named = {} if vocabulary.kind == "static" else {"vocabulary": asdict(vocabulary)}
        return {**shape, **named, "optimizer": asdict(self.optimizer)}

    def vocabulary_bytes(self, ranks: int) -> int:
        """Bytes that each of `ranks` ranks holds of the table's vocabulary: its share, and what all of them know."""
        vocabulary, rows = self.config.vocabulary, self.shape.num_rows
        return -(-rows * vocabulary.bytes_per_row // ranks) + rows * vocabulary.bytes_per_row_everywhere

    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a part of the table."""
        return rows * columns * ELEMENT_BYTES[self.config.dtype]

    def state_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the optimizer state, in fp32, of a part of the table, and of the moving average of its rows."""
        average = self.weight_bytes(rows, columns) if self.averaged else 0
        return rows * 4 * self.optimizer.state_per_row(columns) + average


_ANY = TableShape(1, 1)


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

    def ranks_of_a_copy(self, world_size: int) -> int:
        """How many ranks hold one copy of the tower together."""
        return {"ddp": 1, "fsdp": world_size, "hsdp": self.shard_ranks or 1}[self.kind]

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
