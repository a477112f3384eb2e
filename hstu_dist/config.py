"""RunConfig: one run, composed by Hydra from conf/ and checked before any process starts.

Nothing below this file knows Hydra or OmegaConf; nothing here imports torch, so that a login node can
compose and check a run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.cluster import ClusterConfig
from hstu_dist.data.config import DataSetConfig
from hstu_dist.data.record_split import RecordSplit
from hstu_dist.data.stream.config import FeedConfig, StreamConfig
from hstu_dist.distributed.config import ITEM, EmbeddingConfig
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.losses.config import (
    FullSoftmaxConfig,
    LossConfig,
    MultiTaskConfig,
    RetrievalLossConfig,
    SampledSoftmaxConfig,
)
from hstu_dist.models.config import DLRMConfig, EncoderConfig, ModelConfig, RankingConfig, RetrievalConfig, TaskConfig
from hstu_dist.plan.config import PlanConfig
from hstu_dist.plugins import PluginConfig, check_listed
from hstu_dist.train.config import OptimizerConfig, TrainerConfig
from hstu_dist.validation import STRICT, as_user_error

HARDWARE = "hardware"
"""Folder of conf/ with the clusters that `plan` knows; no part of a run."""


_OPEN = re.compile(r"(published|[\w.]+\.(settings|metrics|action_columns|tables))(\.[\w@.-]+)?=")
"""Settings whose keys are the user's own."""

FEATURES: tuple[str, ...] = ()
"""Tables besides the item table that a model can look up."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything about one run.

    Attributes:
        name: names the run folder `output`/`name`.
        output: folder of all runs.
        seed: of initialisation, shuffling, dropout and negatives.
        nproc: ranks of each machine.
        task: what the model predicts.
        data, model, loss, embedding, optimizer, trainer, cluster: the parts, each described in its own class.
        plan: what `plan` assumes; training ignores it.
        published: figures of a paper to print beside the result, metric → value.
        plugins: modules of the user's own that `target` settings may name something in; no other is ever imported.
        experiment: recipe of conf/experiment that it began with, for reports; empty: none.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = "runs"
    seed: int = Field(default=1, ge=0)
    nproc: int = Field(default=2, gt=0)
    task: TaskConfig = Field(default_factory=RetrievalConfig)
    data: FeedConfig
    model: Annotated[ModelConfig, Field(discriminator="kind")]
    loss: Annotated[LossConfig, Field(discriminator="kind")]
    embedding: EmbeddingConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    cluster: ClusterConfig
    plan: PlanConfig = Field(default_factory=PlanConfig)
    published: dict[str, float] = Field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    experiment: str = ""

    def __post_init__(self) -> None:
        self._check_task()
        if not isinstance(self.model, DLRMConfig) and self.model.max_length < self.data.max_length:
            raise ValueError(
                f"model.max_length: got {self.model.max_length}, "
                f"expected at least data.max_length ({self.data.max_length})"
            )
        # without addresses there is nothing to compare with yet
        if 0 < self.cluster.nodes < self.cluster.least_nodes:
            raise ValueError(
                f"cluster.min_nodes: got {self.cluster.least_nodes}, expected at most the {self.cluster.nodes} machines"
            )
        self._check_tables()
        _check_feed(self)
        check_listed(self.targets, self.plugins)

    def _check_task(self) -> None:
        ranking = isinstance(self.task, RankingConfig)
        heads = self.loss.heads if isinstance(self.loss, MultiTaskConfig) else ()
        if ranking != bool(heads):
            wanted = "multi_task" if ranking else "sampled_softmax or full_softmax"
            raise ValueError(f"loss: got {self.loss.kind}, expected {wanted} for task={self.task.kind}")
        if isinstance(self.model, DLRMConfig) and not ranking:
            raise ValueError("model: got dlrm, expected hstu or sasrec for task=retrieval")
        monitor, monitors = self.trainer.evaluation.monitor, [name for head in heads for name in head.monitors]
        if ("/" in monitor or ranking) and monitor not in monitors:
            wanted = ", ".join(monitors) or "hr@K, ndcg@K or mrr"
            raise ValueError(
                f"trainer.evaluation.monitor: got {monitor}, expected one of {wanted} for task={self.task.kind}"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """What the run imports from modules of the user's own, `module:name` each."""
        evaluation = self.trainer.evaluation
        parts: tuple[object, ...] = (self.model, self.loss, self.data, *self.trainer.hooks)
        return (*(part.target for part in parts if isinstance(part, PluginConfig)), *evaluation.metrics.values())

    @property
    def prepared(self) -> DataSetConfig:
        """The prepared data set of a run that trains on one.

        Raises:
            UserError: it trains on a stream.
        """
        if isinstance(self.data, StreamConfig):
            raise UserError("data: got a stream, expected a prepared data set here", "choose another run")
        return self.data

    @property
    def record_split(self) -> RecordSplit | None:
        """Which whole sequences are held out; None: the run splits in another way."""
        task = self.task
        if not isinstance(task, RetrievalConfig) or task.split != "record":
            return None
        return RecordSplit(
            validation_share=task.validation_share,
            test_share=task.test_share,
            train=task.records.train,
            evaluated=task.records.evaluated,
        )

    @property
    def retrieval(self) -> tuple[EncoderConfig, RetrievalLossConfig]:
        """Model and loss of a retrieval run.

        Raises:
            UserError: it is none.
        """
        if isinstance(self.model, DLRMConfig) or isinstance(self.loss, MultiTaskConfig):
            raise UserError(f"task: got {self.task.kind}, expected retrieval here", "choose a retrieval run")
        return self.model, self.loss

    def _check_tables(self) -> None:
        for name, spec in self.embedding.configured().items():
            if name not in (ITEM, *FEATURES):
                known = ", ".join(FEATURES) or "no further table"
                raise ValueError(f"embedding.tables: got {name}, expected {known}: the model looks nothing else up")
            lacking, dtype = spec.config.needs_cuda(), spec.config.dtype
            if lacking is not None and self.trainer.device == "cpu":
                raise ValueError(f"embedding table {name}: {lacking}, expected another with trainer.device=cpu")
            if dtype != "fp32" and self.optimizer.average_decay is not None:
                raise ValueError(
                    f"optimizer.average_decay: got {self.optimizer.average_decay}, expected null: "
                    f"the {dtype} rows of table {name} are too short for an average"
                )
            averages = self.embedding.replicas > 1 or self.optimizer.average_decay is not None
            if spec.config.compute_kernel == "fused_uvm_caching" and averages:
                raise ValueError(
                    f"embedding table {name}: got compute_kernel=fused_uvm_caching, expected fused (or, with "
                    "embedding.replicas, fused_uvm): averages are written to the table, not to its cache"
                )
        self._check_vocabularies()

    def _check_vocabularies(self) -> None:
        kind, data = self.embedding.vocabulary.kind, self.data
        if kind != "static" and isinstance(self.task, RankingConfig):
            raise ValueError(f"embedding.vocabulary.kind: got {kind}, expected static for task=ranking")
        if kind != "static" and self.record_split is not None:
            # their loss over all items has no meaning for an item without a row
            raise ValueError(f"embedding.vocabulary.kind: got {kind}, expected static for task.split=record")
        if kind == "zch" and self.optimizer.average_decay is not None:
            raise ValueError(
                f"optimizer.average_decay: got {self.optimizer.average_decay}, expected null with "
                "embedding.vocabulary.kind=zch: rows change hands, and an average would mix their owners"
            )
        if kind == "zch" and isinstance(self.loss, FullSoftmaxConfig):
            raise ValueError(
                "loss: got full_softmax, expected sampled_softmax with embedding.vocabulary.kind=zch: "
                "rows that no id has yet would count as items"
            )
        if kind == "zch" and isinstance(self.loss, SampledSoftmaxConfig) and self.loss.log_q_correction:
            raise ValueError(
                "loss.log_q_correction: got true, expected false with embedding.vocabulary.kind=zch: "
                "the number of items that negatives are drawn from changes with every step"
            )
        if not isinstance(data, StreamConfig):
            return
        if (data.item_ids == "raw") != (kind != "static"):
            expected = "hash or zch for data.item_ids=raw" if kind == "static" else "static, or data.item_ids=raw"
            raise ValueError(f"embedding.vocabulary.kind: got {kind}, expected {expected}")
        self.embedding.vocabulary.check_rows(data.num_items)
        rows = self.embedding.vocabulary.rows
        if rows not in (None, data.num_items):
            raise ValueError(
                f"embedding.vocabulary.rows: got {rows}, expected null on a stream: data.num_items={data.num_items}"
            )

    @property
    def world_size(self) -> int:
        """Ranks of all machines."""
        return self.nproc * self.cluster.nodes

    @property
    def least_world_size(self) -> int:
        """Ranks that the run can go on with."""
        return self.nproc * self.cluster.least_nodes

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything this run writes."""
        return Path(self.output) / self.name


def _check_feed(config: RunConfig) -> None:
    """Refuses what only makes sense with passes over a finished data set, or only without."""
    trainer = config.trainer
    if not isinstance(config.data, StreamConfig):
        if trainer.epochs is None:
            raise ValueError("trainer.epochs: got null, expected a number of passes over the data set")
        return
    for key, got, expected in (
        ("task", config.task.kind, "retrieval"),
        ("trainer.epochs", trainer.epochs, None),
        ("trainer.train_on", trainer.train_on, "train"),
        ("trainer.evaluation.every_epochs", trainer.evaluation.every_epochs, 1),
        ("trainer.evaluation.patience", trainer.evaluation.patience, None),
        ("trainer.evaluation.track_test", trainer.evaluation.track_test, False),
        ("optimizer.schedule.kind", config.optimizer.schedule.kind, "constant"),
    ):
        if got != expected:
            shown = "null" if expected is None else expected
            raise ValueError(f"{key}: got {got}, expected {shown} on a stream, whose end nobody knows")


def conf_dir() -> Path:
    """The folder of YAML groups: conf/ of the checkout, or its copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups_help(wanted: Collection[str] | None = None) -> str:
    """The groups that overrides choose from, read from the YAML files.

    Args:
        wanted: names of groups; None: all.
    """
    lines = ["groups (GROUP=OPTION), whose keys are set as GROUP.KEY=VALUE:"]
    for group in sorted(p for p in conf_dir().iterdir() if p.is_dir() and p.name != HARDWARE):
        if wanted is None or group.name in wanted:
            options = " | ".join(sorted(file.stem for file in group.glob("*.yaml")))
            lines.append(f"  {group.name:<11} {options}")
    return "\n".join([*lines, f"keys and their meaning: {conf_dir()}"])


def hardware_names() -> list[str]:
    """Clusters that `plan` knows."""
    return sorted(file.stem for file in (conf_dir() / HARDWARE).glob("*.yaml"))


def compose(overrides: Sequence[str]) -> RunConfig:
    """A run from conf/train.yaml and Hydra overrides such as `experiment=ml1m trainer.epochs=3`.

    Raises:
        UserError: an unknown group, option or key, or a value that a check refuses.
    """
    values = compose_dict("train", overrides)
    chosen = [override.partition("=")[2] for override in overrides if re.match(r"\+?experiment=", override)]
    return from_dict(values | {"experiment": chosen[-1] if chosen and chosen[-1] != "null" else ""})


def compose_dict(primary: str, overrides: Sequence[str], folder: str = "") -> dict[str, Any]:
    """Plain dictionary of a YAML file with overrides applied and interpolations resolved.

    Args:
        primary: the file, without suffix.
        overrides: in Hydra's syntax.
        folder: of conf/ that has the file and its groups; empty: conf/ itself.

    Raises:
        UserError: Hydra cannot compose it.
    """
    root = conf_dir() / folder
    with explained_composition(root):
        with initialize_config_dir(config_dir=str(root), version_base="1.3"):
            composed = hydra_compose(primary, overrides=prefixed(overrides))
        resolved = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def prefixed(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: new keys want a prefix there, also in settings that are made of new keys."""
    return [f"++{override}" if _OPEN.match(override) else override for override in overrides]


@contextmanager
def explained_composition(root: Path) -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise into one line; `root` is the folder that they compose from.

    Raises:
        UserError: says what cannot be composed.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        unknown = re.match(r"Could not override '(.+)'", str(error))
        problem = f"{unknown[1]}: no such key" if unknown else _first_line(error)
        unreadable = isinstance(error, OverrideParseException)
        quote, known = """quote such a value twice: 'KEY="VALUE"'""", f"the groups and their keys are in {root}"
        raise UserError(f"configuration: {problem}", quote if unreadable else known) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def from_dict(values: dict[str, Any], source: str = "configuration") -> RunConfig:
    """A checked run from plain values.

    Raises:
        UserError: names the field, what was got and what was expected.
    """
    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise as_user_error(error, source, values) from error


def load(path: Path) -> RunConfig:
    """A run from a resolved YAML file, as `save` wrote it.

    Raises:
        UserError: the file is missing, no YAML, or fails a check.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml has several unrelated error types
        raise UserError(
            f"configuration file {path}: {_first_line(error)}", "give the resolved YAML of a run folder"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"configuration file {path}: got no mapping", "give the resolved YAML of a run folder")
    return from_dict({str(k): v for k, v in values.items()}, source=str(path))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values of a run: strings, numbers, lists, dictionaries."""
    values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return values


def as_yaml(config: RunConfig) -> str:
    """The resolved YAML that `load` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_dict(config))))


def _escaped(value: Any) -> Any:
    """A resolved value in which `${...}`, such as a shell's, is text for OmegaConf, too."""
    match value:
        case dict():
            return {key: _escaped(inner) for key, inner in value.items()}
        case list():
            return [_escaped(inner) for inner in value]
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def save(config: RunConfig, path: Path) -> None:
    """Writes the resolved YAML, atomically."""
    write_atomically(path, as_yaml(config).encode())


_MAY_CHANGE = (
    "nproc",
    "cluster",
    "plan",
    "published",
    "experiment",
    "output",
    "embedding.plan",
    "embedding.sharding",
    "trainer.epochs",
    "trainer.stop_epoch",
    "trainer.threads",
    "trainer.peak_flops",
    "trainer.device",
    "trainer.micro_batches",
    "trainer.batching.balance",
    "data.poll_seconds",
    "data.settle_seconds",
    "data.give_up_seconds",
    "data.ahead",
)
_MAY_CHANGE_GROUPS = (
    "trainer.logging",
    "trainer.checkpoint",
    "trainer.profile",
    "trainer.guard",
    "trainer.timeout_seconds",
    "trainer.parallel",
    "embedding.replicas",
    "embedding.sync_steps",
)


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys that changed so that `new` cannot continue `old`, each as `key: old -> new`.

    World size, number of epochs, logging and checkpoint settings may change between runs.
    """
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    changed = []
    for key in sorted(before.keys() | after.keys()):
        exempt = any(key == free or key.startswith(f"{free}.") for free in (*_MAY_CHANGE, *_MAY_CHANGE_GROUPS))
        if not exempt and before.get(key) != after.get(key):
            changed.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return changed


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by points."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
