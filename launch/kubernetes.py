"""Kubernetes: an Indexed Job of one pod a machine, a headless Service for their names, a ConfigMap of settings."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hstu_dist.cluster import DEFAULT_PORT, KubernetesConfig
from hstu_dist.config import RunConfig, as_yaml, save
from hstu_dist.console import say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from launch.node import NodeArguments
from launch.run_files import call, write_job
from launch.spec import LaunchSpec, Program

_SETTINGS = PurePosixPath("/etc/hstu_dist/launch.yaml")
_IMAGE_GROUP = 10001
_LONGEST_NAME = 50
"""The pods' host names add an index to it and may have 63 characters."""


def object_name(run: str) -> str:
    """A name that Kubernetes allows, different for different runs."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if plain == run and len(plain) <= _LONGEST_NAME:
        return f"hstu-{plain}"
    return f"hstu-{plain[: _LONGEST_NAME - 9].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def manifests(config: RunConfig, program: Program = "train") -> list[dict[str, Any]]:
    """Everything that a run creates.

    Raises:
        UserError: several pods without a folder that all can write.
    """
    cluster = _cluster(config)
    if cluster.nodes > 1 and cluster.claim is None:
        raise UserError(
            "cluster.claim: got null for several pods",
            "name a persistent volume claim that all pods can write at once (ReadWriteMany)",
        )
    name = object_name(config.name)
    labels = {"app.kubernetes.io/name": "hstu-dist", "app.kubernetes.io/instance": name}
    metadata = {"name": name, "namespace": cluster.namespace, "labels": labels}
    port = cluster.port or DEFAULT_PORT
    service = {
        "clusterIP": "None",
        "selector": labels,
        "ports": [{"name": "rendezvous", "port": port}],
        # pods must find each other before they are ready
        "publishNotReadyAddresses": True,
    }
    job = {
        "completionMode": "Indexed",
        "completions": cluster.nodes,
        "parallelism": cluster.nodes,
        "backoffLimit": cluster.pod_failures * cluster.nodes,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # bad input does not get better by trying again
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [int(ExitCode.BAD_INPUT)]}},
            ]
        },
        "template": {"metadata": {"labels": labels}, "spec": _pod(config, name, port, program)},
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {_SETTINGS.name: as_yaml(_inside(config))},
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job},
    ]


def _inside(config: RunConfig) -> RunConfig:
    """The settings that the pods read: a container sees all cores of its machine, not only those it may use."""
    cluster, trainer = _cluster(config), config.trainer
    if trainer.threads is not None or cluster.cpus is None:
        return config
    return replace(config, trainer=replace(trainer, threads=max(1, int(cluster.cpus) // config.nproc)))


def _pod(config: RunConfig, name: str, port: int, program: Program) -> dict[str, Any]:
    cluster = _cluster(config)
    storage = {"emptyDir": {}} if cluster.claim is None else {"persistentVolumeClaim": {"claimName": cluster.claim}}
    pod: dict[str, Any] = {
        "subdomain": name,
        # a new pod, not a new container: an exit code can then end the job
        "restartPolicy": "Never",
        # the agent's own limit and some
        "terminationGracePeriodSeconds": LaunchSpec.stop_seconds + 30,
        "securityContext": {"fsGroup": _IMAGE_GROUP},
        "containers": [_container(config, name, port, program)],
        "volumes": [
            {"name": "settings", "configMap": {"name": name}},
            {"name": "storage", **storage},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _gib(cluster.shared_memory_gib)}},
        ],
    }
    if cluster.node_selector is not None:
        pod["nodeSelector"] = dict(cluster.node_selector)
    return pod


def _container(config: RunConfig, name: str, port: int, program: Program) -> dict[str, Any]:
    cluster = _cluster(config)
    arguments = NodeArguments(
        config_file=Path(_SETTINGS),
        endpoint=f"{name}-0.{name}:{port}",
        run_id=name,
        # set in every pod of an Indexed Job
        node="JOB_COMPLETION_INDEX",
        logs=RunFolder(config.run_dir).logs,
        program=program,
    )
    requests = {"cpu": _number(cluster.cpus), "memory": _gib(cluster.memory_gib)}
    limits = {"memory": _gib(cluster.memory_gib)}
    if config.trainer.device == "cuda":
        limits[cluster.gpu_resource] = str(config.nproc)
    return {
        "name": "ranks",
        "image": cluster.image,
        "command": arguments.words(["python"]),
        "workingDir": cluster.folder,
        "ports": [{"name": "rendezvous", "containerPort": port}],
        "resources": {
            "requests": {key: value for key, value in requests.items() if value is not None},
            "limits": {key: value for key, value in limits.items() if value is not None},
        },
        "volumeMounts": [
            {"name": "settings", "mountPath": str(_SETTINGS.parent), "readOnly": True},
            {"name": "storage", "mountPath": cluster.folder},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _gib(size: float | None) -> str | None:
    return None if size is None else f"{int(size * 1024)}Mi"


def _number(cpus: float | None) -> str | None:
    return None if cpus is None else f"{int(cpus * 1000)}m"


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: no references, texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def preview(config: RunConfig, program: Program = "train") -> str:
    """The manifests that `start` would apply, as YAML."""
    return str(yaml.dump_all(manifests(config, program), Dumper=_Dumper, sort_keys=False)).rstrip()


def start(config: RunConfig, program: Program = "train") -> int:
    """Creates the objects, unless the run's job is still active or pods of it run; returns the exit code.

    Data and run folder lie in the cluster, out of sight from here: the ranks check them when they start. What is
    written here only tells `status`, `logs` and `cancel` about the run.
    """
    cluster = _cluster(config)
    folder = RunFolder(config.run_dir)
    name = object_name(config.name)
    text = preview(config, program)
    if is_submitted(config):
        raise UserError(
            f"run {folder.path}: job {name} is still active", f"wait for it, or `python -m launch cancel {folder.path}`"
        )
    if _pods_run(cluster, name):
        # those of a deleted job save first, and hold the run folder until they have
        raise UserError(
            f"run {folder.path}: the pods of job {name} are still saving and stopping",
            f"wait until `python -m launch status {folder.path}` shows none running, then give the same command",
        )
    # a job that has ended cannot be changed, only replaced
    _kubectl(cluster, "delete", "job", name, "--ignore-not-found")
    _kubectl(cluster, "apply", "-f", "-", text=text)
    save(config, folder.launch_file)
    write_job(folder, name)
    say(f"created job {name}; `python -m launch status|logs|cancel {folder.path}`")
    return ExitCode.FINISHED


def is_submitted(config: RunConfig) -> bool:
    """Whether the run's job has pods that wait or run."""
    return _active(_cluster(config), object_name(config.name))


def status(config: RunConfig) -> str:
    """What Kubernetes says of the run's job and its pods."""
    name = object_name(config.name)
    return _kubectl(
        _cluster(config), "get", "job,pod", "-l", f"app.kubernetes.io/instance={name}", "--ignore-not-found"
    ).rstrip()


def cancel(config: RunConfig) -> str:
    """Deletes everything that the launch created; the pods are given the time to save."""
    cluster, name = _cluster(config), object_name(config.name)
    active = _active(cluster, name)
    selector = f"app.kubernetes.io/instance={name}"
    deleted = _kubectl(cluster, "delete", "job,service,configmap", "-l", selector, "--wait=false", "-o", "name")
    # otherwise a sentence
    if "/" not in deleted:
        raise UserError(f"job {name}: not there", "nothing to cancel")
    return f"job {name}: deleted; {'its pods save a checkpoint and stop' if active else 'it had ended'}"


def logs(config: RunConfig) -> str:
    """The end of every pod's output, which has that of its ranks."""
    selector = f"app.kubernetes.io/instance={object_name(config.name)}"
    return _kubectl(_cluster(config), "logs", "-l", selector, "--prefix", "--tail=20").rstrip()


def _active(cluster: KubernetesConfig, name: str) -> bool:
    query = ("get", "job", name, "--ignore-not-found", "-o", "jsonpath={.status.active}")
    return _kubectl(cluster, *query).strip() not in ("", "0")


def _pods_run(cluster: KubernetesConfig, name: str) -> bool:
    query = ("get", "pod", "-l", f"app.kubernetes.io/instance={name}", "--field-selector=status.phase=Running")
    return bool(_kubectl(cluster, *query, "-o", "name").strip())


def _kubectl(cluster: KubernetesConfig, *words: str, text: str | None = None) -> str:
    return call(["kubectl", "--namespace", cluster.namespace, *words], text)


def _cluster(config: RunConfig) -> KubernetesConfig:
    assert isinstance(config.cluster, KubernetesConfig)
    return config.cluster
