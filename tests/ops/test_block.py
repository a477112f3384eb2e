"""The layer as one operation equals its three parts, output and every gradient, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hstu_dist.ops import backends
from hstu_dist.ops.attention import hstu_attention
from hstu_dist.ops.bias import RelativeBias
from hstu_dist.ops.block import BlockBatch, BlockSpec, hstu_block
from hstu_dist.ops.random import Drop, TokenNoise
from hstu_dist.ops.rows import Projection, gated_output, project_silu
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend, JaggedLayout

BACKENDS = [b for b in backends.available(torch.device("cpu")) if b is not Backend.REFERENCE]
D, H, Q, V = 10, 2, 3, 5
LONGEST = 9


def leaves(biased: bool, tables: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = {"x": (15, D), "weight": (2 * H * (Q + V), D), "out_weight": (D, H * V)}
    if biased:
        shapes |= {"bias": (2 * H * (Q + V),), "out_bias": (D,)}
    for name, size in list({"position": 2 * LONGEST - 1, "time": 129}.items())[:tables]:
        shapes[name] = (size,)
    return {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def batch_of(given: dict[str, Tensor], drop: Drop | None) -> BlockBatch:
    times = torch.arange(16) * 977
    bias = None
    if "position" in given:
        timed = {"query_times": times[1:], "key_times": times[:-1]} if "time" in given else {}
        bias = RelativeBias(position_weight=given["position"], time_weight=given.get("time"), **timed)
    return BlockBatch(layout=JaggedLayout(torch.tensor([0, 9, 9, 10, 15])), bias=bias, drop=drop)


def in_parts(given: dict[str, Tensor], spec: BlockSpec, batch: BlockBatch) -> Tensor:
    widths = (H * V, H * V, H * Q, H * Q)
    u, v, q, k = project_silu(given["x"], Projection(given["weight"], given.get("bias")), widths, spec.kernels)
    heads = [x.view(15, H, -1) for x in (q, k, v)]
    attended = hstu_attention(*heads, batch.layout, spec.attention, batch.bias).flatten(1)
    output = Projection(given["out_weight"], given.get("out_bias"))
    return gated_output(given["x"], attended, u, output, batch.drop, spec.kernels)


def as_one(given: dict[str, Tensor], spec: BlockSpec, batch: BlockBatch) -> Tensor:
    projection = Projection(given["weight"], given.get("bias"))
    return hstu_block(given["x"], projection, Projection(given["out_weight"], given.get("out_bias")), spec, batch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(("biased", "tables", "dropped"), [(False, 0, False), (True, 2, True), (True, 1, False)])
def test_it_equals_its_parts(
    backend: Backend, activation: Activation, biased: bool, tables: int, dropped: bool
) -> None:
    given = leaves(biased, tables)
    kernels = backends.row_kernels(backend)
    attention = AttentionSpec(normalizer=7.0, activation=activation, backend=backend)
    spec = BlockSpec(heads=H, qk_width=Q, value_width=V, attention=attention, kernels=kernels)
    batch = batch_of(given, Drop(TokenNoise(11, torch.arange(15)), 0.3) if dropped else None)
    grad = torch.randn(15, D, dtype=torch.float64)
    found = []
    for layer in (in_parts, as_one):
        out = layer(given, spec, batch)
        found.append([out, *torch.autograd.grad(out, list(given.values()), grad)])
    for name, expected, actual in zip(["out", *given], *found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert actual.any(), name


def test_a_call_that_does_not_fit_is_refused_before_anything_is_computed() -> None:
    given = leaves(False, 0)
    attention = AttentionSpec(normalizer=7.0, backend=Backend.BLOCKED)
    kernels = backends.row_kernels(Backend.BLOCKED)
    spec = BlockSpec(heads=H, qk_width=Q, value_width=V, attention=attention, kernels=kernels)
    batch = BlockBatch(layout=JaggedLayout(torch.tensor([0, 3])), bias=None, drop=None)
    with pytest.raises(ValueError, match="offsets"):
        as_one(given, spec, batch)
