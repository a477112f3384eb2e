"""The one public door of the softmax losses: checks a call, then hands it to the chosen backend.

    loss = softmax_loss(queries, items, positive, negative, SoftmaxSpec(temperature=0.05))

Shapes: T positions, C candidates, R negatives, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hstu_dist.ops import backends, softmax_reference
from hstu_dist.ops.softmax_spec import SoftmaxBackend, SoftmaxSpec, check_call


def softmax_loss(
    queries_TD: Tensor, items_CD: Tensor, positive_T: Tensor, negative_TR: Tensor | None, spec: SoftmaxSpec
) -> Tensor:
    """Sum over positions of -log softmax at the positive, among its negatives or among all items.

    A negative that equals its positive scores -5e4 and passes no gradient on.

    Args:
        queries_TD: [T, D] floating, contiguous like all arguments.
        items_CD: [C, D], dtype of the queries.
        positive_T: [T] int64, the row of `items_CD` that each position should find.
        negative_TR: [T, R] int64, rows of `items_CD`; None: all of them (full softmax).
        spec: temperature, correction and backend.

    Returns:
        Scalar, dtype of the queries; gradients reach queries and items.

    Raises:
        ValueError: a shape, dtype, device, stride or place that does not fit; nothing was computed.
        UserError: the chosen backend does not run on this machine.
    """
    check_call(queries_TD, items_CD, positive_T, negative_TR)
    if spec.backend is SoftmaxBackend.REFERENCE:
        return softmax_reference.softmax_loss(queries_TD, items_CD, positive_T, negative_TR, spec)
    loss: Tensor = _SoftmaxLoss.apply(queries_TD, items_CD, positive_T, negative_TR, spec)  # type: ignore[no-untyped-call]
    return loss


class _SoftmaxLoss(Function):
    """Finds the gradients together with the loss, so that no score needs to be kept or computed again."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Tensor, positive: Tensor, negative: Tensor | None, spec: SoftmaxSpec
    ) -> Tensor:
        kernel = backends.softmax_kernel(spec.backend)
        found = kernel.loss_and_gradients(queries, items, positive, negative, spec)
        ctx.save_for_backward(found.queries, found.items)
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_queries, d_items = ctx.saved_tensors
        return d_queries * grad, d_items * grad, None, None, None
