"""What a trained model answers, whatever it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.requests import Requests

Floats = npt.NDArray[np.float32]


class Model(Protocol):
    """Scores candidates. For one thread."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the numbers that each candidate gets."""

    @property
    def cache(self) -> StateCache | None:
        """Where histories are kept between calls."""

    def score(self, requests: Requests, micro_batch: int) -> Mapping[str, Floats]:
        """Numbers of every candidate: for each output [M], NaN where there is none.

        Args:
            requests: checked, histories no longer than the model reads.
            micro_batch: candidates computed at once.
        """
