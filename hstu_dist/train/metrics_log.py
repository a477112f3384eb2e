"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases if configured."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from hstu_dist.errors import UserError
from hstu_dist.files import LineFile, write_atomically
from hstu_dist.train.config import LoggingConfig
from hstu_dist.train.metrics_file import METRICS_FILE

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes metrics of rank 0. A resumed run drops what was logged after its checkpoint."""

    def __init__(self, run_dir: Path, config: LoggingConfig, run_config: dict[str, Any], resume_step: int) -> None:
        self._path = run_dir / METRICS_FILE
        _drop_after(self._path, resume_step)
        # first, because it alone can fail: nothing is open yet
        self._wandb = None if config.wandb == "disabled" else _start_wandb(run_dir, config, run_config)
        self._file = LineFile(self._path)
        self._board: SummaryWriter | None = None
        if config.tensorboard:
            with self._without_board_if_refused():
                self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics at a step."""
        self._file.add(json.dumps({"step": step, **values}))
        if self._board is not None:
            with self._without_board_if_refused():
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flushes and closes all of them."""
        self._file.close()
        if self._board is not None:
            with self._without_board_if_refused():
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextlib.contextmanager
    def _without_board_if_refused(self) -> Iterator[None]:
        # its own thread writes: what a full disk refused comes back with a later call
        try:
            yield
        except OSError as error:
            self._board = None
            logger.warning("TensorBoard's files cannot be written (%s); training goes on without them", error.strerror)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        # a killed process can leave half a line at the end
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def _start_wandb(run_dir: Path, config: LoggingConfig, run_config: dict[str, Any]) -> Any:
    # here, because it takes 20 MB of every rank
    import wandb

    try:
        return wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            mode="offline" if config.wandb == "offline" else "online",
            config=run_config,
            resume="allow",
            id=run_dir.name if config.wandb == "online" else None,
        )
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"Weights & Biases: {str(error).splitlines()[0]}",
            "run `wandb login`, or set trainer.logging.wandb=offline",
        ) from error
