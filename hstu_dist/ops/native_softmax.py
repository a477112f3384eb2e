"""The native softmax losses: one C call for loss and gradients; half-precision tensors are computed in float32.

Importing this module loads the library and raises ImportError where that fails.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.ops.native import LIBRARY, check_on_cpu
from hstu_dist.ops.native_abi import Isa, SoftmaxLoss, Status
from hstu_dist.ops.softmax_spec import LossAndGradients, SoftmaxSpec

_ROW_MULTIPLE = 16
"""The kernels read rows of items by whole vectors."""


def loss_and_gradients(
    queries_TD: Tensor,
    items_CD: Tensor,
    positive_T: Tensor,
    negative_TR: Tensor | None,
    spec: SoftmaxSpec,
    isa: Isa = Isa.AUTO,
) -> LossAndGradients:
    """As in SoftmaxKernel: the same bits on every run and any number of threads; `isa` is AUTO except in tests."""
    check_on_cpu("softmax backend native", queries_TD)
    dtype = torch.float64 if queries_TD.dtype == torch.float64 else torch.float32
    queries, items = queries_TD.to(dtype), items_CD.to(dtype)
    width = queries.shape[1]
    if width % _ROW_MULTIPLE:
        items = F.pad(items, (0, -width % _ROW_MULTIPLE))
    loss = torch.empty((), dtype=torch.float64)
    d_queries, d_items = torch.empty_like(queries), torch.zeros_like(items)
    call = SoftmaxLoss(
        bytes=ctypes.sizeof(SoftmaxLoss),
        threads=torch.get_num_threads(),
        isa=isa,
        is_double=dtype == torch.float64,
        positions=queries.shape[0],
        candidates=items.shape[0],
        negatives=0 if negative_TR is None else negative_TR.shape[1],
        width=width,
        stride=items.shape[1],
        temperature=spec.temperature,
        shift=-spec.log_expected_count,
        queries=queries.data_ptr(),
        items=items.data_ptr(),
        positive=positive_T.data_ptr(),
        is_full=negative_TR is None,
        negative=None if negative_TR is None else negative_TR.data_ptr(),
        loss=loss.data_ptr(),
        grad_queries=d_queries.data_ptr(),
        grad_items=d_items.data_ptr(),
    )
    status = LIBRARY.hstu_softmax_loss(ctypes.byref(call))
    if status == Status.OUT_OF_MEMORY:
        raise MemoryError("native softmax loss: its workspace could not be allocated")
    if status != Status.OK:
        raise RuntimeError(f"native softmax loss: the library refused the call ({Status(status).name})")
    return LossAndGradients(*(x.to(queries_TD.dtype) for x in (loss, d_queries, d_items[:, :width])))
