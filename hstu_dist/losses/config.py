"""Settings of the objectives; importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

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


LossConfig = Annotated[SampledSoftmaxConfig | FullSoftmaxConfig, Field(discriminator="kind")]
