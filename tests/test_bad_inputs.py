"""A gallery of bad input over all commands: a line on what is wrong, one on how to mend it, nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_dist.__main__ import main
from hstu_dist.config import RunConfig, compose, save
from hstu_dist.errors import UserError
from launch.__main__ import main as launch
from tests.tiny import tiny_overrides

LOG = "user_id,item_id,timestamp\n"
EVENTS = "prepare data=events data.path=made data.input="
RUN = "name=tiny data=events data.path=data data.max_length=16 output=runs trainer.device=cpu"

FILES: dict[str, str] = {
    "empty.csv": "",
    "header.csv": LOG,
    "other.csv": "who,what,when\n1,2,3\n",
    "null.csv": f"{LOG}1,2,3\n1,,4\n",
    "text_time.csv": f"{LOG}1,2,soon\n",
    "negative.csv": f"{LOG}1,2,-5\n",
    "twice.csv": f"{LOG}1,2,3\n1,2,3\n",
    "ragged.csv": f"{LOG}1,2,3\n1,2\n",
    "rare.csv": f"{LOG}1,2,3\n",
    "action.csv": "user_id,item_id,timestamp,action\n1,2,3,-1\n",
    "notes.txt": "no log\n",
    "not.parquet": "no parquet",
    "list.yaml": "[1, 2]",
    "half.yaml": "name: x\n",
    "nothing.json": "{",
}

PREPARE = [
    ("prepare data=nothing", "data/nothing"),
    ("prepare data=events", "data.input: missing"),
    (f"{EVENTS}gone.csv", "gone.csv"),
    (f"{EVENTS}empty.csv", "empty.csv: is empty"),
    (f"{EVENTS}header.csv", "has no events"),
    (f"{EVENTS}other.csv", "column 'user_id' is missing, the file has who, what, when"),
    (f"{EVENTS}null.csv", "null.csv row 2"),
    (f"{EVENTS}text_time.csv", "timestamp"),
    (f"{EVENTS}negative.csv", "negative.csv row 1"),
    (f"{EVENTS}twice.csv", "twice.csv"),
    (f"{EVENTS}ragged.csv", "ragged.csv: cannot be read"),
    (f"{EVENTS}rare.csv data.min_item_events=2", "no event is left"),
    (f"{EVENTS}action.csv data.action_column=action", "action.csv row 1"),
    (f"{EVENTS}notes.txt", "notes.txt"),
    (f"{EVENTS}not.parquet", "not.parquet: cannot be read"),
    (f"{EVENTS}twice.csv data.duplicates=perhaps", "data.duplicates"),
    (f"{EVENTS}rare.csv engine=pandas", "engine"),
    (f"{EVENTS}rare.csv memory_gib=0.1", "memory_gib"),
    ("prepare data=stream data.path=x data.num_items=9", "a stream is not prepared"),
    ("prepare data=amazon_beauty data.source=gone.json.gz", "gone.json.gz"),
    ("prepare data=ml1m data.archive=notes.txt data.path=made", "got ratings with md5"),
    ("prepare data=plugin data.target=os:system", "expected os among them"),
]
TRAIN = [
    ("train", "name"),
    ("train experiment=nothing", "experiment/nothing"),
    ("train experiment=ml1m model.depth=3", "model.depth: no such key"),
    ("train experiment=ml1m model.num_layers=two", "model.num_layers"),
    ("train experiment=ml1m model.max_length=3", "model.max_length: got 3, expected at least data.max_length (200)"),
    ("train experiment=ml1m data.path=gone", "gone"),
    ("train experiment=ml1m task=ranking", "loss: got sampled_softmax, expected multi_task"),
    ("train experiment=ml1m model=dlrm", "dlrm"),
    ("train experiment=ml1m trainer.epochs=null", "trainer.epochs: got null"),
    ("train experiment=ml1m_stream trainer.epochs=3", "trainer.epochs: got 3, expected null on a stream"),
    ("train experiment=ml1m_stream data.path=gone", "gone"),
    ("train --config gone.yaml", "gone.yaml"),
    ("train --config list.yaml", "list.yaml: got no mapping"),
    ("train --config half.yaml", "half.yaml: data: "),
    ("train --config half.yaml seed=1", "takes no overrides"),
    (f"train {RUN} trainer.precision=tf32", "precision: got tf32"),
    (f"train {RUN} embedding.compute_kernel=fused_uvm", "fused_uvm"),
    (f"train {RUN} output=notes.txt", "notes.txt"),
    (f"train {RUN} embedding.plan=gone.json", "gone.json"),
    (f"train {RUN} embedding.plan=nothing.json", "nothing.json"),
    (f"train {RUN} trainer.micro_batches=4096", "trainer.micro_batches: got 4096"),
    (f"train {RUN} task.split=time task.test_share=1.5", "task.test_share"),
    (f"train {RUN} name=other model.width=24", "holds a run with other settings"),
    ("evaluate experiment=ml1m --split train", "--split"),
    (f"evaluate {RUN}", "tiny"),
]
OTHERS = [
    ("plan experiment=hstu_1p5t cluster=abacus", "abacus"),
    ("plan experiment=hstu_1p5t cluster=h100x256 plan.mean_length=0", "plan.mean_length"),
    ("doctor --ranks 1 doctor=yes", "doctor"),
    ("report gone", "gone: holds no run"),
    ("report results", "benchmarks/results: no such folder"),
    ("report results --output x.html", "got --output x.html"),
    ("report runs/other --root x", "got --root x"),
    ("replay gone", "gone"),
    ("checkpoint inspect gone", "gone"),
    ("checkpoint verify data", "data"),
    ("checkpoint export runs/other", "got output None"),
    ("checkpoint reshard runs/other", "got --ranks None"),
    ("checkpoint polish gone", "polish"),
    ("score gone input=requests.parquet output=out.parquet", "gone"),
    ("score runs/other input=requests.parquet output=out.parquet", "other"),
    ("score runs/other output=out.parquet", "input"),
    ("retrieve runs/other input=gone.parquet output=out.parquet k=0", "k"),
    ("export runs/other output=", "other"),
    ("serve runs/other port=99999", "port"),
    ("serve gone", "gone"),
    ("dance", "dance"),
]
LAUNCH = [
    ("experiment=ml1m cluster=cloud", "cluster/cloud"),
    ("experiment=ml1m cluster=hosts", "cluster.addresses: got none"),
    ("experiment=ml1m cluster=slurm cluster.nodes=0", "nodes"),
    ("experiment=ml1m dry_run=perhaps", "dry_run: got 'perhaps'"),
    ("experiment=ml1m data.path=gone", "gone"),
    (f"{RUN} cluster=slurm nproc=1", "sbatch: no such program here"),
    (f"{RUN} cluster=kubernetes nproc=1", "kubectl: no such program here"),
    (f"{RUN} nproc=4096", "4096"),
    ("status", "status: got 0 arguments"),
    ("status gone", "gone: no run was launched here"),
    ("logs gone", "gone: no run was launched here"),
    ("cancel gone", "gone: no run was launched here"),
    ("--multirun experiment=ml1m seed=", "seed"),
    ("--multirun experiment=nothing seed=1,2", "nothing"),
]


@pytest.fixture
def workshop(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with bad files, a prepared data set, and the folder of a run that has not begun; the current one."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(tiny_data, tmp_path / "data")
    pq.write_table(
        pa.table({"item_ids": [[1]], "timestamps": [[1]], "candidates": [[2]]}), tmp_path / "requests.parquet"
    )
    monkeypatch.chdir(tmp_path)
    # no scheduler's programs
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    (tmp_path / "runs" / "other").mkdir(parents=True)
    save(other_run(), tmp_path / "runs" / "other" / "config.yaml")
    return tmp_path


@cache
def other_run() -> RunConfig:
    """Composing takes a tenth of a second."""
    return compose([*tiny_overrides(Path("data"), Path("runs")), "name=other", "embedding.sharding=row_wise"])


def call(command: Callable[[list[str]], int], words: str) -> int:
    """Exit code, however the command ends."""
    try:
        return int(command(words.split(" ")))
    except SystemExit as ended:
        return int(str(ended.code))


def files_of(folder: Path) -> dict[str, int]:
    """All files but the record of what a sweep was asked for."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "multirun.yaml"]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def check(
    command: Callable[[list[str]], int], case: tuple[str, str], folder: Path, printed: str, before: object
) -> None:
    _, named = case
    assert "Traceback" not in printed
    lines = printed.strip().splitlines()
    problems = [line for line in lines if "error: " in line]
    assert len(problems) == 1 and named in problems[0], printed
    usage = lines[0].startswith("usage:")
    assert usage or lines[-1].startswith("  mend: "), printed
    assert files_of(folder) == before


GALLERY = [(main, case) for case in [*PREPARE, *TRAIN, *OTHERS]] + [(launch, case) for case in LAUNCH]


def test_the_gallery_is_large() -> None:
    assert len(GALLERY) >= 60
    assert {case[0].partition(" ")[0] for command, case in GALLERY if command is main} >= {
        *("prepare", "train", "evaluate", "plan", "doctor", "report", "replay", "checkpoint"),
        *("score", "retrieve", "export", "serve"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("command", "case"), GALLERY, ids=[case[0] for _, case in GALLERY])
def test_bad_input_is_one_line(
    command: Callable[[list[str]], int], case: tuple[str, str], workshop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files_of(workshop)
    assert call(command, case[0]) == 2
    check(command, case, workshop, capfd.readouterr().err, before)


def test_debug_shows_where(workshop: Path) -> None:
    with pytest.raises(UserError):
        main(["report", "gone", "--debug"])


def test_messages_hold_no_secrets(workshop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = "s3://key:hunter2@bucket/x?endpoint_override=127.0.0.1:9"
    call(main, f"train name=x data=stream trainer.epochs=null data.path={path} data.num_items=3")
    assert "hunter2" not in capfd.readouterr().err
