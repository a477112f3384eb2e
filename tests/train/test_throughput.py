"""Peak rates of devices, known and unknown, and averages of a run."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import torch

from hstu_dist.distributed.process_group import process_group
from hstu_dist.machine import gpu_peak_flops
from hstu_dist.models.flops import Workload
from hstu_dist.train import throughput
from hstu_dist.train.state import TrainState
from hstu_dist.train.throughput import job_peak_flops, measured_peak_flops, training_averages
from tests.distributed.ranks import run_ranks
from tests.train.cases import WORLD


@pytest.mark.parametrize(
    ("name", "float32", "tf32", "bfloat16"),
    [
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 156e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 19.5e12, 156e12, 312e12),
        ("NVIDIA H100 80GB HBM3", 67e12, 494.5e12, 989.5e12),
        ("NVIDIA H100 PCIe", 51e12, 378e12, 756e12),
        ("NVIDIA H100 NVL", 60e12, 417.5e12, 835.5e12),
        ("NVIDIA H200", 67e12, 494.5e12, 989.5e12),
        ("NVIDIA B200", 75e12, 1125e12, 2250e12),
        ("AMD Instinct MI300X", 163.4e12, 653.7e12, 1307.4e12),
        # neither a slice of a GPU, nor its sibling with another memory and clock, is the GPU
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
        ("NVIDIA GH200 480GB", None, None, None),
        ("NVIDIA GB200", None, None, None),
        ("Some Other Chip", None, None, None),
    ],
)
def test_data_sheets(name: str, float32: float | None, tf32: float | None, bfloat16: float | None) -> None:
    found = (gpu_peak_flops(name, "float32"), gpu_peak_flops(name, "tf32"), gpu_peak_flops(name, "bfloat16"))
    assert found == (float32, tf32, bfloat16)


def test_the_peak_of_a_gpu_follows_the_precision_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    device = torch.device("cuda", 0)
    for precision, peak in (("float32", 19.5e12), ("tf32", 156e12), ("bfloat16", 312e12)):
        source = f"NVIDIA A100-SXM4-80GB, {precision}, data sheet"
        assert throughput._device_peak(device, precision) == (peak, source)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_quickly(dtype: torch.dtype) -> None:
    started = time.perf_counter()
    peak = measured_peak_flops(torch.device("cpu"), dtype)
    assert time.perf_counter() - started < 10
    # any CPU of this century, and none of this decade
    assert 1e8 < peak < 1e15


def test_the_configured_peak_replaces_all_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert job_peak_flops(7e12, "float32", replace(WORLD, device=torch.device("cpu"))) == 7e12
    assert caplog.messages == ["peak rate 7e+12 FLOP/s, all ranks together (trainer.peak_flops)"]


def test_an_unknown_device_is_said_once_and_gives_no_peak(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(throughput, "_device_peak", lambda device, precision: (None, "Some Other Chip"))
    assert job_peak_flops(None, "float32", WORLD) is None
    (line,) = caplog.messages
    assert line == "MFU is not logged: the peak rate of Some Other Chip is unknown, set trainer.peak_flops"


def peak_of_ranks(measured: dict[int, float | None]) -> float | None:
    with process_group("cpu", 30) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "_device_peak", lambda device, precision: (measured[world.rank], "test"))
        return job_peak_flops(None, "float32", world)


@pytest.mark.distributed
def test_ranks_agree_on_the_sum_of_their_peaks() -> None:
    assert run_ranks(2, peak_of_ranks, {0: 3e9, 1: 4e9}) == [7e9, 7e9]
    assert run_ranks(2, peak_of_ranks, {0: 3e9, 1: None}) == [None, None]


def test_averages_are_over_training_alone() -> None:
    state = TrainState(
        tokens=3000, attention_pairs=50_000, train_seconds=10.0, evaluation_seconds=90.0, available_flops=1e6
    )

    def flops(work: Workload) -> int:
        return 10 * work.tokens + work.attention_pairs

    assert training_averages(state, flops) == {
        "train_seconds": 10.0,
        "evaluation_seconds": 90.0,
        "training_flops": 80_000,
        "tokens_per_second": 300.0,
        "mfu": 80_000 / 1e6,
    }
    unknown = training_averages(replace(state, available_flops=None), flops)
    assert unknown["mfu"] is None and unknown["tokens_per_second"] == 300.0
    fresh = training_averages(TrainState(), flops)
    assert fresh["tokens_per_second"] is None and fresh["mfu"] is None
