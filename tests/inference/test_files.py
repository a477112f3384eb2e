"""`score` and `retrieve` answer files of requests as the trained run itself would."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_dist.__main__ import main
from hstu_dist.checkpoint.manifest import MANIFEST_FILE, content_hash
from hstu_dist.commands.trained import load_trained, run_of
from hstu_dist.config import compose, save
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ModelUse
from hstu_dist.inference.requests import Requests
from hstu_dist.run_folder import RunFolder
from tests.tiny import MAX_LENGTH, NUM_ITEMS


def write_requests(path: Path, columns: Mapping[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def histories(data: Path) -> tuple[dict[str, list[Any]], list[int]]:
    """Everybody's events but the last, asked about at the time of the last; and the items of the last."""
    dataset, items = SequenceDataset.open(data), Vocabulary.items(data)
    columns: dict[str, list[Any]] = {name: [] for name in ("user_id", "item_ids", "timestamps", "time")}
    targets = []
    for user in range(dataset.num_sequences):
        first, last = int(dataset.offsets[user]), int(dataset.offsets[user + 1]) - 1
        columns["user_id"].append(user)
        columns["item_ids"].append(items.decode(dataset.item_ids[first:last]))
        columns["timestamps"].append(dataset.timestamps[first:last])
        columns["time"].append(int(dataset.timestamps[last]))
        targets += items.decode(dataset.item_ids[last : last + 1])
    return columns, targets


@pytest.fixture
def everybody(tiny_data: Path, tmp_path: Path) -> Path:
    columns, _ = histories(tiny_data)
    return write_requests(tmp_path / "requests.parquet", columns)


def answer(command: str, *words: object) -> int:
    return main([command, *map(str, words)])


def rows(path: Path) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return table


@pytest.mark.distributed
@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_retrieval_gives_the_metrics_of_the_run(
    index: str, tiny_data: Path, tiny_run: Path, everybody: Path, tmp_path: Path
) -> None:
    if index == "hnsw":
        pytest.importorskip("faiss")
    whole, output = tmp_path / "whole.parquet", tmp_path / "new" / "best.parquet"
    words = (f"input={everybody}", f"index={index}", "rows=7")
    assert answer("retrieve", tiny_run, f"output={whole}", "k=40", "exclude_seen=false", *words) == 0
    _, targets = histories(tiny_data)
    hits = []
    ranked = rows(whole)
    for target, ids, own in zip(targets, ranked["retrieved"], ranked["item_ids"], strict=True):
        # the model reads the last events only; an item that comes again is still a target
        others = set(own[-MAX_LENGTH:]) - {target}
        hits.append(target in [item for item in ids if item not in others][:10])
    result = json.loads((tiny_run / "result.json").read_text())
    assert np.mean(hits) == pytest.approx(result["test"]["hr@10"], abs=1e-6)
    assert answer("retrieve", tiny_run, f"output={output}", "k=10", *words) == 0
    found = rows(output)
    for ids, scores, own in zip(found["retrieved"], found["retrieved_scores"], found["item_ids"], strict=True):
        assert len(set(ids)) == 10 and not set(ids) & set(own)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.distributed
def test_scores_are_those_of_retrieval(tiny_run: Path, everybody: Path, tmp_path: Path) -> None:
    best, output = tmp_path / "best.parquet", tmp_path / "scores.parquet"
    words = (f"input={everybody}", f"output={best}", "k=25", "exclude_seen=false")
    assert answer("retrieve", tiny_run, *words) == 0
    found = pq.read_table(best)
    # a candidate twice, somebody without candidates
    lists = [[*ids, ids[0]] for ids in found["retrieved"].to_pylist()]
    lists[3] = []
    asked = found.drop_columns(["retrieved", "retrieved_scores"]).append_column("candidates", pa.array(lists))
    pq.write_table(asked, tmp_path / "asked.parquet")
    assert answer("score", tiny_run, f"input={tmp_path / 'asked.parquet'}", f"output={output}", "micro_batch=13") == 0
    scored = rows(output)
    assert scored["user_id"] == asked["user_id"].to_pylist() and scored["scores"][3] == []
    for user, (scores, expected) in enumerate(
        zip(scored["scores"], found["retrieved_scores"].to_pylist(), strict=True)
    ):
        if user != 3:
            assert scores == pytest.approx([*expected, expected[0]], abs=1e-5)


@pytest.mark.distributed
def test_the_best_checkpoint_is_used(tiny_data: Path, tiny_run: Path, everybody: Path, tmp_path: Path) -> None:
    """Of several checkpoints, that of the best validation."""
    from hstu_dist.commands.checkpoint import find
    from hstu_dist.commands.trained import read_weights

    result = json.loads((tiny_run / "result.json").read_text())
    best = 8 * result["best_epoch"]
    assert read_weights(RunFolder(tiny_run), 8).step == best
    # another one does not matter, such as one that training removes meanwhile
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    folder = RunFolder(copy)
    (folder.checkpoints / "step-00000001").mkdir()
    assert len(find(copy)) > 1 and read_weights(folder, 8).step == best
    # nor one that was validated later, and was worse
    later = shutil.copytree(folder.checkpoints / f"step-{best:08d}", folder.checkpoints / "step-00000024")
    document = json.loads((later / MANIFEST_FILE).read_text())
    document["manifest"]["state"]["step"] = 24
    document["xxh3"] = content_hash(document["manifest"])
    (later / MANIFEST_FILE).write_text(json.dumps(document))
    assert read_weights(folder, 8).step == best
    # without the best one, the newest
    shutil.rmtree(folder.checkpoints / f"step-{best:08d}")
    assert read_weights(folder, 8).step == 24


@pytest.mark.distributed
def test_a_run_of_another_machine_computes_on_this_one(tiny_run: Path) -> None:
    config, folder = run_of(tiny_run, ())
    use = ModelUse(device="cpu", threads=1)
    model = load_trained(config, folder, use, StateCache(0)).model
    # its kernels are for GPUs
    gpu = replace(config, model=replace(config.model, backend="triton"))
    other = load_trained(gpu, folder, use, StateCache(0)).model
    events, nothing = np.arange(3), np.zeros(2, dtype=np.int64)
    requests = Requests(
        offsets=np.array([0, 3]),
        item_ids=events,
        timestamps=events,
        actions=0 * events,
        candidate_offsets=np.array([0, 3]),
        candidate_ids=events + 5,
        times=nothing[:1] + 9,
    )
    assert np.array_equal(model.score(requests, 8)["scores"], other.score(requests, 8)["scores"])


def test_items_of_hashed_streams_have_no_names(tmp_path: Path) -> None:
    words = ["name=x", "data=stream", f"data.path={tmp_path}", "data.num_items=9", "trainer.epochs=null"]
    for kind, refused in (("hashed", True), ("dense", False)):
        save(compose([*words, f"data.item_ids={kind}"]), RunFolder(tmp_path).config_file)
        with pytest.raises(UserError, match=r"data\.item_ids=hashed") if refused else contextlib.nullcontext():
            run_of(tmp_path, ())


def asked(**changes: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "item_ids": [[1, 2, 3], [4]],
        "timestamps": [[10, 20, 30], [5]],
        "candidates": [[5, 6], [7]],
    }
    return {**columns, **changes}


@pytest.mark.distributed
def test_unknown_items_and_empty_histories(tiny_run: Path, tmp_path: Path) -> None:
    """Refused by default; with unknown=skip they have no score, and change nobody else's."""
    output = tmp_path / "scores.parquet"
    huge = 3 * 10**9
    columns = asked(
        item_ids=[[1, huge, 2, 3], [4], [], [huge]],
        timestamps=[[10, 15, 20, 30], [5], [], [1]],
        candidates=[[5, huge, 6], [7], [8], [9]],
    )
    source = write_requests(tmp_path / "asked.parquet", columns)
    assert answer("score", tiny_run, f"input={source}", f"output={output}") == 2
    assert not output.exists() and [p.name for p in tmp_path.iterdir()] == ["asked.parquet"]
    assert answer("score", tiny_run, f"input={source}", f"output={output}", "unknown=skip") == 0
    got = rows(output)["scores"]
    known = write_requests(tmp_path / "known.parquet", asked())
    assert answer("score", tiny_run, f"input={known}", f"output={output}") == 0
    first, second = rows(output)["scores"]
    assert [got[0][0], got[0][2]] == pytest.approx(first, abs=1e-6) and got[0][1] is None
    assert got[1] == pytest.approx(second, abs=1e-6) and got[2:] == [[None], [None]]
    assert answer("retrieve", tiny_run, f"input={source}", f"output={output}", "unknown=skip", "k=60") == 0
    found = rows(output)
    # all there is: 40 items without the 3 of the history
    assert [len(ids) for ids in found["retrieved"]] == [37, 39, 0, 0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        (asked(), ["k=3"], "k=3: a run.s folder knows its settings"),
        ({"item_ids": [[1]], "timestamps": [[1]]}, [], "expected candidates"),
        (asked(timestamps=[[10, 20], [5]]), [], "row 0: item_ids and timestamps differ in length"),
        (asked(timestamps=[[10, 20, 5], [5]]), [], "row 0: timestamps: got 5 as event 2, expected none before"),
        (asked(timestamps=[[10, 20, 30], [-5]]), [], "row 1: timestamps: got -5 as event 0"),
        (asked(timestamps=[[10, 20, 2**62], [5]]), [], "row 0: timestamps: got 4611686018427387904 as event 2"),
        (asked(time=[30, 4]), [], "row 1: timestamps: got 5 as event 0, expected none after the time of the request"),
        (asked(time=[30, None]), [], "row 1: time is null"),
        (asked(time=["2024-01-01", "now"]), [], "column time: got text, expected integers"),
        (asked(item_ids=[[1, 2, 3], [99]]), [], "row 1: item_ids: got an item at place 0"),
        (asked(candidates=[[5, 99], [7]]), [], "row 0: candidates: got an item at place 1"),
        (asked(candidates=[[5, None], [7]]), [], "row 0: candidates holds a null"),
        (asked(candidates=[None, [7]]), [], "row 0: candidates is null"),
        (asked(candidates=[5, 7]), [], "column candidates: got int64, expected a list"),
        (asked(candidates=[[5.5], [7.0]]), [], "column candidates: got double, expected integers or text"),
        (asked(candidates=[["a"], ["b"]]), [], "column candidates: got 'a', expected whole numbers"),
        (asked(candidates=pa.array([[2**64 - 1], [1]], pa.list_(pa.uint64()))), [], "column candidates: .*store it as"),
        (asked(item_ids=[[], [4]], timestamps=[[], [5]]), [], "row 0: item_ids: got no events"),
        (asked(scores=[1, 2]), [], "has a column scores already"),
        (asked(), ["micro_batch=0"], "micro_batch: .*greater than 0"),
        (asked(), ["unknown=maybe"], "unknown: "),
        (asked(), ["seed=3"], "a run's folder knows its settings"),
        (asked(), ["prepared_data=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    columns: dict[str, Any], words: Sequence[str], message: str, tiny_run: Path, tmp_path: Path, capsys: Any
) -> None:
    source = write_requests(tmp_path / "asked.parquet", columns)
    assert answer("score", tiny_run, f"input={source}", f"output={tmp_path / 'scores.parquet'}", *words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.replace("\n  mend: ", " -> ")), error
    assert [p.name for p in tmp_path.iterdir()] == ["asked.parquet"]


@pytest.mark.distributed
def test_items_have_to_be_those_of_the_run_and_not_its_events(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_requests(tmp_path / "asked.parquet", asked())

    def scored_with(first_item: int) -> int:
        # everybody likes everything once; as many items as the run has
        lines = [f"{user},{first_item + item},{100 + item}" for user in range(9) for item in range(NUM_ITEMS)]
        log = tmp_path / f"from_{first_item}.csv"
        log.write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
        data = tmp_path / f"data_{first_item}"
        prepare(EventsConfig(input=str(log), path=str(data)))
        output = f"output={tmp_path / 'scores.parquet'}"
        return answer("score", tiny_run, f"input={source}", output, f"prepared_data={data}")

    assert scored_with(first_item=0) == 0
    capsys.readouterr()
    assert scored_with(first_item=1) == 2
    assert re.search(r"data_1: its items \(40\) are not those that the run was trained on", capsys.readouterr().err)


@pytest.mark.distributed
def test_runs_and_files_that_are_not_there(tiny_run: Path, everybody: Path, tmp_path: Path, capsys: Any) -> None:
    output = f"output={tmp_path / 'out.parquet'}"
    for words, message in (
        ([tmp_path, f"input={everybody}", output], "got no config.yaml"),
        ([f"input={everybody}", output], "run: got none"),
        ([tiny_run, "input=nothing.parquet", output], "nothing.parquet: cannot be read"),
        ([tiny_run, f"input={tiny_run / 'result.json'}", output], "result.json: cannot be read"),
        ([tiny_run, f"input={everybody}"], "output"),
        ([tiny_run, tiny_run, f"input={everybody}", output], "expected one"),
        (["experiment=ml1m", "name=never-trained", f"input={everybody}", output], "never-trained: got no config.yaml"),
    ):
        assert answer("retrieve", *words) == 2
        assert message in capsys.readouterr().err
