"""Settings of the objectives; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.plugins import PluginConfig
from hstu_dist.validation import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampledSoftmaxConfig:
    """Softmax over the positive and uniform negatives.

    Attributes:
        num_negatives: R, negatives per position, drawn uniformly from all items.
        temperature: tau, what cosine similarities are divided by.
        log_q_correction: subtract log(R / V), V the number of items, from the scores of negatives, so that they stand
            for all items and the loss estimates that of the full softmax. The public code does not correct.
    """

    kind: Literal["sampled_softmax"] = "sampled_softmax"
    num_negatives: int = Field(default=128, gt=0)
    temperature: float = Field(default=0.05, gt=0)
    log_q_correction: bool = False

    def scores_per_token(self, num_items: int) -> int:
        """Similarities that the loss of one position needs: the positive and its negatives."""
        return 1 + self.num_negatives


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FullSoftmaxConfig:
    """Softmax over the whole vocabulary.

    Attributes:
        temperature: tau, what cosine similarities are divided by.
    """

    kind: Literal["full_softmax"] = "full_softmax"
    temperature: float = Field(default=0.05, gt=0)

    def scores_per_token(self, num_items: int) -> int:
        """Similarities that the loss of one position needs: all items."""
        return num_items


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PluginLossConfig(PluginConfig):
    """A loss of the user's own, of the scores of the positive and of uniform negatives; see `losses.plugin`.

    Attributes:
        num_negatives: R, negatives per position, drawn uniformly from all items.
        temperature: tau, what cosine similarities are divided by.
    """

    kind: Literal["plugin"] = "plugin"
    num_negatives: int = Field(default=128, gt=0)
    temperature: float = Field(default=0.05, gt=0)

    def scores_per_token(self, num_items: int) -> int:
        """Similarities that the loss of one position needs: the positive and its negatives."""
        return 1 + self.num_negatives


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeadConfig:
    """One prediction of what a user does with an item.

    Attributes:
        name: prefix of its metrics; `score` calls its column `predicted_NAME`.
        kind: binary: whether the action is at least `threshold`, by cross-entropy; regression: the action itself, as
            (transform(action) - offset) / scale, by squared error.
        column: part of the action that it predicts; `action` where the data has one plain action.
        threshold: smallest action that counts as positive.
        transform: identity or log1p.
        offset: subtracted from the label; about its mean.
        scale: what the label is divided by; about its standard deviation. Metrics are in units of the label.
        weight: of its loss.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    kind: Literal["binary", "regression"]
    column: str = "action"
    threshold: int = Field(default=1, gt=0)
    transform: Literal["identity", "log1p"] = "identity"
    offset: float = Field(default=0.0, allow_inf_nan=False)
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @property
    def monitors(self) -> tuple[str, ...]:
        """Metrics of which more is better."""
        return tuple(f"{self.name}/{metric}" for metric in (("auc",) if self.kind == "binary" else ("r2",)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MultiTaskConfig:
    """Weighted sum of the losses of several heads, for task=ranking only.

    Attributes:
        heads: what is predicted; at least one.
    """

    kind: Literal["multi_task"] = "multi_task"
    heads: tuple[HeadConfig, ...]

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"heads: got names {names}, expected at least one head, and different names")


SoftmaxConfig = SampledSoftmaxConfig | FullSoftmaxConfig
"""Objectives of retrieval that this package computes."""

RetrievalLossConfig = SoftmaxConfig | PluginLossConfig
"""Objectives of retrieval."""

LossConfig = RetrievalLossConfig | MultiTaskConfig
