"""The tower in bfloat16: what is rounded, what is not, and how far the result moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import claim_precision, process_group
from hstu_dist.errors import UserError
from hstu_dist.ops import backends
from hstu_dist.ops.spec import Backend
from hstu_dist.train.state import TrainState
from tests.distributed.cases import LossHook, build, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks

BACKENDS = [str(backend) for backend in backends.available(torch.device("cpu")) if backend is not Backend.REFERENCE]
FSDP = "trainer.parallel.kind=fsdp"


def seen(module: nn.Module, inputs: tuple[Any, ...], output: Tensor, dtypes: set[torch.dtype]) -> None:
    dtypes.add(output.dtype)


def train_in(data: Path, precision: str, *overrides: str) -> dict[str, Any]:
    """Losses of an epoch, the dtypes of what layers give, and of everything that is kept."""
    with process_group("cpu", 60) as world:
        config = tiny_config(data, Path("unused"), f"trainer.precision={precision}", *overrides)
        session = build(config, world)
        dtypes: set[torch.dtype] = set()
        for layer in session.recommender.tower.encoder.get_submodule("layers").children():
            layer.register_forward_hook(lambda *call: seen(*call, dtypes))
        losses: list[float] = []
        trainer_of(session, TrainState(), 1, [LossHook(losses)]).fit()
        batch = next(session.loader(Split.TEST).epoch(0))
        vectors = session.recommender.encode_local(session.recommender.corpus()[batch.item_ids], batch)
        kept = {value.dtype for value in session.tensors().values() if value.size()}
        return {"losses": losses, "layers": dtypes, "kept": kept, "vectors": vectors}


@pytest.fixture(scope="module")
def exact(tiny_data: Path) -> dict[str, Any]:
    return run_ranks(1, train_in, tiny_data, "float32")[0]


@pytest.mark.distributed
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["hstu", "sasrec"])
def test_layers_compute_in_bfloat16_and_everything_kept_is_float32(
    backend: str, model: str, exact: dict[str, Any], tiny_data: Path
) -> None:
    (found,) = run_ranks(1, train_in, tiny_data, "bfloat16", f"model={model}", f"model.backend={backend}")
    assert found["layers"] == {torch.bfloat16} and found["kept"] == {torch.float32}
    assert found["vectors"].dtype == torch.float32
    # unit length to float32's accuracy, not to bfloat16's
    assert (found["vectors"].norm(dim=1) - 1).abs().max() < 1e-6
    if model == "hstu":
        assert exact["layers"] == {torch.float32}
        assert found["losses"] != exact["losses"] and found["losses"] == pytest.approx(exact["losses"], rel=0.02)


def gradients_of(data: Path, precision: str) -> dict[str, Tensor]:
    with process_group("cpu", 60) as world:
        session = build(tiny_config(data, Path("unused"), f"trainer.precision={precision}"), world)
        batch = next(session.loader(Split.TRAIN).epoch(0))
        items = session.recommender.corpus()[batch.item_ids]
        vectors = session.recommender.encode(items, batch, noise_key=1)
        goal = torch.sin(torch.arange(vectors.numel(), dtype=torch.float32)).view_as(vectors)
        (vectors * goal).sum().backward()
        return {name: p.grad for name, p in session.recommender.tower.named_parameters() if p.grad is not None}


@pytest.mark.distributed
def test_gradients_are_those_of_float32_up_to_bfloat16_s_rounding(tiny_data: Path) -> None:
    (exact,), (rounded,) = (run_ranks(1, gradients_of, tiny_data, p) for p in ("float32", "bfloat16"))
    assert rounded.keys() == exact.keys() and len(exact) > 5
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        # 8 bits of mantissa: 0.4% a rounding
        assert (gradient - exact[name]).norm() < 0.03 * exact[name].norm(), name


@pytest.mark.distributed
def test_a_sharded_tower_rounds_alike(tiny_data: Path) -> None:
    parts = "trainer.micro_batches=2"
    copied, _ = run_ranks(2, train_in, tiny_data, "bfloat16", parts)
    sharded, _ = run_ranks(2, train_in, tiny_data, "bfloat16", parts, FSDP)
    assert sharded["layers"] == {torch.bfloat16} and sharded["kept"] == {torch.float32}
    assert sharded["losses"] == pytest.approx(copied["losses"], rel=1e-3)


def test_a_precision_that_the_device_lacks_is_refused(tiny_data: Path) -> None:
    with pytest.raises(UserError, match="got tf32, which a CPU does not have"):
        claim_precision("tf32", torch.device("cpu"))
    with pytest.raises(UserError, match="precision: got tf32, expected float32 or bfloat16: CPUs have no TF32"):
        tiny_config(tiny_data, Path("unused"), "trainer.precision=tf32")
    before = torch.get_float32_matmul_precision()
    claim_precision("bfloat16", torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == before == "highest"


@pytest.mark.parametrize(
    ("precision", "capability", "refused"),
    [("tf32", (8, 0), False), ("bfloat16", (9, 0), False), ("tf32", (7, 5), True), ("bfloat16", (7, 0), True)],
)
def test_gpus_before_ampere_compute_in_float32(
    precision: Any, capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    if refused:
        with pytest.raises(UserError, match=f"got {precision}, which Some GPU does not have"):
            claim_precision(precision, torch.device("cuda", 0))
    else:
        claim_precision(precision, torch.device("cuda", 0))
    assert asked == ([] if refused else ["high" if precision == "tf32" else "highest"])
