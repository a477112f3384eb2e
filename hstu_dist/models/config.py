"""Settings of the sequence encoders; importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

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
        max_length: N, the longest input sequence; sizes the position tables.
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TransformerConfig(_EncoderConfig):
    """SASRec: softmax attention and a feed-forward part per block.

    Attributes:
        ffn_width: hidden width of the feed-forward part.
    """

    kind: Literal["sasrec"] = "sasrec"
    ffn_width: int = Field(default=50, gt=0)


ModelConfig = Annotated[HSTUConfig | TransformerConfig, Field(discriminator="kind")]
