"""Every variant of the tower runs, learns, looks backwards only, and survives batches with nothing in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_dist.errors import UserError
from hstu_dist.models import hstu, transformer
from hstu_dist.models import tower as tower_module
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.ops import backends
from hstu_dist.ops.random import TokenNoise
from tests.models.cases import MAX_LENGTH, VARIANTS, batch_of, encode, tower_of

BACKENDS = [str(backend) for backend in backends.available(torch.device("cpu"))]
variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
def test_a_gradient_reaches_every_parameter_and_following_it_helps(variant: str) -> None:
    config = VARIANTS[variant]
    tower = tower_of(config)
    batch = batch_of([MAX_LENGTH, 3, 0, 11, 1])
    items = torch.randn(batch.num_tokens, config.width, requires_grad=True)
    wanted = torch.nn.functional.normalize(torch.randn(batch.num_tokens, config.width), dim=1)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-2)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        out = encode(tower, items, batch, noise_key=step)
        loss = -(out * wanted).sum(1).mean()
        loss.backward()
        assert torch.allclose(out.norm(dim=1), torch.ones(batch.num_tokens), atol=1e-5)
        for name, parameter in tower.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name}: no gradient reaches it"
        losses.append(float(loss.detach()))
        optimizer.step()
    assert items.grad is not None and items.grad.abs().sum(1).gt(0).all()
    assert losses[-1] < losses[0]


@variants
def test_dropout_is_off_in_evaluation_and_random_in_training(variant: str) -> None:
    tower = tower_of(VARIANTS[variant])
    batch = batch_of([9, 4])
    items = torch.randn(batch.num_tokens, tower.width)
    evaluated = encode(tower, items, batch)
    assert torch.equal(evaluated, encode(tower, items, batch))
    trained = encode(tower, items, batch, noise_key=3)
    assert torch.equal(trained, encode(tower, items, batch, noise_key=3))
    assert not torch.equal(trained, encode(tower, items, batch, noise_key=4))
    assert not torch.equal(trained, evaluated)


@variants
def test_every_dropout_draws_numbers_of_its_own(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []

    def record(noise: TokenNoise | None, rate: float) -> None:
        assert noise is not None and rate == 0.2
        keys.append(noise.key)

    for module in (hstu, tower_module, transformer):
        monkeypatch.setattr(module, "drop_of", record)
    tower, batch = tower_of(VARIANTS[variant]), batch_of([3])
    for step in range(2):
        encode(tower, torch.randn(3, tower.width), batch, noise_key=step)
    # two layers of one or three, and the input
    assert len(set(keys)) == len(keys) == 2 * (7 if variant == "sasrec" else 3)


@variants
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_and_other_sequences_change_nothing(variant: str, backend: str) -> None:
    tower = tower_of(replace(VARIANTS[variant], backend=backend))
    before = batch_of([6, MAX_LENGTH, 5])
    items = torch.randn(before.num_tokens, tower.width)
    # row 8 of the second sequence and everything after it there: items, times and prediction times
    changed = torch.zeros(before.num_tokens, dtype=torch.bool)
    changed[6 + 8 : 6 + MAX_LENGTH] = True
    after = replace(
        before,
        timestamps=before.timestamps + changed * 9_999_999,
        query_times=before.query_times + changed * 77_777_777,
    )
    other_items = items + changed[:, None] * torch.randn_like(items)
    a, b = encode(tower, items, before), encode(tower, other_items, after)
    assert torch.equal(a[~changed], b[~changed])
    assert (a[changed] != b[changed]).any(dim=1).all()


@pytest.mark.slow
@variants
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 2)], ids=str)
def test_batches_with_nothing_in_them(variant: str, backend: str, lengths: tuple[int, ...]) -> None:
    tower = tower_of(replace(VARIANTS[variant], backend=backend))
    batch = batch_of(lengths)
    items = torch.randn(batch.num_tokens, tower.width, requires_grad=True)
    out = encode(tower, items, batch, noise_key=1)
    assert out.shape == (batch.num_tokens, tower.width) and out.isfinite().all()
    out.sum().backward()
    for name, parameter in tower.named_parameters():
        # None would leave the ranks of a data-parallel group waiting for each other
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert sum(lengths) or not parameter.grad.any(), name


@pytest.mark.parametrize("relative_bias", ["none", "position", "position_time"])
def test_only_the_chosen_bias_is_learned(relative_bias: str) -> None:
    names = dict(tower_of(HSTUConfig(width=8, relative_bias=relative_bias)).named_parameters())
    assert ("encoder.layers.0.position_weight" in names) == (relative_bias != "none")
    assert ("encoder.layers.0.time_weight" in names) == (relative_bias == "position_time")


def test_time_matters_only_with_the_time_bias() -> None:
    batch = batch_of([12])
    items = torch.randn(12, 12)
    later = replace(batch, query_times=batch.query_times + 10**8)

    def differs(config: HSTUConfig | TransformerConfig) -> bool:
        tower = tower_of(config)
        return not torch.equal(encode(tower, items, batch), encode(tower, items, later))

    assert differs(VARIANTS["paper"])
    assert not differs(VARIANTS["position"]) and not differs(VARIANTS["sasrec"])


def test_initial_values_are_the_public_code_s() -> None:
    tower = tower_of(HSTUConfig(width=64, num_heads=4, max_length=500))

    def std(name: str) -> float:
        return float(tower.get_parameter(name).detach().std())

    layer = "encoder.layers.1."
    assert std(f"{layer}uvqk.weight") == pytest.approx(0.02, rel=0.03)
    assert std(f"{layer}position_weight") == pytest.approx(0.02, rel=0.1)
    assert std(f"{layer}time_weight") == pytest.approx(0.02, rel=0.2)
    # xavier uniform: sqrt(2 / (64 + 64)); truncated at two deviations: 0.8796 of sqrt(1 / 64)
    assert std(f"{layer}output.weight") == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert std("position.weight") == pytest.approx(0.8796 / 8, rel=0.03)
    assert float(tower.get_parameter("position.weight").detach().abs().max()) <= 2 / 8
    assert not tower.get_parameter(f"{layer}output.bias").any()


def test_items_are_scaled_before_positions_are_added() -> None:
    tower = tower_of(HSTUConfig(width=9, num_layers=1))
    with torch.no_grad():
        # without the encoder the output is the normalised input
        torch.nn.init.zeros_(tower.get_parameter("encoder.layers.0.output.weight"))
    batch = batch_of([3, 2])
    items = torch.randn(5, 9)
    expected: Tensor = 3 * items + tower.position.weight[[0, 1, 2, 0, 1]]
    assert torch.allclose(encode(tower, items, batch), torch.nn.functional.normalize(expected, dim=1), atol=1e-6)


def test_a_backend_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match="attention backend triton"):
        encode(tower_of(HSTUConfig(width=8, backend="triton")), torch.randn(3, 8), batch_of([3]))
