"""What data to train on and how it is fed: checked settings, no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.actions import action_fields
from hstu_dist.data.balance import CostLaw
from hstu_dist.data.record_split import RecordSplit
from hstu_dist.data.split import Moments, Split
from hstu_dist.plugins import PluginConfig
from hstu_dist.validation import STRICT

# settings that say where things are and how they are read, not what is in the data set
_NOT_CONTENT = {"kind", "path", "max_length", "window", "stochastic_length", "input", "archive", "source"}
# what the manifest says in fields of its own
_APART = {"action_columns", "user_features", "contextual_columns"}


class TimestampUnit(StrEnum):
    """Unit of an integer or floating timestamp column, counted since 1970-01-01 UTC."""

    S = "s"
    MS = "ms"
    US = "us"


class Duplicates(StrEnum):
    """What to do with events of the same user, item and timestamp: stop, keep the first, or keep all."""

    ERROR = "error"
    DROP = "drop"
    KEEP = "keep"


WindowName = Literal["recent", "random"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StochasticLengthConfig:
    """Training on random subsequences of long histories (arXiv 2402.17152, section 3.2).

    A history of n inputs is kept whole if n <= T = N^(alpha/2), and otherwise with probability T^2 / n^2; else a
    subsequence of T inputs takes its place: the model sees nothing of the events left out, so that what follows an
    input, its target and query time, is the next event that is kept. The very last event always is the last target.
    Draws are new every epoch and depend on seed, user and epoch only.

    Attributes:
        alpha: 2 keeps everything; attention of the longest histories costs of the order of N^alpha.
        max_length: N; null: the max_length of the data set.
        selection: which T inputs: the most recent ones (greedy), any (random), or weighted by recency without
            replacement (weighted): input i has weight 1 - f_i / sum f, with f_i the time from it to the last input.
    """

    alpha: float = Field(default=1.6, gt=1, le=2)
    max_length: int | None = Field(default=None, gt=0)
    selection: Literal["greedy", "random", "weighted"] = "weighted"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _SequencesConfig:
    """What every prepared data set has.

    Attributes:
        kind: of the data set.
        path: folder of the prepared data set; empty: data/<kind>.
        max_length: history tokens given to the model; older events are cut at loading, not at preparation.
        window: which inputs of a longer history training sees: recent, the last max_length as in evaluation; or random,
            any max_length that follow each other, drawn anew every epoch.
        stochastic_length: random subsequences in training; null: whole histories.
    """

    kind: str
    path: str = ""
    max_length: int = Field(default=200, gt=0)
    window: WindowName = "recent"
    stochastic_length: StochasticLengthConfig | None = None

    def __post_init__(self) -> None:
        if not self.path:
            object.__setattr__(self, "path", _default_path(self.kind))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MovieLensConfig(_SequencesConfig):
    """One of the public MovieLens rating sets; every rating is an event, its stars are the action.

    Attributes:
        kind: `ml1m` (6,040 users) or `ml100k` (943 users).
        archive: the official archive (ml-1m.zip) or its ratings file, downloaded by hand; None: fetch it.
    """

    kind: Literal["ml1m", "ml100k"]
    archive: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EventsConfig(_SequencesConfig):
    """Anyone's event log: one row an event, in CSV or Parquet.

    Attributes:
        kind: `events`.
        input: a file, a folder (searched recursively) or a glob of .csv, .tsv, .csv.gz, .tsv.gz or .parquet
            files of one format, as path or URL (s3, gs, hdfs); None: only an already prepared data set can be used.
        user_column: int64 or text ids.
        item_column: int64 or text ids.
        timestamp_column: integers, floats, or dates (UTC, whose unit comes from the column).
        action_column: integers in [0, 2^31); None: every action is 0.
        action_columns: several of them instead, name → bits that its numbers take, 31 in all; an event stores them
            packed into one number, and heads of task=ranking name them.
        user_features: a file, a folder or a glob with what is known of the users, one row each; None: nothing is.
        contextual_columns: of `user_features`, integers or text; task.contextual names them.
        timestamp_unit: unit of a numeric timestamp column; stored are whole seconds, ordered is by the full value.
        duplicates: what to do with repeated (user, item, timestamp).
        min_user_events: users with fewer events are left out.
        min_item_events: items with fewer events are left out; both limits hold in the result.
    """

    kind: Literal["events"] = "events"
    input: str | None = None
    user_column: str = Field(default="user_id", min_length=1)
    item_column: str = Field(default="item_id", min_length=1)
    timestamp_column: str = Field(default="timestamp", min_length=1)
    action_column: str | None = None
    action_columns: dict[str, int] = Field(default_factory=dict)
    user_features: str | None = None
    contextual_columns: tuple[str, ...] = ()
    timestamp_unit: TimestampUnit = TimestampUnit.S
    duplicates: Duplicates = Duplicates.ERROR
    min_user_events: int = Field(default=1, ge=1)
    min_item_events: int = Field(default=1, ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        columns = [self.user_column, self.item_column, self.timestamp_column, self.action_column]
        if len(set(columns)) != len(columns):
            raise ValueError(f"user, item, timestamp and action column: got {columns}, expected four different names")
        self._check_actions(columns)
        self._check_features()

    def _check_actions(self, columns: list[str | None]) -> None:
        if not self.action_columns:
            return
        if self.action_column is not None:
            raise ValueError(f"action_column: got {self.action_column}, expected null beside action_columns")
        action_fields(self.action_columns)
        twice = set(self.action_columns) & set(columns)
        if twice:
            raise ValueError(f"action_columns: got {', '.join(sorted(twice))}, expected columns of their own")

    def _check_features(self) -> None:
        names = self.contextual_columns
        if (self.user_features is None) != (not names):
            raise ValueError(
                f"contextual_columns: got {list(names)} with user_features {self.user_features}, expected both or none"
            )
        if len({*names, self.user_column, "user"}) != len(names) + len({self.user_column, "user"}):
            raise ValueError(f"contextual_columns: got {list(names)}, expected different names, none of them user")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AmazonConfig(_SequencesConfig):
    """A category of the Amazon reviews of 2014; every rating is an event, its stars are the action.

    Kept are users and items with at least 5 events each (5-core). A repeat of the same user, item and day counts once.

    Attributes:
        kind: `amazon_beauty`, `amazon_sports` (Sports and Outdoors) or `amazon_toys` (Toys and Games).
        source: path or URL of the category's reviews (.json, .json.gz) or ratings (.csv, .csv.gz); None: fetch the
            official 5-core reviews.
    """

    kind: Literal["amazon_beauty", "amazon_sports", "amazon_toys"]
    max_length: int = Field(default=50, gt=0)
    source: str | None = Field(default=None, min_length=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SyntheticZipfConfig(_SequencesConfig):
    """Made-up events of any number, with popular items and long histories as skewed as real ones; for benchmarks.

    Items and lengths follow densities x^-exponent, rounded down; there is nothing to learn but popularity.

    Attributes:
        kind: `synthetic_zipf`.
        num_users: sequences.
        num_items: item ids are 0 to num_items - 1; popular ones lie anywhere.
        item_exponent: of item popularity; 0: all alike.
        length_exponent: of sequence lengths.
        min_events: of the shortest sequence.
        max_events: of the longest sequence.
        seed: determines every event.
    """

    kind: Literal["synthetic_zipf"] = "synthetic_zipf"
    max_length: int = Field(default=4096, gt=0)
    num_users: int = Field(default=20_000, gt=0)
    num_items: int = Field(default=100_000, gt=0, le=2**31)
    item_exponent: float = Field(default=1.2, ge=0)
    length_exponent: float = Field(default=1.2, ge=0)
    min_events: int = Field(default=4, gt=0)
    max_events: int = Field(default=4098, gt=0)
    seed: int = Field(default=0, ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_events < self.min_events:
            raise ValueError(f"max_events: got {self.max_events}, expected at least min_events ({self.min_events})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AppendixCConfig(_SequencesConfig):
    """The made-up stream of arXiv 2402.17152, Appendix C; what the paper leaves open has a key.

    Records of equal length follow each other while new items open. A record has a few categories, a prior H_c over them
    and a concentration alpha, uniform from 1 on; its n-th event has, with probability alpha / (alpha + n - 1), a
    category from the prior, and else that of one of its earlier events, and is an open item of the category.

    Attributes:
        kind: `appendix_c`.
        num_records: sequences.
        record_length: events of each.
        num_items: item ids are 0 to num_items - 1.
        num_categories: each item has one.
        item_law: categories of items: even, as many of each among ids that follow each other; random, each category as
            likely as any other; or simplex, random with shares drawn uniformly from all distributions.
        open_share: of the ids, those that exist at the first record; the share grows linearly to 1.
        max_categories: of a record.
        count_law: how many a record has: uniform, 1 to max_categories; or always that many (max).
        prior: H_c: simplex, uniform over all distributions (Dirichlet with parameters 1); or even, all alike.
        max_concentration: alpha is uniform from 1 to this.
        seed: determines every event.
    """

    kind: Literal["appendix_c"] = "appendix_c"
    max_length: int = Field(default=127, gt=0)
    num_records: int = Field(default=1_000_000, gt=0)
    record_length: int = Field(default=128, gt=1)
    num_items: int = Field(default=20_000, gt=0, le=2**31)
    num_categories: int = Field(default=100, gt=0)
    item_law: Literal["even", "random", "simplex"] = "random"
    open_share: float = Field(default=0.4, gt=0, le=1)
    max_categories: int = Field(default=5, gt=0)
    count_law: Literal["uniform", "max"] = "uniform"
    prior: Literal["simplex", "even"] = "simplex"
    max_concentration: float = Field(default=500.0, ge=1)
    seed: int = Field(default=0, ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_categories > self.num_categories:
            raise ValueError(
                f"max_categories: got {self.max_categories}, expected at most num_categories ({self.num_categories})"
            )
        if self.open_share * self.num_items < self.num_categories:
            raise ValueError(
                f"num_categories: got {self.num_categories}, expected at most the "
                f"{self.open_share * self.num_items:g} items that are open at first (open_share x num_items)"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PluginDataConfig(_SequencesConfig, PluginConfig):
    """Events from code of the user's own; see `data.plugin_source`.

    Attributes:
        kind: `plugin`.
    """

    kind: Literal["plugin"] = "plugin"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreparationConfig:
    """How data sets are prepared; the result does not depend on it.

    Attributes:
        engine: what counts, joins and sorts: duckdb in this process, or spark, a cluster's or a local one.
        memory_gib: that the process may use, with duckdb all in all; null: half of the machine's. Larger logs are
            prepared in more passes.
    """

    engine: Literal["duckdb", "spark"] = "duckdb"
    memory_gib: float | None = Field(default=None, ge=0.75)

    def memory_bytes(self, available: int | None) -> int:
        """The limit, given what the machine has."""
        if self.memory_gib is not None:
            return int(self.memory_gib * 2**30)
        return max((available or 4 << 30) // 2, 3 << 28)


DataSetConfig = MovieLensConfig | AmazonConfig | EventsConfig | SyntheticZipfConfig | AppendixCConfig | PluginDataConfig
"""Any data set that `prepare` can make."""

DataConfig = Annotated[DataSetConfig, Field(discriminator="kind")]
"""The same, told apart by `kind` when read."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchingConfig:
    """How an epoch is cut into global batches and how a batch is shared out.

    Attributes:
        by: what batches have the same number of: sequences, tokens, or FLOPs of a training step. By tokens or FLOPs,
            the number of sequences varies; a batch is off the mean by at most one sequence.
        budget: tokens or FLOPs of a batch over all ranks, on average; null: as many batches as by sequences.
        balance: which rank gets which sequences of a batch. cost: the costliest first, each to the rank with the
            least work; counts: the same with equally many sequences a rank; none: in turns.
    """

    by: Literal["sequences", "tokens", "flops"] = "sequences"
    budget: float | None = Field(default=None, gt=0)
    balance: Literal["none", "counts", "cost"] = "cost"

    def __post_init__(self) -> None:
        if self.by == "sequences" and self.budget is not None:
            raise ValueError(f"budget: got {self.budget:g}, expected null: by sequences, global_batch_size decides")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmissionConfig:
    """Generative training with sequences emitted at a rate of 1/n (arXiv 2402.17152, section 2.3).

    An epoch has a sequence of n inputs with probability min(1, s / n). Draws are new every epoch and depend on seed,
    user and epoch only.

    Attributes:
        scale: s; 1: in the mean every sequence comes once in n epochs.
        share: instead of `scale`: s is chosen so that an epoch has this share of all sequences on average.
    """

    scale: float | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0, le=1)

    def __post_init__(self) -> None:
        if (self.scale is None) == (self.share is None):
            raise ValueError(f"scale, share: got {self.scale} and {self.share}, expected one of them")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoaderConfig:
    """Which batches are made of a data set; independent of the number of ranks.

    Attributes:
        split: which part of every sequence.
        global_batch_size: sequences in a batch, summed over all ranks; unless `batching` sets a budget.
        max_length: inputs kept of every sequence.
        window: which ones: the most recent, or random ones that follow each other.
        seed: with the epoch number, determines the order and the subsequences.
        shuffle: a new order every epoch, or data set order.
        batching: how batches are cut and shared out.
        cost: work of a sequence by its length, what batching by FLOPs and balancing go by.
        stochastic_length: random subsequences; None: whole histories.
        emission: which sequences an epoch has; None: all of them.
        cut: where a split by time or of whole sequences cuts; None: leave-one-out.
        targets: what an input is to predict: the next event, or in a split by time its own action.
    """

    split: Split
    global_batch_size: int = Field(gt=0)
    max_length: int = Field(default=200, gt=0)
    window: WindowName = "recent"
    seed: int = Field(default=0, ge=0)
    shuffle: bool = True
    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    cost: CostLaw = Field(default_factory=CostLaw)
    stochastic_length: StochasticLengthConfig | None = None
    emission: EmissionConfig | None = None
    cut: Moments | RecordSplit | None = None
    targets: Literal["next", "own"] = "next"

    def __post_init__(self) -> None:
        if self.targets == "own" and not isinstance(self.cut, Moments):
            raise ValueError("targets: got own without moments, expected next: only a split by time holds out actions")


def prepare_command(config: DataSetConfig) -> str:
    """What makes the data set of a configuration."""
    words = ["python -m hstu_dist prepare", f"data={config.kind}"]
    words += ["data.input=FILE"] if isinstance(config, EventsConfig) else []
    if isinstance(config, PluginDataConfig):
        words += [f"data.target={config.target}", f"plugins=[{config.target.partition(':')[0]}]"]
        words += ["data.settings=SETTINGS"] if config.settings else []
    words += [f"data.path={config.path}"] if config.path != _default_path(config.kind) else []
    if isinstance(config, AppendixCConfig | SyntheticZipfConfig):
        # its settings are all there is of it
        usual = recipe_of(type(config)())
        words += [f"data.{name}={value}" for name, value in recipe_of(config).items() if value != usual[name]]
    return " ".join(words)


def recipe_of(config: DataSetConfig) -> dict[str, Any]:
    """The settings that shape a data set, as its manifest has them; not what only says how it is found and read."""
    recipe = {name: value for name, value in asdict(config).items() if name not in _NOT_CONTENT | _APART}
    if isinstance(config, PluginDataConfig):
        recipe["settings"] = json.dumps(config.settings, sort_keys=True)
    return recipe


def is_made_here(config: DataSetConfig) -> bool:
    """Whether `prepare` could make the data set of a configuration; otherwise it only names a prepared one."""
    return not isinstance(config, EventsConfig) or config.input is not None


def _default_path(kind: str) -> str:
    return f"data/{kind}"
