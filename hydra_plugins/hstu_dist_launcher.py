"""Hydra's launcher of `python -m launch --multirun`: whatever sweeper chooses the cells, this one runs them.

Hydra finds launchers in the namespace package `hydra_plugins`, which therefore has no `__init__.py`, and imports this
file whenever it composes anything: it must stay light. Annotations must not be strings, which dataclasses would look up
in a module that Hydra has not registered yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher


@dataclass
class HstuDistLauncherConf:
    """`hydra.launcher.*`.

    Attributes:
        jobs: launches at the same time; on Slurm and Kubernetes a launch is over when its job is queued.
    """

    _target_: str = "hydra_plugins.hstu_dist_launcher.HstuDistLauncher"
    jobs: int = 1


# where Hydra looks for a plugin's settings
ConfigStore.instance().store(
    group="hydra/launcher", name="hstu_dist", node=HstuDistLauncherConf, provider="hstu_dist_launcher"
)


class HstuDistLauncher(Launcher):  # type: ignore[misc] # Hydra has no types
    """Gives each batch of a sweeper to the `launch.multirun.Sweep` that stands in the place of Hydra's function."""

    def __init__(self, jobs: int) -> None:
        """Runs so many launches at the same time."""
        self.jobs = jobs
        self.sweep: Any = None
        self.folder = Path()

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Called by Hydra before anything is launched.

        Raises:
            HydraException: by another program than `python -m launch`, with a function instead of ranks to start.
        """
        from launch.multirun import Sweep

        if not isinstance(task_function, Sweep):
            raise HydraException("hydra/launcher=hstu_dist: works with `python -m launch --multirun` only")
        self.sweep = task_function
        self.folder = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Runs a batch; returns when all of it has finished, failed or been handed to a scheduler."""
        # sweepers that write into it rely on the launcher
        self.folder.mkdir(parents=True, exist_ok=True)
        values = self.sweep.launch(job_overrides, self.jobs)
        # completed even if the run failed: Hydra would drop the other cells of the batch
        return [
            JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=value)
            for overrides, value in zip(job_overrides, values, strict=True)
        ]
