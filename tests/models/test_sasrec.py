"""SASRec equals an independent implementation on padded tensors, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.models.config import TransformerConfig
from hstu_dist.models.tower import Tower
from hstu_dist.models.transformer import TransformerBlock
from tests.models.cases import VARIANTS, batch_of, encode, tower_of

LENGTHS = [20, 1, 7, 0, 13]


def padded_block(block: TransformerBlock, x_BND: Tensor, heads: int) -> Tensor:
    """The published block: attention(norm(x), x, x) + norm(x), norm, then ReLU feed-forward with a residual."""
    N, D = x_BND.shape[1:]
    normed = F.layer_norm(x_BND, (D,), block.query_norm.weight, block.query_norm.bias, 1e-8)
    out, _ = F.multi_head_attention_forward(
        *(x.transpose(0, 1) for x in (normed, x_BND, x_BND)),
        embed_dim_to_check=D,
        num_heads=heads,
        in_proj_weight=torch.cat([block.query.weight, block.key_value.weight]),
        in_proj_bias=torch.cat([block.query.bias, block.key_value.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=block.output.weight,
        out_proj_bias=block.output.bias,
        attn_mask=torch.triu(torch.ones(N, N, dtype=torch.bool), diagonal=1),
    )
    x = F.layer_norm(normed + out.transpose(0, 1), (D,), block.ffn_norm.weight, block.ffn_norm.bias, 1e-8)
    return x + F.relu(x @ block.ffn_in.weight.T + block.ffn_in.bias) @ block.ffn_out.weight.T + block.ffn_out.bias


def padded_tower(tower: Tower, items_TD: Tensor, lengths: list[int], heads: int) -> Tensor:
    D, N = items_TD.shape[1], max(lengths)
    rows = torch.stack([F.pad(part, (0, 0, 0, N - len(part))) for part in items_TD.split(lengths)])
    x = rows * D**0.5 + tower.position.weight[:N]
    for block in cast(list[TransformerBlock], list(tower.encoder.get_submodule("layers").children())):
        x = padded_block(block, x, heads)
    out = torch.cat([x[b, :n] for b, n in enumerate(lengths)])
    return out / out.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_equals_a_padded_implementation(backend: str, heads: int) -> None:
    config = cast(TransformerConfig, replace(VARIANTS["sasrec"], backend=backend, num_heads=heads))
    tower = tower_of(config).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            # norms and biases away from 1 and 0, so that forgetting one shows
            parameter += 0.1 * torch.randn_like(parameter)
    items = torch.randn(sum(LENGTHS), config.width, dtype=torch.float64)
    cotangent = torch.randn_like(items)

    def run(out: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*tower.named_parameters(), strict=True)
        return {"out": out, **dict(zip(names, torch.autograd.grad(out, parameters, cotangent), strict=True))}

    ours = run(encode(tower, items, batch_of(LENGTHS)))
    expected = run(padded_tower(tower, items, LENGTHS, heads))
    for name, value in expected.items():
        # float64 sums in another order
        assert torch.allclose(ours[name], value, rtol=1e-9, atol=1e-11), name
