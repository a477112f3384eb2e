"""Changes the step of a run from outside: Python runs this file at start if its folder is in PYTHONPATH.

HSTU_SPOIL=RANK:STEP:TIMES multiplies that rank's loss by NaN the first TIMES times that it is computed in that step of
the run; TIMES=1 is an error that does not come back, 2 one that does. HSTU_PAUSE=SECONDS makes every step take longer.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TARGET = "hstu_dist.train.step"


class _Finder(MetaPathFinder):
    """Finds the module of the step as Python would, and has it spoilt once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Spoiler(spec.loader)
        return spec


class _Spoiler(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if "HSTU_SPOIL" in os.environ:
            _spoil(module)
        if "HSTU_PAUSE" in os.environ:
            _slow_down(module, float(os.environ["HSTU_PAUSE"]))


def _slow_down(module: ModuleType, seconds: float) -> None:
    true_gradient = module.TrainStep.gradient

    def gradient(self: Any, batch: Any, work: Any, number: int) -> Any:
        time.sleep(seconds)
        return true_gradient(self, batch, work, number)

    module.TrainStep.gradient = gradient


def _spoil(module: ModuleType) -> None:
    rank, step, times = (int(part) for part in os.environ["HSTU_SPOIL"].split(":"))
    if os.environ.get("RANK") != str(rank):
        return
    true_gradient, true_loss = module.TrainStep.gradient, module.TrainStep._accumulate
    left = [times]
    now = [-1]

    def gradient(self: Any, batch: Any, work: Any, number: int) -> Any:
        now[0] = number
        return true_gradient(self, batch, work, number)

    def loss(self: Any, *arguments: Any) -> Any:
        value = true_loss(self, *arguments)
        if now[0] != step or not left[0]:
            return value
        left[0] -= 1
        return value * float("nan")

    module.TrainStep.gradient = gradient
    module.TrainStep._accumulate = loss


if {"HSTU_SPOIL", "HSTU_PAUSE"} & set(os.environ):
    sys.meta_path.insert(0, _Finder())
