"""The folder of one run: its settings, environment, checkpoints, metrics and result; no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from hstu_dist.config import RunConfig, difference, load, save
from hstu_dist.data.identity import DataIdentity
from hstu_dist.data.schema import Manifest, load_manifest
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically

_PACKAGES = (
    "hstu-dist",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "triton",
    "hydra-core",
    "numpy",
    "pyarrow",
)

_LOCK_SECONDS = 2.0
_LEAVING_SECONDS = 10.0
"""For ranks whose launcher was killed a moment ago."""
_LOCK_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and what is written there once.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """Resolved settings that the run was started with."""
        return self.path / "config.yaml"

    @property
    def launch_file(self) -> Path:
        """Resolved settings that a launcher hands to the ranks; `config_file` stays what the run was started with."""
        return self.path / "launch.yaml"

    @property
    def data_file(self) -> Path:
        """Which prepared data the run was started with."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def replay(self) -> Path:
        """Folder of batches whose step was refused."""
        return self.path / "replay"

    @property
    def sequences(self) -> Path:
        """Folder of what each rank trained on, where that is logged."""
        return self.path / "sequences"

    @property
    def result_file(self) -> Path:
        """Metrics of a finished run."""
        return self.path / "result.json"

    @property
    def stop_file(self) -> Path:
        """Asks the ranks to save a checkpoint and stop, once it exists; launchers remove it."""
        return self.path / "stop"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output, where a launcher writes it to files."""
        return self.path / "logs"

    def check(self, config: RunConfig, needed_bytes: int) -> None:
        """Whether this folder can take the run or continue it; changes nothing but creating the folder.

        Args:
            config: the run.
            needed_bytes: disk space of all checkpoints that it keeps and writes at once; those that are already
                here have theirs.

        Raises:
            UserError: not writable, too little space, or it holds a run with other settings.
        """
        # every rank comes here, and process ids of containers are the same on all machines
        probe = self.path / f".probe-{uuid.uuid4().hex}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text("probe")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: cannot be written ({error.strerror})", "set output=FOLDER to a writable one"
            ) from error
        free, missing = shutil.disk_usage(self.path).free, needed_bytes - self._checkpoint_bytes()
        if free < missing:
            raise UserError(
                f"run folder {self.path}: {free / 2**20:.0f} MiB free, {missing / 2**20:.0f} MiB needed",
                "free some space or set output=FOLDER to another disk",
            )
        self.check_settings(config)

    def check_settings(self, config: RunConfig) -> None:
        """Whether the folder holds no other run.

        Raises:
            UserError: it holds one with other settings.
        """
        changed = difference(load(self.config_file), config) if self.config_file.exists() else []
        if changed:
            raise UserError(
                f"run folder {self.path}: holds a run with other settings ({'; '.join(changed[:3])})",
                "set name=NAME for a new run, or remove the folder",
            )

    def check_data(self, config: RunConfig, manifest: Manifest | None) -> None:
        """Whether the run's prepared data is still what the run here was started with.

        It passes where one of them is not known: the manifest is None, or the run left no record.

        Raises:
            UserError: it is not, or the record is damaged.
        """
        known = self.data()
        if known is not None and manifest is not None and not known.is_of(manifest):
            raise UserError(
                f"run folder {self.path}: holds a run on other data than {config.data.path} has now",
                f"bring that data back, or set name=NAME for a new run ({self.data_file} has the old files' hashes)",
            )

    def check_unused(self) -> None:
        """Whether nobody trains in the folder; waits for those who are about to end.

        Raises:
            UserError: another process does, or this one may not see it.
        """
        deadline = time.monotonic() + _LEAVING_SECONDS
        while self.is_locked():
            if time.monotonic() > deadline:
                raise self._taken()
            time.sleep(_LOCK_POLL_SECONDS)

    def _checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints here, without those that were set aside; a run may be removing some meanwhile."""
        total = 0
        for folder, _, names in os.walk(self.checkpoints):
            if folder.endswith(".damaged"):
                continue
            for name in names:
                with contextlib.suppress(OSError):
                    total += Path(folder, name).stat().st_size
        return total

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other runs out of the folder until it is left or this process ends, however it ends.

        Raises:
            UserError: another process has the lock, or this one may not take it.
        """
        with contextlib.ExitStack() as stack:
            with self._explained_lock():
                file = stack.enter_context(self._lock_file.open("w"))
                # `is_locked` of others holds it for a moment
                deadline = time.monotonic() + _LOCK_SECONDS
                while not (taken := _locks(file, fcntl.LOCK_EX)) and time.monotonic() < deadline:
                    time.sleep(_LOCK_POLL_SECONDS)
            if not taken:
                raise self._taken()
            yield

    def is_locked(self) -> bool:
        """Whether a process is training in the folder; writes nothing.

        Raises:
            UserError: this process may not see it.
        """
        with self._explained_lock():
            try:
                with self._lock_file.open() as file:
                    return not _locks(file, fcntl.LOCK_SH)
            except FileNotFoundError:
                return False

    def _taken(self) -> UserError:
        return UserError(
            f"run folder {self.path}: another process is training in it",
            "wait for it or stop it, or set name=NAME for a new run",
        )

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    @contextlib.contextmanager
    def _explained_lock(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run folder {self.path}: its lock cannot be used ({error.strerror})",
                f"get the rights to {self._lock_file}, on a file system that has locks",
            ) from error

    def describe(self, config: RunConfig, data: DataIdentity | None = None) -> None:
        """Writes the resolved settings, the environment (git commit, versions, machine) and which data it is.

        Of a run that goes on, the environment is added to that it began with, if it is another.
        """
        save(config, self.config_file)
        now, began = environment(), self.environment()
        later = began.get("continued", [])
        if not began:
            _write_json(self._environment_file, now)
        elif _what_computes((later or [began])[-1]) != _what_computes(now):
            _write_json(self._environment_file, began | {"continued": [*later, now]})
        if data is not None:
            write_atomically(self.data_file, data.to_json())

    def data(self) -> DataIdentity | None:
        """The prepared data that the run was started with; None for a stream, and for a run that left no record.

        Raises:
            UserError: the record is damaged.
        """
        try:
            return DataIdentity.from_json(self.data_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.data_file}: cannot be read ({str(error)[:200]})", "remove it") from error

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None for a run that has not finished."""
        if not self.result_file.exists():
            return None
        values: dict[str, Any] = json.loads(self.result_file.read_text())
        return values

    def environment(self) -> dict[str, Any]:
        """What the run was trained with, as written when it began; empty before that.

        `continued` has what it went on with, where that was something else.
        """
        file = self._environment_file
        values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return values

    @property
    def _environment_file(self) -> Path:
        return self.path / "environment.json"

    def finished(self, epochs: float) -> dict[str, Any] | None:
        """What `finish` wrote, if a run of `epochs` epochs has nothing left to train."""
        result = self.result()
        return result if result and (result.get("stopped_early") or result["epochs"] >= epochs) else None

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as finished."""
        _write_json(self.result_file, result)


def manifest_of(config: RunConfig) -> Manifest | None:
    """The manifest of a run's prepared data; None for a stream, and where the data has gone."""
    if isinstance(config.data, StreamConfig):
        return None
    try:
        return load_manifest(Path(config.data.path))
    except UserError:
        return None


def _locks(file: IO[str], kind: int) -> bool:
    """Takes a lock that `file` keeps until it is closed, unless another process has one against it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=1).encode())


def environment() -> dict[str, Any]:
    """Git commit, versions and machine, for the record."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _what_computes(environment: dict[str, Any]) -> list[Any]:
    """Of an environment what can change a result."""
    return [environment.get(name) for name in ("commit", "python", "machine", "versions")]


def commits_of(environment: dict[str, Any]) -> list[str]:
    """The commits that a run was trained with, in the order in which they came."""
    began = str(environment.get("commit", "unknown"))
    return list(dict.fromkeys([began, *(later["commit"] for later in environment.get("continued", ()))]))


def git_commit() -> str:
    """Commit of the checkout, with `-dirty` for local changes; `unknown` for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
