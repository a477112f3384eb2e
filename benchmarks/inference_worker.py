"""A server of a model of HSTU-large's size with random weights, for `benchmarks.inference_load`."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import torch

from benchmarks.inference_load import ITEMS
from hstu_dist.commands.trained import encoder_config
from hstu_dist.config import compose
from hstu_dist.inference.config import ServeConfig
from hstu_dist.inference.inputs import Inputs
from hstu_dist.inference.requests import ValueIndex
from hstu_dist.inference.retrieval import RetrievalModel
from hstu_dist.inference.server import Served, serve
from hstu_dist.machine import keep_freed_memory
from hstu_dist.models.tower import Tower


def main() -> None:
    """Serves until SIGTERM."""
    keep_freed_memory()
    # the other core has HTTP and the clients
    torch.set_num_threads(1)
    model = encoder_config(compose(["experiment=ml1m_hstu_large"]))
    torch.manual_seed(0)
    tower = Tower(model, torch.device("cpu")).requires_grad_(False)
    inputs = Inputs(items=ValueIndex(pa.array(np.arange(ITEMS))), max_events=model.max_length)
    served = Served(
        model=RetrievalModel(tower, torch.randn(ITEMS, model.width), model.max_length),
        inputs=inputs,
        description={"run": "random"},
    )

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    serve(served, ServeConfig(port=0), say)


if __name__ == "__main__":
    main()
