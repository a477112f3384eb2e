"""The specification of HSTU attention: one sequence at a time, plain PyTorch, any dtype (eq. 2).

Shapes: m queries, n keys, H heads, Q query/key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.ops.bias import time_bucket
from hstu_dist.ops.call import AttentionCall
from hstu_dist.ops.mask import effective_position, visible
from hstu_dist.ops.spec import Activation


def attend(call: AttentionCall, sequence: int) -> Tensor:
    """Output [m, H, V] of one sequence, differentiable."""
    rows = slice(int(call.offsets[sequence]), int(call.offsets[sequence + 1]))
    key_rows = slice(int(call.key_offsets[sequence]), int(call.key_offsets[sequence + 1]))
    q_mHQ, k_nHQ, v_nHV = call.q[rows], call.k[key_rows], call.v[key_rows]
    length = k_nHQ.shape[0]
    contextual = 0 if call.num_contextual is None else int(call.num_contextual[sequence])
    targets = 0 if call.num_targets is None else int(call.num_targets[sequence])
    key_n = torch.arange(length, device=call.q.device)
    query_m = key_n[length - q_mHQ.shape[0] :]
    mask_mn = visible(query_m[:, None], key_n[None, :], (length, contextual, targets), call.spec)

    scores_Hmn = call.spec.alpha * torch.einsum("mhq,nhq->hmn", q_mHQ, k_nHQ)
    if call.position_weight is not None:
        N = (call.position_weight.numel() + 1) // 2
        distance_mn = (
            effective_position(key_n, length, targets)[None, :] - effective_position(query_m, length, targets)[:, None]
        )
        scores_Hmn = scores_Hmn + call.position_weight[N - 1 + distance_mn].to(scores_Hmn.dtype)
    if call.time_weight is not None and call.query_times is not None and call.key_times is not None:
        elapsed_mn = call.query_times[rows][:, None] - call.key_times[key_rows][None, :]
        scores_Hmn = scores_Hmn + call.time_weight[time_bucket(elapsed_mn)].to(scores_Hmn.dtype)

    if call.spec.activation is Activation.SOFTMAX:
        weights_Hmn = scores_Hmn.masked_fill(~mask_mn, -torch.inf).softmax(dim=-1)
    else:
        weights_Hmn = (F.silu(scores_Hmn) / call.spec.normalizer).masked_fill(~mask_mn, 0.0)
    return torch.einsum("hmn,nhv->mhv", weights_Hmn, v_nHV)


def attention(call: AttentionCall) -> Tensor:
    """Output [T, H, V] of all sequences; autograd differentiates it, any number of times."""
    # an empty slice that depends on every argument keeps a batch without sequences in the graph:
    # data-parallel ranks wait for a gradient of each parameter, also from a rank that has no sequence
    rest = [x for x in (call.q, call.k, call.position_weight, call.time_weight) if x is not None]
    nothing = call.v[:0] + sum(x.sum() for x in rest)
    return torch.cat([nothing, *(attend(call, b) for b in range(call.offsets.numel() - 1))])
