"""The batch script is what a shell and Slurm read as meant; answers of Slurm's programs become one line."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from hstu_dist.cluster import SlurmConfig
from hstu_dist.config import compose, load, save
from hstu_dist.run_folder import RunFolder
from launch.__main__ import main
from launch.slurm import script
from tests.tiny import tiny_overrides


@pytest.fixture
def overrides(tiny_data: Path, tmp_path: Path) -> list[str]:
    return [*tiny_overrides(tiny_data, tmp_path / "my runs"), "cluster=slurm", "cluster.nodes=2"]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH of programs that `stand_in` writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def stand_in(folder: Path, name: str, line: str) -> None:
    """A program that notes its arguments and runs a line of shell."""
    file = folder / name
    file.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(folder))}/{name}.called\n{line}\n')
    file.chmod(0o755)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_only_whole_words_are_filled_in(overrides: list[str], tmp_path: Path) -> None:
    text = script(compose([*overrides, "name=RUN_ID"]))
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    assert str(tmp_path / "my runs" / "RUN_ID" / "launch.yaml") in words
    assert "$address:$port" in words and "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" in words


def test_a_signal_is_heard_while_the_machine_is_set_up(overrides: list[str]) -> None:
    text = script(compose([*overrides, "cluster.setup=['module load x']"]))
    assert text.index("trap ask_to_stop USR1") < text.index("module load x")


def test_a_shells_variables_survive_the_settings_file(overrides: list[str], tmp_path: Path) -> None:
    line = "export TMPDIR=/scratch/${SLURM_JOB_ID} HOST=${NAME%%.*} BOTH=\\\\${X:-1}"
    config = compose([*overrides, "cluster.setup=['" + line.replace("${", "\\${") + "']"])
    assert isinstance(config.cluster, SlurmConfig) and len(config.cluster.setup) == 1
    assert "TMPDIR=/scratch/${SLURM_JOB_ID} HOST=${NAME%%.*}" in script(config)
    save(config, tmp_path / "launch.yaml")
    assert load(tmp_path / "launch.yaml") == config


def test_a_shell_reads_it(overrides: list[str]) -> None:
    text = script(compose([*overrides, "cluster.setup=['module load \"a b\"','x=1']", "cluster.port=12345"]))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash" and 'module load "a b"' in lines and "x=1" in lines and "port=12345" in lines


def test_resources(overrides: list[str], tmp_path: Path) -> None:
    settings = ["cluster.partition=long", "cluster.account=us", "cluster.time_limit=4:00:00", "cluster.memory_gib=1.5"]
    settings += ["cluster.cpus_per_rank=3", "cluster.stop_seconds=77", "cluster.sbatch=['--constraint=h100']"]
    found = options(script(compose([*overrides, *settings])))
    expected = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=6", "--mem=1536M", "--partition=long"]
    expected += ["--account=us", "--time=4:00:00", "--signal=B:USR1@77", "--requeue", "--constraint=h100"]
    assert set(expected) <= set(found)
    assert f"--output='{tmp_path}/my runs/tiny/logs'/slurm-%j.out" in found
    assert not [option for option in found if option.startswith("--gpus")]
    plain = options(script(compose(overrides)))
    assert not [o for o in plain if o.startswith(("--time", "--mem", "--cpus", "--partition", "--account"))]


def test_a_rank_has_a_gpu_each(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*overrides, "nodes=3", "gpus=8", "dry_run=true"]) == 0
    found = options(capsys.readouterr().out)
    assert "--gpus-per-node=8" in found and "--nodes=3" in found


def test_an_elastic_job_outlives_a_node(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    elastic = [word for word in overrides if not word.startswith("cluster.nodes=")]
    assert main([*elastic, "nodes=2:4", "dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert {"--nodes=4", "--no-kill"} <= set(options(text))
    assert "srun --kill-on-bad-exit=0 --no-kill " in text
    assert "--no-kill" not in script(compose(overrides))


def test_no_sbatch(overrides: list[str], programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(overrides) == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error == "error: sbatch: no such program here" and mend.startswith("  mend: launch from a machine of the cl")


def test_a_container_starts_python(overrides: list[str]) -> None:
    settings = [
        "cluster.srun=['--container-image=image.sqsh']",
        "cluster.python=[apptainer,exec,--nv,image.sif,python]",
    ]
    text = script(compose([*overrides, *settings]))
    assert (
        "srun --kill-on-bad-exit=1 --container-image=image.sqsh apptainer exec --nv image.sif python -m launch" in text
    )


@pytest.mark.parametrize(("nodes", "code"), [("2:4", 75), ("4", 2)])
def test_a_node_that_failed_does_not_keep_an_elastic_job_from_its_next_turn(
    nodes: str, code: int, overrides: list[str], programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = RunFolder(compose(overrides).run_dir).stop_file
    stop.parent.mkdir(parents=True)
    fixed = [word for word in overrides if not word.startswith("cluster.nodes=")]
    assert main([*fixed, f"nodes={nodes}", "dry_run=true"]) == 0
    text = capsys.readouterr().out
    stand_in(programs, "scontrol", "echo NodeAddr=127.0.0.1")
    # the ranks save when they see the file; the step ends with the code of the node that failed
    wait = f"until [ -e {shlex.quote(str(stop))} ]; do sleep 0.05; done; exit 2"
    stand_in(programs, "srun", f"kill -USR1 $PPID\n{wait}")
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURMD_NODENAME": "here"}
    done = subprocess.run(["/bin/bash"], input=text, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == code
    assert ("requeue 17" in (programs / "scontrol.called").read_text()) == (code == 75)


@pytest.mark.slow
def test_submits_and_remembers_the_job(
    overrides: list[str], programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(programs, "sbatch", "echo '17;virtual'")
    config = compose(overrides)
    folder = RunFolder(config.run_dir)
    assert main(overrides) == 0
    assert f"submitted job 17; `python -m launch status|logs|cancel {folder.path}`" in capsys.readouterr().out
    assert load(folder.launch_file) == config and folder.logs.is_dir()
    assert (folder.path / "slurm.sh").read_text() == script(config)
    assert (programs / "sbatch.called").read_text() == f"--parsable {folder.path}/slurm.sh\n"

    stand_in(programs, "squeue", "echo PENDING Resources")
    assert main(overrides) == 2
    assert "job 17 is still in the queue (PENDING Resources)" in capsys.readouterr().err
    assert main(["status", str(folder.path)]) == 0
    assert capsys.readouterr().out == "job 17: PENDING Resources; no checkpoint yet\n"
    assert main(["logs", str(folder.path)]) == 0
    assert capsys.readouterr().out == "job 17: has not written anything yet\n"
    stand_in(programs, "scancel", "exit 0")
    assert main(["cancel", str(folder.path)]) == 0
    assert (programs / "scancel.called").read_text() == "17\n" and not folder.stop_file.exists()

    stand_in(programs, "squeue", "echo RUNNING None")
    assert main(["cancel", str(folder.path)]) == 0
    assert folder.stop_file.exists()

    stand_in(programs, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    capsys.readouterr()
    assert main(["status", str(folder.path)]) == 0
    assert capsys.readouterr().out == "job 17: no longer in the queue; no checkpoint yet\n"
    assert main(["cancel", str(folder.path)]) == 2
    assert main(overrides) == 0
    assert not folder.stop_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sbatch", "said"),
    [
        (None, "error: sbatch: no such program here"),
        (
            "echo 'sbatch: error: Requested node configuration is not available' >&2; exit 1",
            "error: sbatch: error: Requested node configuration is not available",
        ),
        ("exit 3", "error: sbatch: exit code 3"),
    ],
)
def test_what_sbatch_refuses_is_one_line(
    sbatch: str | None, said: str, overrides: list[str], programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if sbatch is not None:
        stand_in(programs, "sbatch", sbatch)
    assert main(overrides) == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error == said and mend.startswith("  mend: ")
    assert not (compose(overrides).run_dir / "job.json").exists()
