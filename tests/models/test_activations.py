"""The closed form of what a tower keeps equals what autograd saves, counted with saved-tensor hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plan_ranks import saved_bytes
from hstu_dist.models.activations import activation_bytes, block_elements
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from tests.models.cases import VARIANTS

SEQUENCES = 20

CONFIGS: dict[str, HSTUConfig | TransformerConfig] = {
    # of truncated layers the closed form is a bound: it counts all tokens
    **{name: config for name, config in VARIANTS.items() if name != "truncated"},
    "concat": HSTUConfig(width=16, num_heads=2, max_length=20, concat_ux=True),
    "affine": HSTUConfig(width=16, num_heads=2, max_length=20, affine_norm=True, value_width=4),
    "blocked": HSTUConfig(width=16, num_heads=2, max_length=20, relative_bias="none", backend="blocked"),
    "deep": HSTUConfig(width=32, num_heads=4, max_length=20, num_layers=5),
    "wide": TransformerConfig(width=16, num_heads=4, max_length=20, num_layers=3, ffn_width=64),
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_closed_form_is_what_autograd_saves(name: str, dropout: float) -> None:
    config = replace(CONFIGS[name], dropout=dropout)
    measured = saved_bytes(config, SEQUENCES)
    assert activation_bytes(config, SEQUENCES * config.max_length) == measured


def test_the_paper_layer_keeps_six_widths_a_token() -> None:
    # x, pre-activations (4), attended
    assert block_elements(HSTUConfig(width=64, num_heads=4)) == 6 * 64


def test_it_grows_with_tokens_and_shrinks_with_the_element() -> None:
    config = CONFIGS["deep"]
    assert activation_bytes(config, 200) == 2 * activation_bytes(config, 100)
    assert activation_bytes(config, 100, element_bytes=2) == activation_bytes(config, 100) // 2
