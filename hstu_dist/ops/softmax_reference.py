"""The specification of the softmax losses: plain PyTorch on whole tensors, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_dist.ops.softmax_spec import MASKED, SoftmaxSpec


def softmax_loss(
    queries_TD: Tensor, items_CD: Tensor, positive_T: Tensor, negative_TR: Tensor | None, spec: SoftmaxSpec
) -> Tensor:
    """As the door's; materialises [T, R, D] for sampled and [T, C] for full softmax."""
    found_T = (queries_TD * items_CD[positive_T]).sum(1) / spec.temperature
    if negative_TR is None:
        all_TC = queries_TD @ items_CD.T / spec.temperature
        return (all_TC.logsumexp(1) - found_T).sum()
    scores_TR = (queries_TD[:, None] * items_CD[negative_TR]).sum(2) / spec.temperature - spec.log_expected_count
    scores_TR = scores_TR.masked_fill(negative_TR == positive_T[:, None], MASKED)
    return (torch.cat([found_T[:, None], scores_TR], 1).logsumexp(1) - found_T).sum()
