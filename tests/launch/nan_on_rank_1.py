"""The command line of the package, with a loss of NaN on rank 1 from the fourth step on."""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import Any

from hstu_dist.__main__ import main
from hstu_dist.train import step

_true_loss = step.TrainStep._accumulate
_calls = count()


def _loss(*arguments: Any) -> Any:
    value = _true_loss(*arguments)
    return value * float("nan") if next(_calls) >= 3 and os.environ["RANK"] == "1" else value


if __name__ == "__main__":
    step.TrainStep._accumulate = _loss  # type: ignore[method-assign]
    sys.exit(main())
