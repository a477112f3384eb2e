"""Settings of the models and of what they predict; importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.plugins import PluginConfig
from hstu_dist.validation import STRICT

AttentionBackendName = Literal["auto", "reference", "blocked", "native", "triton"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _EncoderConfig:
    """What every encoder has.

    Attributes:
        width: D, the model width; also the width of the item table.
        num_layers: number of blocks.
        num_heads: H.
        dropout: rate after the input and inside each block.
        max_length: N, the longest input sequence, in events; sizes the position tables, for task=ranking those of
            2N tokens and the contextual ones.
        backend: attention implementation; auto takes the fastest that the device has.
    """

    width: int = Field(default=50, gt=0)
    num_layers: int = Field(default=2, gt=0)
    num_heads: int = Field(default=1, gt=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    max_length: int = Field(default=200, gt=0)
    backend: AttentionBackendName = "auto"

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width: got {self.width}, expected a multiple of num_heads ({self.num_heads})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HSTUConfig(_EncoderConfig):
    """HSTU (eq. 1-3); the defaults are the paper's layer.

    Attributes:
        qk_width: Q, width of a query/key head; null: width / num_heads.
        value_width: V, width of a value head; null: width / num_heads.
        normalizer: n, the constant that attention weights are divided by.
        alpha: scale of q k^T before the bias.
        activation: silu, or softmax for ablation.
        relative_bias: which parts of rab^{p,t} are learned.
        affine_norm: learn scale and shift of both layer norms (production variant).
        uvqk_bias: learn a bias of the uvqk projection (production variant).
        concat_ux: project concat(u, x, u * norm) instead of u * norm (production variant).
        input_time: add to the input a learned embedding of the time since the token before, in the buckets of the
            relative bias (production variant).
        window: a token sees its `window` most recent tokens, itself included; 0: all (semi-local attention,
            arXiv 2602.16986).
        global_prefix: the first tokens that stay visible outside the window.
        truncated_layers: how many of the upper layers run on the most recent tokens only; older tokens skip them.
        truncated_length: how many tokens these layers see.
    """

    kind: Literal["hstu"] = "hstu"
    qk_width: int | None = Field(default=None, gt=0)
    value_width: int | None = Field(default=None, gt=0)
    normalizer: float = Field(default=211.0, gt=0)
    alpha: float = 1.0
    activation: Literal["silu", "softmax"] = "silu"
    relative_bias: Literal["none", "position", "position_time"] = "position_time"
    affine_norm: bool = False
    uvqk_bias: bool = False
    concat_ux: bool = False
    input_time: bool = False
    window: int = Field(default=0, ge=0)
    global_prefix: int = Field(default=0, ge=0)
    truncated_layers: int = Field(default=0, ge=0)
    truncated_length: int = Field(default=64, gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_prefix and not self.window:
            raise ValueError(f"global_prefix: got {self.global_prefix}, expected 0 without a window")
        if self.truncated_layers >= self.num_layers:
            raise ValueError(
                f"truncated_layers: got {self.truncated_layers}, expected less than num_layers ({self.num_layers})"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TransformerConfig(_EncoderConfig):
    """SASRec: softmax attention and a feed-forward part per block.

    Attributes:
        ffn_width: hidden width of the feed-forward part.
    """

    kind: Literal["sasrec"] = "sasrec"
    ffn_width: int = Field(default=50, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PluginEncoderConfig(_EncoderConfig, PluginConfig):
    """An encoder of the user's own, between the input embeddings and the unit vectors; see `models.plugin`."""

    kind: Literal["plugin"] = "plugin"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DLRMConfig:
    """The ranking baseline: pooled histories, feature interaction and a multi-layer perceptron, for task=ranking only.

    Attributes:
        width: D, of every feature; also the width of the item table.
        dense_width: hidden width of the network that makes a feature of the dense numbers.
        interaction: dot products of all pairs of features (DLRM), or a low-rank cross network (DCN V2).
        cross_layers: layers of the cross network.
        cross_rank: rank of its matrices.
        over_widths: hidden widths of the network on top.
        dropout: rate of the features.
    """

    kind: Literal["dlrm"] = "dlrm"
    width: int = Field(default=50, gt=0)
    dense_width: int = Field(default=64, gt=0)
    interaction: Literal["dot", "cross"] = "dot"
    cross_layers: int = Field(default=3, gt=0)
    cross_rank: int = Field(default=64, gt=0)
    over_widths: tuple[Annotated[int, Field(gt=0)], ...] = (256, 128)
    dropout: float = Field(default=0.2, ge=0, lt=1)

    def __post_init__(self) -> None:
        if not self.over_widths:
            raise ValueError("over_widths: got none, expected at least one hidden width")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecordSplitConfig:
    """Which sequences a split of whole sequences trains and evaluates on.

    Attributes:
        train: the most recent so many before those held out; null: all.
        in_order: a pass goes through them in the order of the data set, instead of a new random one.
        evaluated: so many of a held-out part, evenly spread over it; null: all.
        scored: targets of each of them that count, the last ones; null: all that have inputs.
    """

    train: int | None = Field(default=None, gt=0)
    in_order: bool = False
    evaluated: int | None = Field(default=None, gt=0)
    scored: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrievalConfig:
    """The model predicts the next item.

    Attributes:
        split: what is held out. leave_one_out: the last event of every user for testing, the one before for validation.
            time: of all events, in order of time, the last `test_share` and the `validation_share` before them; of
            these the first of every user is predicted, from what the user did before. record: whole sequences, by their
            order in the data set; their events are predicted one by one, repeats included, and the loss over all items
            is measured beside the ranks.
        validation_share: of all events, or sequences; not for leave_one_out.
        test_share: of all events, or sequences; not for leave_one_out.
        records: more about split=record.
    """

    kind: Literal["retrieval"] = "retrieval"
    split: Literal["leave_one_out", "time", "record"] = "leave_one_out"
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    test_share: float = Field(default=0.1, gt=0, lt=1)
    records: RecordSplitConfig = Field(default_factory=RecordSplitConfig)

    def __post_init__(self) -> None:
        _check_shares(self.validation_share, self.test_share)
        if self.split != "record" and self.records != RecordSplitConfig():
            raise ValueError(f"records: got settings with split={self.split}, expected split=record")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RankingConfig:
    """The model predicts what the user does with each item, shown to it: item_0, action_0, item_1, action_1, ...

    The split is one of time: of all events, in order of time, the last `test_share` test, the `validation_share`
    before them choose the epoch, and the rest trains. A prediction sees all earlier events of its user.

    Attributes:
        contextual: features of the user that lead every sequence: `user` stands for who it is, other names for
            contextual columns of the data.
        action_levels: rows of the embedding of each part of an action. A packed part that holds larger numbers than
            that counts by order of magnitude; a data set with one plain action has to keep below.
        head_width: hidden width that all heads share; null: width of the model.
        validation_share: of all events.
        test_share: of all events.
    """

    kind: Literal["ranking"] = "ranking"
    contextual: tuple[str, ...] = ()
    action_levels: int = Field(default=16, ge=2)
    head_width: int | None = Field(default=None, gt=0)
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    test_share: float = Field(default=0.1, gt=0, lt=1)

    def __post_init__(self) -> None:
        if len(set(self.contextual)) != len(self.contextual):
            raise ValueError(f"contextual: got {list(self.contextual)}, expected different names")
        _check_shares(self.validation_share, self.test_share)


def _check_shares(validation: float, test: float) -> None:
    if validation + test >= 1:
        raise ValueError(f"validation_share + test_share: got {validation + test:g}, expected less than 1")


TaskConfig = Annotated[RetrievalConfig | RankingConfig, Field(discriminator="kind")]

EncoderConfig = HSTUConfig | TransformerConfig | PluginEncoderConfig
"""Models that encode sequences."""

ModelConfig = EncoderConfig | DLRMConfig
"""Any model."""
