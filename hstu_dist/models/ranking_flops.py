"""Closed-form FLOPs and parameters of the ranking models, as `flops` counts them; importable without torch.

Letters: n events of a sequence, C contextual features, F sparse features of DLRM, D width, K outputs, W hidden width
of the heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from hstu_dist.models.config import DLRMConfig, ModelConfig, PluginEncoderConfig
from hstu_dist.models.flops import FlopCount, ParameterCount, Workload, count_flops, count_parameters, encoder_work
from hstu_dist.models.ranking_shape import DENSE, POOLED, RankingShape, token_encoder


def ranking_work(config: ModelConfig, lengths: Iterable[int], num_contextual: int) -> Workload:
    """Work of sequences of so many events.

    An encoder has 2n + C tokens a sequence, of which n predict: C² pairs of contextual tokens, and 2n tokens that see
    them, themselves and the tokens before. DLRM has n rows and no attention.

    Args:
        config: the model.
        lengths: events of each sequence.
        num_contextual: C.
    """
    sizes, C = list(lengths), num_contextual
    if isinstance(config, DLRMConfig):
        return Workload(tokens=sum(sizes))
    work = encoder_work(config, [2 * n + C for n in sizes], C)
    return work + Workload(context=sum(n + C for n in sizes))


def count_ranking_flops(config: ModelConfig, shape: RankingShape, work: Workload) -> FlopCount:
    """FLOPs of a forward pass over a batch.

    Of an encoder, scores are those of the heads, 2(DW + WK) a prediction. Of DLRM, projections are all layers of its
    networks, and attention the products of all (F + 1)² pairs of features, 2(F + 1)²D a prediction.

    Args:
        config: the model.
        shape: what it reads and predicts.
        work: the batch, by `ranking_work`.
    """
    if isinstance(config, DLRMConfig):
        weights = sum(inputs * outputs for inputs, outputs in _dlrm_layers(config, shape))
        pairs = _features(shape) ** 2 * config.width if config.interaction == "dot" else 0
        return FlopCount(projections=2 * work.targets * weights, attention=2 * work.targets * pairs, scores=0)
    encoder = count_flops(config, work, scores_per_token=0)
    heads = shape.head_width * (config.width + shape.outputs)
    return FlopCount(projections=encoder.projections, attention=encoder.attention, scores=2 * work.targets * heads)


def count_ranking_parameters(config: ModelConfig, shape: RankingShape) -> ParameterCount:
    """Parameters of the ranking tower and of the item table."""
    D = config.width
    rows = sum(levels for _, levels in shape.actions) + sum(size + 1 for size in shape.contextual)
    if isinstance(config, DLRMConfig):
        # the layers of the cross network: a matrix in two factors, and one bias
        biases = sum(outputs for _, outputs in _mlp_layers(config, shape)) + _cross_layers(config) * _inputs(
            config, shape
        )
        weights = sum(inputs * outputs for inputs, outputs in _dlrm_layers(config, shape))
        parts = {"positions": 0, "projections": weights + biases, "norms": 0, "relative_bias": 0}
        return ParameterCount(**parts, features=rows * D, table=shape.num_items * D)
    tokens = token_encoder(config, len(shape.contextual))
    # what a user's own encoder has is known from its module alone
    assert not isinstance(tokens, PluginEncoderConfig)
    encoder = count_parameters(tokens, shape.num_items)
    heads = (D + 1) * shape.head_width + (shape.head_width + 1) * shape.outputs
    return ParameterCount(
        positions=encoder.positions,
        projections=encoder.projections + heads,
        norms=encoder.norms + 2 * D,
        relative_bias=encoder.relative_bias,
        features=rows * D,
        table=encoder.table,
    )


def _features(shape: RankingShape) -> int:
    """F + 1: the candidate, pooled histories, contextual features, and what the dense numbers become."""
    return 1 + POOLED + len(shape.contextual) + 1


def _inputs(config: DLRMConfig, shape: RankingShape) -> int:
    """Width of what the network on top reads."""
    features = _features(shape)
    if config.interaction == "dot":
        return config.width + features * (features - 1) // 2
    return features * config.width


def _cross_layers(config: DLRMConfig) -> int:
    return config.cross_layers if config.interaction == "cross" else 0


def _mlp_layers(config: DLRMConfig, shape: RankingShape) -> list[tuple[int, int]]:
    """(inputs, outputs) of the layers with one weight matrix."""
    dense = [DENSE, config.dense_width, config.width]
    over = [_inputs(config, shape), *config.over_widths, shape.outputs]
    return [*pairwise(dense), *pairwise(over)]


def _dlrm_layers(config: DLRMConfig, shape: RankingShape) -> Sequence[tuple[int, int]]:
    """(inputs, outputs) of all weight matrices."""
    inputs, rank = _inputs(config, shape), config.cross_rank
    return [*_mlp_layers(config, shape), *[(inputs, rank), (rank, inputs)] * _cross_layers(config)]
