"""What a layer keeps for its backward, counted with saved-tensor hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_dist.models.config import HSTUConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.hstu import HSTULayer
from hstu_dist.ops import backends
from tests.models.cases import MAX_LENGTH, batch_of

CONFIG = HSTUConfig(width=48, num_heads=2, max_length=MAX_LENGTH, dropout=0.2)


def saved_elements(config: HSTUConfig) -> float:
    """Elements per token of the distinct storages that one layer saves, parameters and the batch's layout left out."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    backend = backends.fastest(device)
    layer = HSTULayer(config, backend, backends.row_kernels(backend))
    batch = batch_of([MAX_LENGTH] * 20)
    context = sequence_context(batch, config.max_length, noise_key=1)
    known = {x.untyped_storage().data_ptr() for x in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        # times, offsets and other integers are computed once a batch, for all layers
        if x.is_floating_point() and storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = layer(torch.randn(batch.num_tokens, config.width, requires_grad=True), context, 0)
    out.sum().backward()
    return sum(sizes.values()) / batch.num_tokens


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_layer_saves_six_widths_per_token(dropout: float) -> None:
    # x, pre-activations (4), attended; the paper counts 14 bytes in bfloat16, which is 7 (section 3.3.2)
    assert saved_elements(replace(CONFIG, dropout=dropout)) == 6 * CONFIG.width


def test_the_count_sees_what_a_wasteful_layer_saves() -> None:
    lean, wasteful = saved_elements(CONFIG), saved_elements(replace(CONFIG, affine_norm=True, concat_ux=True))
    assert wasteful >= lean + 3 * CONFIG.width
