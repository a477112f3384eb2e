"""Settings of the loop, its optimizer, evaluation, checkpoints and logs; importable without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.data.config import BatchingConfig, EmissionConfig
from hstu_dist.distributed.config import ParallelConfig
from hstu_dist.machine import Precision
from hstu_dist.plugins import PluginConfig, Target
from hstu_dist.validation import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """Learning-rate factor over the run, for the dense part and the tables alike.

    Attributes:
        kind: shape after the warm-up; cosine and linear end at `final_factor`.
        warmup_steps: steps over which the factor rises linearly from 0 to 1.
        final_factor: factor at the last step of the run.
    """

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    final_factor: float = Field(default=0.0, ge=0, le=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW of the dense part.

    Attributes:
        learning_rate: step size.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        clip_norm: largest global gradient norm of the dense part; null: no clipping. Table gradients are
            consumed inside the backward and are not clipped.
        schedule: learning-rate factor over the run.
        average_decay: evaluate a moving average of all weights, tables included, of which every step keeps this share;
            null: the weights themselves. Costs a copy of the weights, and a pass over all of them in every step.
    """

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    average_decay: float | None = Field(default=None, gt=0, lt=1)

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, expected two numbers in [0, 1)")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Ranking against the whole corpus; the items that the model sees as a user's history are left out.

    The validation split chooses the epoch, and the test split is read once, there. Published tables were made
    differently: trained on everything but the last event, they give the test metrics of the best test epoch.
    `track_test` exists only to compare with those.

    Attributes:
        every_epochs: validation runs after every so many epochs.
        batch_size: users of one evaluation batch, over all ranks.
        cutoffs: K of HR@K and NDCG@K.
        monitor: validation metric that picks the best epoch; larger is better; for task=ranking `<head>/auc`, or
            `<head>/r2` of a regression.
        patience: stop after so many validations without a better `monitor`; null: never.
        track_test: also rank the test split every `every_epochs`, log it as `reference_protocol/test/...` and report
            the best epoch apart from the result. It has no influence on the epoch that is chosen or on the end of
            the run; its figures are optimistic, because the best of many readings is chosen.
        metrics: metrics of the user's own for task=retrieval, name → `module:function`, which gives values [B] float64
            for exact ranks [B] int64 of targets; their means are reported, and `monitor` may name one.
    """

    every_epochs: int = Field(default=1, gt=0)
    batch_size: int = Field(default=512, gt=0)
    cutoffs: tuple[int, ...] = (1, 10, 50, 100, 200)
    monitor: str = "ndcg@10"
    patience: int | None = Field(default=None, gt=0)
    track_test: bool = False
    metrics: dict[Annotated[str, Field(pattern=r"^[\w@.-]+$")], Target] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cutoffs or any(k < 1 for k in self.cutoffs):
            raise ValueError(f"cutoffs: got {self.cutoffs}, expected integers >= 1")
        # ranking has metrics of its own, `<head>/<metric>`; the run knows its heads
        known = ["mrr", *(f"{m}@{k}" for m in ("hr", "ndcg") for k in self.cutoffs)]
        if taken := sorted(self.metrics.keys() & set(known)):
            raise ValueError(f"metrics: got {taken[0]}, expected another name: there is a metric of this name")
        known += self.metrics
        if "/" not in self.monitor and self.monitor not in known:
            raise ValueError(f"monitor: got {self.monitor}, expected one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        every_steps: write after every so many steps, besides the end of each epoch; null: epochs only.
        keep: newest checkpoints that stay; the best one always stays.
        asynchronous: training goes on while a checkpoint is written; each rank keeps a copy of its share of the state
            in host memory for it.
    """

    every_steps: int | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1)
    asynchronous: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """Where metrics go, besides metrics.jsonl in the run folder.

    Attributes:
        every_steps: a line of training metrics after every so many steps.
        progress: progress bar on rank 0.
        tensorboard: write TensorBoard event files into the run folder.
        wandb: Weights & Biases; offline writes into the run folder.
        wandb_project: project name there.
        sequences: every rank writes the sequences of each step into the folder `sequences` of the run, to prove that
            each was trained on once an epoch.
        report: write report.html when training ends.
    """

    every_steps: int = Field(default=10, gt=0)
    progress: bool = True
    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "hstu_dist"
    sequences: bool = False
    report: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProfileConfig:
    """Trace of a few steps for Chrome's or Perfetto's viewer, and a picture of where their time goes.

    Attributes:
        first_step: first traced step of the process; null: no trace.
        num_steps: how many steps are traced.
        memory: also record allocations: memory.json (bytes by operator), and on a GPU memory_snapshot.pickle for
            PyTorch's memory viewer. Slows the traced steps down.
    """

    first_step: int | None = Field(default=None, ge=0)
    num_steps: int = Field(default=3, gt=0)
    memory: bool = False

    def __post_init__(self) -> None:
        if self.memory and self.first_step is None:
            raise ValueError("memory: got true without first_step, expected the step from which on it is recorded")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """What a run says and does about trouble that does not end it at once.

    Attributes:
        max_refused: such a step changes nothing on any rank and its batch is saved; the run stops after so many of
            them in a row.
        slow_ratio: warn when a rank's forward takes so many times as long as the median rank's; null: never.
    """

    max_refused: int = Field(default=3, ge=1)
    slow_ratio: float | None = Field(default=1.5, gt=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainerConfig:
    """The loop.

    Attributes:
        epochs: passes over the data that the learning-rate schedule spans; null for a stream.
        stop_epoch: end after that epoch of the schedule, or after that many windows of a stream; null: at the end.
        train_on: train leaves out the validation and test events; train_validation leaves out the test events only, for
            a final refit of a number of epochs that was chosen before: there is no validation, and the test split is
            read once, after the last epoch.
        global_batch_size: sequences of one step, over all ranks; on average, if `batching` is not by sequences.
        batching: how an epoch is cut into steps, and a step's sequences are shared out among the ranks.
        emission: generative training with sequences emitted at a rate of 1/n; null: every sequence once an epoch.
        precision: arithmetic of the tower: float32; tf32, whose matrix products round float32 to TF32 on the way in
            (GPUs from Ampere on); bfloat16, whose activations and matrix products are bfloat16 with float32 sums.
            Parameters, gradients between ranks, optimizers, tables and the loss are float32 with all of them.
        micro_batches: parts, of whole sequences, that a rank computes its share of a step in, one after the other: the
            result is the same, and activations take the memory of one part.
        parallel: how the ranks share the tower.
        device: auto takes CUDA where there is one.
        threads: CPU threads of a rank; null: the machine's cores divided by its ranks.
        peak_flops: FLOP/s of one rank's device, what MFU is measured against; null: the data sheet of a known GPU for
            `precision`, and on a CPU the rate of a matrix product in it, measured at the start.
        timeout_seconds: how long a rank waits for the others before it fails.
        hooks: of the user's own, called after evaluation and before a checkpoint is saved.
    """

    epochs: int | None = Field(default=101, gt=0)
    stop_epoch: int | None = Field(default=None, gt=0)
    train_on: Literal["train", "train_validation"] = "train"
    global_batch_size: int = Field(default=128, gt=0)
    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    emission: EmissionConfig | None = None
    precision: Precision = "float32"
    micro_batches: int = Field(default=1, gt=0)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0)
    peak_flops: float | None = Field(default=None, gt=0)
    timeout_seconds: float = Field(default=600.0, gt=0)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    hooks: tuple[PluginConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("precision: got tf32, expected float32 or bfloat16: CPUs have no TF32")
        if self.stop_epoch is not None and self.epochs is not None and self.stop_epoch > self.epochs:
            raise ValueError(f"stop_epoch: got {self.stop_epoch}, expected at most epochs ({self.epochs})")

    @property
    def last_epoch(self) -> float:
        """Epochs after which the run ends, unless it stops early."""
        return self.stop_epoch or self.epochs or math.inf

    @property
    def validates(self) -> bool:
        """Whether validation events are left out of training, so that they can choose an epoch."""
        return self.train_on == "train"
