"""The manifests are valid for the newest versions of Kubernetes, agree with each other, and are applied once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hstu_dist.config import RunConfig, compose, load
from hstu_dist.run_folder import RunFolder
from launch.__main__ import main
from launch.kubernetes import manifests, object_name, preview
from launch.node import _parse
from tests.tiny import tiny_overrides

kubernetes_validate = pytest.importorskip("kubernetes_validate")
_NEWEST = int(kubernetes_validate.latest_version().split(".")[1])
VERSIONS = [f"1.{minor}.0" for minor in range(_NEWEST - 2, _NEWEST + 1)]
CASES = [
    [],
    ["cluster.nodes=4", "cluster.claim=shared", "nproc=8", "trainer.device=cuda"],
    ["cluster.cpus=3.5", "cluster.memory_gib=16", "cluster.node_selector={pool: fast}", "cluster.port=30000"],
]


def config_of(*overrides: str) -> RunConfig:
    return compose(["name=My_run.1", "output=runs", "cluster=kubernetes", *overrides])


def parts(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """ConfigMap, Service, Job, as `kubectl` would read them."""
    settings, service, job = yaml.safe_load_all(preview(config))
    return settings, service, job


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overrides", CASES, ids=["alone", "gpus", "resources"])
def test_the_schemas_of_the_newest_versions(overrides: list[str], version: str) -> None:
    for manifest in parts(config_of(*overrides)):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_do_find_mistakes() -> None:
    job = parts(config_of())[2]
    job["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overrides", CASES, ids=["alone", "gpus", "resources"])
def test_what_schemas_do_not_see(overrides: list[str]) -> None:
    settings, service, job = parts(config_of(*overrides))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never" and container["image"]
    assert spec["completions"] == spec["parallelism"]
    # a host name is subdomain, dash, index
    assert len(job["metadata"]["name"]) + len("-9999") <= 63

    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    arguments = _parse(container["command"][3:])
    port = service["spec"]["ports"][0]["port"]
    assert arguments.endpoint == f"{job['metadata']['name']}-0.{pod['subdomain']}:{port}"
    assert container["ports"][0]["containerPort"] == port

    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert arguments.config_file == Path(mounts["settings"]) / next(iter(settings["data"]))
    assert container["workingDir"] == mounts["storage"] and mounts["shm"] == "/dev/shm"
    assert len({manifest["metadata"]["name"] for manifest in (settings, service, job)}) == 1


def test_gpus_and_the_settings_of_the_pods(tmp_path: Path) -> None:
    settings, _, job = parts(config_of(*CASES[1]))
    resources = job["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "8"}
    file = tmp_path / "launch.yaml"
    file.write_text(settings["data"]["launch.yaml"])
    assert load(file) == config_of(*CASES[1])

    # a container sees all cores of its machine
    settings, _, job = parts(config_of(*CASES[2], "nproc=2"))
    file.write_text(settings["data"]["launch.yaml"])
    assert load(file).trainer.threads == 1
    resources = job["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": "3500m", "memory": "16384Mi"}
    assert resources["limits"] == {"memory": "16384Mi"}


@pytest.mark.parametrize("name", ["a", "My_run.1", "x" * 90, "1.2", "a" * 49])
def test_names(name: str) -> None:
    made = object_name(name)
    assert len(made) <= 55 and made.strip("-") == made and made.replace("-", "").isalnum() and made == made.lower()


def test_different_runs_have_different_names() -> None:
    names = ["a-b", "a_b", "a.b", "A-b", "a" * 60, "a" * 61]
    assert len({object_name(name) for name in names}) == len(names)


def test_several_pods_need_a_shared_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["name=x", "cluster=kubernetes", "cluster.nodes=2", "dry_run=true"]) == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error == "error: cluster.claim: got null for several pods" and "ReadWriteMany" in mend


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that notes calls and input; it says of the job what `active` in its folder has, `pods` of pods."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "active").touch()
    (folder / "pods").touch()
    code = f"""
import json, pathlib, sys
folder = pathlib.Path({str(folder)!r})
text = sys.stdin.read() if "-" in sys.argv else ""
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps([sys.argv[1:], text]) + "\\n")
if "jsonpath={{.status.active}}" in sys.argv:
    print((folder / "active").read_text())
elif "--field-selector=status.phase=Running" in sys.argv:
    print((folder / "pods").read_text())
elif "delete" in sys.argv:
    print("job.batch/hstu-tiny" if (folder / "active").read_text() else "No resources found")
elif "logs" in sys.argv:
    print("what the ranks said")
"""
    (folder / "kubectl.py").write_text(code)
    program = folder / "kubectl"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(folder / "kubectl.py")])} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def calls(kubectl: Path) -> list[tuple[list[str], str]]:
    file = kubectl / "calls"
    made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return [(words, text) for words, text in made]


@pytest.mark.slow
def test_applies_asks_and_deletes(tmp_path: Path, kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the data lies in the cluster, not here
    overrides = [*tiny_overrides(tmp_path / "nowhere", tmp_path / "runs"), "cluster=kubernetes", "cluster.namespace=us"]
    config = compose(overrides)
    folder = str(RunFolder(config.run_dir).path)
    assert main(overrides) == 0
    assert f"created job hstu-tiny; `python -m launch status|logs|cancel {folder}`" in capsys.readouterr().out
    made = calls(kubectl)
    assert all(words[:2] == ["--namespace", "us"] for words, _ in made)
    assert [words[2] for words, _ in made] == ["get", "get", "delete", "apply"]
    assert list(yaml.safe_load_all(made[-1][1])) == manifests(config)

    (kubectl / "active").write_text("1")
    assert main(overrides) == 2
    assert "job hstu-tiny is still active" in capsys.readouterr().err
    assert [words[2] for words, _ in calls(kubectl)] == ["get"]

    assert main(["logs", folder]) == 0
    assert capsys.readouterr().out == "what the ranks said\n"
    assert main(["status", folder]) == 0
    capsys.readouterr()
    assert main(["cancel", folder]) == 0
    assert capsys.readouterr().out == "job hstu-tiny: deleted; its pods save a checkpoint and stop\n"
    assert [words[2] for words, _ in calls(kubectl)] == ["logs", "get", "get", "delete"]
    (kubectl / "active").write_text("")
    assert main(["cancel", folder]) == 2
    assert "job hstu-tiny: not there" in capsys.readouterr().err


@pytest.mark.slow
def test_pods_of_a_cancelled_run_may_save_before_the_next_launch(
    tmp_path: Path, kubectl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_overrides(tmp_path / "nowhere", tmp_path / "runs"), "cluster=kubernetes"]
    (kubectl / "pods").write_text("pod/hstu-tiny-0-x7f2q")
    assert main(overrides) == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error.endswith("the pods of job hstu-tiny are still saving and stopping") and "same command" in mend
    made = [words for words, _ in calls(kubectl)]
    assert [words[2] for words in made] == ["get", "get"] and "app.kubernetes.io/instance=hstu-tiny" in made[1]
    assert not (tmp_path / "runs").exists()


def test_no_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    overrides = [*tiny_overrides(tmp_path / "nowhere", tmp_path / "runs"), "cluster=kubernetes"]
    assert main(overrides) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: kubectl: no such program here"
    assert not (tmp_path / "runs").exists()
