"""Memory-linear HSTU attention in plain PyTorch, on any device: the fallback where no fast kernel runs.

Sequences of similar length are padded together into groups, and each group is processed in blocks of
queries against all their keys, so that no temporary exceeds a fixed budget. The backward recomputes the
scores. Shapes: G sequences of a group, b queries of a block, n keys, H heads, Q and V widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_dist.ops.bias import time_bucket
from hstu_dist.ops.call import AttentionCall, Gradients
from hstu_dist.ops.mask import effective_position, visible
from hstu_dist.ops.spec import Activation

_BUDGET = 1 << 20
"""Elements of one [G, H, b, n] temporary: small enough to stay in a CPU's caches."""

_MAX_PADDING = 1.15
"""How much longer than its group's shortest sequence the longest may be."""


@dataclass(frozen=True)
class _Block:
    """A block of queries of a group of sequences, and the keys it can see; rows are clamped to be legal."""

    query_rows_Gb: Tensor
    key_rows_Gn: Tensor
    mask_Gbn: Tensor
    distance_Gbn: Tensor


def _groups(call: AttentionCall) -> Iterator[Tensor]:
    """Indices of sequences with at least one query, grouped by similar key length."""
    heads = call.q.shape[1]
    lengths = call.key_offsets.diff().cpu()
    order = lengths.argsort(stable=True)
    order = order[call.offsets.diff().cpu()[order] > 0]
    sizes = lengths[order].tolist()
    start = 0
    for end in range(1, len(sizes) + 1):
        full = end == len(sizes) or sizes[end] > sizes[start] * _MAX_PADDING + 8
        # a group of one is always allowed; more must fit 16 queries into the budget
        if full or (end - start + 1) * heads * 16 * sizes[end] > _BUDGET:
            yield order[start:end].to(call.q.device)
            start = end


def _blocks(call: AttentionCall, group: Tensor) -> Iterator[_Block]:
    starts, ends = call.offsets[group], call.offsets[group + 1]
    key_starts, key_ends = call.key_offsets[group], call.key_offsets[group + 1]
    length_G11 = (key_ends - key_starts)[:, None, None]
    cached = (key_ends - key_starts) - (ends - starts)
    contextual_G11 = _counts(call.num_contextual, group)
    targets_G11 = _counts(call.num_targets, group)
    max_keys = int(length_G11.max())
    first = int(cached.min())
    step = max(1, _BUDGET // (group.numel() * call.q.shape[1] * max_keys))
    # a contextual token sees contextual tokens after itself
    prefix = int(contextual_G11.max())
    for begin in range(first, max_keys, step):
        stop = min(begin + step, max_keys)
        query_b = torch.arange(begin, stop, device=group.device)
        key_n = torch.arange(max(stop, min(prefix, max_keys)), device=group.device)
        sizes = (length_G11, contextual_G11, targets_G11)
        mask = visible(query_b[None, :, None], key_n[None, None, :], sizes, call.spec)
        mask &= query_b[None, :, None] >= cached[:, None, None]
        distance = effective_position(key_n[None, None, :], length_G11, targets_G11) - effective_position(
            query_b[None, :, None], length_G11, targets_G11
        )
        rows = starts[:, None] + (query_b[None, :] - cached[:, None]).clamp(min=0)
        key_rows = key_starts[:, None] + key_n[None, :]
        yield _Block(
            torch.minimum(rows, ends[:, None] - 1), torch.minimum(key_rows, key_ends[:, None] - 1), mask, distance
        )


def _counts(counts: Tensor | None, group: Tensor) -> Tensor:
    per_sequence = torch.zeros_like(group) if counts is None else counts[group]
    return per_sequence[:, None, None]


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """[rows..., H, W] → [G, H, rows, W], in the dtype that accumulates."""
    return x[rows].transpose(1, 2).to(_accumulator(x.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True)
class _Scores:
    """Scores of a block, and the table entries that their bias came from."""

    raw_GHbn: Tensor
    position_index: Tensor | None
    bucket: Tensor | None


def _scores(call: AttentionCall, block: _Block, q_GHbQ: Tensor, k_GHnQ: Tensor) -> _Scores:
    raw = torch.matmul(q_GHbQ * call.spec.alpha, k_GHnQ.transpose(-1, -2))
    position_index = bucket = None
    bias: Tensor | None = None
    if call.position_weight is not None:
        N = (call.position_weight.numel() + 1) // 2
        # padding rows can be further apart than N: they are masked, the index must only be legal
        position_index = (N - 1 + block.distance_Gbn).clamp_(0, 2 * N - 2)
        bias = call.position_weight[position_index]
    if call.time_weight is not None and call.query_times is not None and call.key_times is not None:
        elapsed = call.query_times[block.query_rows_Gb][:, :, None] - call.key_times[block.key_rows_Gn][:, None, :]
        bucket = time_bucket(elapsed)
        bias = call.time_weight[bucket] if bias is None else bias + call.time_weight[bucket]
    if bias is not None:
        raw += bias[:, None].to(raw.dtype)
    return _Scores(raw, position_index, bucket)


def _weights(call: AttentionCall, block: _Block, scores: Tensor) -> Tensor:
    hidden = ~block.mask_Gbn[:, None]
    if call.spec.activation is Activation.SOFTMAX:
        # padding queries see nothing: their NaN rows become zeros
        return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)
    return (torch.nn.functional.silu(scores) / call.spec.normalizer).masked_fill_(hidden, 0.0)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output [T, H, V]; the backward recomputes, so no log-sum-exp."""
    out = call.v.new_zeros(call.q.shape[0], *call.v.shape[1:])
    for group in _groups(call):
        for block in _blocks(call, group):
            q, k, v = (
                _gather(call.q, block.query_rows_Gb),
                _gather(call.k, block.key_rows_Gn),
                _gather(call.v, block.key_rows_Gn),
            )
            weights = _weights(call, block, _scores(call, block, q, k).raw_GHbn)
            _add_rows(out, block.query_rows_Gb, torch.matmul(weights, v))
    return out, call.q.new_empty(0, dtype=torch.float32)


def _add_rows(total: Tensor, rows: Tensor, values_GHrW: Tensor) -> None:
    """Adds block values to their rows; padding rows carry zeros."""
    flat = values_GHrW.transpose(1, 2).reshape(-1, *total.shape[1:])
    total.index_add_(0, rows.reshape(-1), flat.to(total.dtype))


def _score_gradient(call: AttentionCall, block: _Block, raw: Tensor, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Attention weights and the gradient of the scores, for the gradient of the weights."""
    weights = _weights(call, block, raw)
    if call.spec.activation is Activation.SOFTMAX:
        return weights, weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    sigmoid = raw.sigmoid()
    slope = sigmoid * (1 + raw * (1 - sigmoid)) / call.spec.normalizer
    return weights, (grad_weights * slope).masked_fill_(~block.mask_Gbn[:, None], 0.0)


def backward(call: AttentionCall, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
    """Gradients of q, k, v and of the bias weights, block by block."""
    wide = _accumulator(call.q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (call.q, call.k, call.v))
    # float64: one table entry sums the gradients of every pair of events
    d_position, d_time = (
        None if w is None else torch.zeros_like(w, dtype=torch.float64)
        for w in (call.position_weight, call.time_weight)
    )
    for group in _groups(call):
        for block in _blocks(call, group):
            q, k = _gather(call.q, block.query_rows_Gb), _gather(call.k, block.key_rows_Gn)
            v, g = _gather(call.v, block.key_rows_Gn), _gather(grad_out, block.query_rows_Gb)
            scores = _scores(call, block, q, k)
            weights, d_scores = _score_gradient(call, block, scores.raw_GHbn, torch.matmul(g, v.transpose(-1, -2)))
            _add_rows(dq, block.query_rows_Gb, torch.matmul(d_scores, k) * call.spec.alpha)
            _add_rows(dk, block.key_rows_Gn, torch.matmul(d_scores.transpose(-1, -2), q) * call.spec.alpha)
            _add_rows(dv, block.key_rows_Gn, torch.matmul(weights.transpose(-1, -2), g))
            d_bias = d_scores.sum(1).reshape(-1)
            for table, index in ((d_position, scores.position_index), (d_time, scores.bucket)):
                if table is not None and index is not None:
                    table.index_add_(0, index.reshape(-1), d_bias.to(table.dtype))
    return Gradients(
        dq.to(call.q.dtype),
        dk.to(call.k.dtype),
        dv.to(call.v.dtype),
        None if d_position is None else d_position.to(call.position_weight.dtype),  # type: ignore[union-attr]
        None if d_time is None else d_time.to(call.time_weight.dtype),  # type: ignore[union-attr]
    )
