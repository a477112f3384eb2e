"""Closed-form bytes that a tower keeps between forward and backward; importable without torch.

Counted are the floating-point tensors that autograd saves, each storage once; ids, times and positions belong to the
batch. Letters: T tokens, D width, L layers, H heads, Q and V head widths of query/key and value, F feed-forward width.
"""

from __future__ import annotations

from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.flops import head_widths

_LOG_SUM_BYTES = 8
"""Of a query and head: softmax keeps the log of its denominator, on a CPU in float64."""

_NORM_STATISTICS = 2
"""Mean and deviation of a row, which a layer norm with learned scale keeps; length and divisor of a unit row."""


def activation_bytes(config: HSTUConfig | TransformerConfig, tokens: int, element_bytes: int = 4) -> int:
    """Bytes that the tower keeps for its backward, the loss and its look-ups not counted.

    The default HSTU keeps 6·D elements a token and layer; attention weights, u, v, q and k are computed again.

    Args:
        config: the model.
        tokens: T.
        element_bytes: of an activation; 4, as the platform trains.
    """
    block = block_elements(config) * element_bytes + _softmax_heads(config) * _LOG_SUM_BYTES
    last = (config.width + _NORM_STATISTICS) * element_bytes
    return tokens * (config.num_layers * block + last) + config.num_layers * _scaled_weights(config) * element_bytes


def block_elements(config: HSTUConfig | TransformerConfig) -> int:
    """Elements a token that one block keeps, the softmax's log-sums not counted."""
    D = config.width
    if isinstance(config, TransformerConfig):
        # x, queries, q, k, v, attended, the second norm's input and output; hidden before and after dropout
        return 8 * D + 2 * _NORM_STATISTICS + config.ffn_width * (2 if config.dropout else 1)
    HV, uvqk = config.num_heads * head_widths(config)[1], _projected(config)
    # x, what SiLU saw, attended; what it gave and the gate are computed again
    kept = D + uvqk + HV
    if _is_one_operation(config):
        return kept
    # what SiLU gave, the norm's output and statistics, and what the output projection reads
    return kept + uvqk + HV + _NORM_STATISTICS + (2 * HV + D if config.concat_ux else HV)


def gradient_elements(config: HSTUConfig | TransformerConfig) -> int:
    """Elements a token that the backward of one block holds at once, beside what the forward kept.

    The gradient that comes in and the one that goes out, the normalised input, and the gradients of what the widest
    layers gave and saw; where HSTU makes u, v, q and k again, those too.
    """
    if isinstance(config, TransformerConfig):
        return 3 * config.width + 2 * (2 * config.width + config.ffn_width)
    return 3 * config.width + (3 if _is_one_operation(config) else 2) * _projected(config)


def _is_one_operation(config: HSTUConfig) -> bool:
    """Whether the layer runs as `ops.block`, which keeps less."""
    return not config.affine_norm and not config.concat_ux and config.backend != "reference"


def _projected(config: HSTUConfig) -> int:
    """Width of u, v, q and k together."""
    return 2 * config.num_heads * sum(head_widths(config))


def _softmax_heads(config: HSTUConfig | TransformerConfig) -> int:
    softmax = isinstance(config, TransformerConfig) or config.activation == "softmax"
    return config.num_heads if softmax else 0


def _scaled_weights(config: HSTUConfig | TransformerConfig) -> int:
    """A learned scale of the input norm makes the projection a product of weights, which is kept."""
    if isinstance(config, TransformerConfig) or not config.affine_norm:
        return 0
    return _projected(config) * config.width
