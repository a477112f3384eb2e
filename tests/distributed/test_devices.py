"""A machine with fewer GPUs than ranks says so before anything is placed on them."""

from __future__ import annotations

import pytest
import torch

from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"trainer\.device: got cuda, but this machine has"), process_group("cuda", 30):
        pass


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for name in ("auto", "cuda"):
        with pytest.raises(UserError) as caught, process_group(name, 30):
            pass
        assert caught.value.problem == "more ranks than GPUs: 4 ranks on a machine with 2 usable GPUs"
        assert caught.value.remedy == "use nproc=2 or trainer.device=cpu"
