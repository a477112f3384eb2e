"""One HSTU layer reproduces output and gradients of the paper's public code on every CPU backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu_dist.models.config import HSTUConfig
from hstu_dist.models.context import SequenceContext
from hstu_dist.models.hstu import HSTULayer
from hstu_dist.ops import backends
from hstu_dist.ops.jagged import positions
from hstu_dist.ops.spec import Backend, JaggedLayout

# both sides rounded to fp32, which cost 9e-7 of the largest element when measured in float64;
# a normaliser of 20 instead of 19 costs 5e-4
TOLERANCE = 32 * torch.finfo(torch.float32).eps


def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parents[1] / "golden" / "hstu_layer.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def context_of(values: dict[str, Tensor]) -> SequenceContext:
    offsets, padded = values["offsets"], values["timestamps_padded"]
    following = torch.cat([padded[:, 1:], padded[:, -1:]], dim=1)
    present = torch.arange(padded.shape[1]) < values["lengths"][:, None]
    return SequenceContext(
        layout=JaggedLayout(offsets),
        positions=positions(offsets),
        query_times=following[present],
        key_times=padded[present],
        noise=None,
    )


def layer_of(values: dict[str, Tensor], backend: Backend) -> HSTULayer:
    longest = int(values["max_seq_len"])
    config = HSTUConfig(
        width=values["x"].shape[1],
        num_heads=int(values["num_heads"]),
        qk_width=int(values["dqk"]),
        value_width=int(values["dv"]),
        max_length=longest,
        normalizer=longest,
    )
    layer = HSTULayer(config, backend, backends.row_kernels(backend))
    layer.load_state_dict(
        {
            "uvqk.weight": values["param._uvqk"].T,
            "output.weight": values["param._o.weight"],
            "output.bias": values["param._o.bias"],
            "position_weight": values["param._rel_attn_bias._pos_w"],
            "time_weight": values["param._rel_attn_bias._ts_w"],
        }
    )
    return layer


@pytest.mark.parametrize("backend", backends.available(torch.device("cpu")))
def test_layer_equals_the_public_code(backend: Backend) -> None:
    values = golden()
    layer = layer_of(values, backend)
    x = values["x"].clone().requires_grad_()
    y = layer(x, context_of(values), layer=0)
    y.backward(values["cotangent"])
    position, time = layer.position_weight, layer.time_weight
    assert x.grad is not None and position is not None and time is not None
    for name, got, expected in (
        ("y", y.detach(), values["y"]),
        ("x", x.grad, values["grad_x"]),
        ("uvqk", layer.uvqk.weight.grad, values["grad._uvqk"].T),
        ("output weight", layer.output.weight.grad, values["grad._o.weight"]),
        ("output bias", layer.output.bias.grad, values["grad._o.bias"]),
        ("positions", position.grad, values["grad._rel_attn_bias._pos_w"]),
        ("times", time.grad, values["grad._rel_attn_bias._ts_w"]),
    ):
        assert got is not None and got.shape == expected.shape, name
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, f"{name}: {error:.1e} of the largest element"
