"""A stream of raw ids trained with a vocabulary that grows: killed it goes on alike; its checkpoints can be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from hstu_dist.checkpoint.manifest import read_manifest
from hstu_dist.commands import checkpoint as offline
from hstu_dist.commands.evaluate import evaluate_run
from hstu_dist.commands.train import train
from hstu_dist.commands.trained import run_of
from hstu_dist.config import RunConfig, compose
from hstu_dist.data.split import Split
from hstu_dist.data.stream.keys import text_words
from hstu_dist.distributed.table_plan import configured_plan
from hstu_dist.errors import UserError
from hstu_dist.preflight import specs_of
from hstu_dist.train.metrics_file import read_metrics
from hstu_dist.train.trainer import Trainer
from tests.data.stream.cases import events_of, table_of
from tests.distributed.ranks import RanksFailedError, run_ranks
from tests.tiny import tiny_overrides, write_tiny_dataset
from tests.train.test_stream import dies_in_step, outcome, overrides, run_stream

HOURS = 4
ROWS = 24
ZCH = (
    "data.item_ids=raw",
    f"data.num_items={ROWS}",
    "embedding.vocabulary={kind: zch, eviction: distance_lfu, eviction_interval: 3, buckets: 4}",
)


def write_raw_stream(folder: Path) -> Path:
    """Items named by integers beyond 32 bits, of which a few leave and come every hour."""
    for hour, events in enumerate(events_of(HOURS, users=30, a_user=4)):
        raw = (events.items + 3 * hour).astype("int64")
        raw = (raw * (2**33) + 1) * (1 - 2 * (raw % 2))
        file = folder / f"hour={hour:04d}" / "part-0.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(table_of(events).set_column(1, "item_id", pa.array(raw)), file)
    (folder / "_SUCCESS").touch()
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw_stream(tmp_path_factory.mktemp("raw") / "files")


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("grown")
    run_ranks(2, run_stream, files, output, None, *ZCH)
    return output


@pytest.mark.distributed
def test_killed_it_goes_on_as_if_nothing_had_happened(whole: Path, files: Path, tmp_path: Path) -> None:
    fates: list[Callable[[], None]] = [dies_in_step(6), dies_in_step(17)]
    for fate in fates:
        with pytest.raises(RanksFailedError):
            run_ranks(2, run_stream, files, tmp_path, fate, *ZCH)
    run_ranks(2, run_stream, files, tmp_path, None, *ZCH)
    (result, manifest), (expected, whole_manifest) = outcome(tmp_path), outcome(whole)
    assert result == expected
    assert manifest.tensors.keys() == whole_manifest.tensors.keys()
    assert {f.xxh3 for f in manifest.files.values()} == {f.xxh3 for f in whole_manifest.files.values()}


@pytest.mark.distributed
def test_rates_are_logged(whole: Path) -> None:
    lines = [line for line in read_metrics(whole / "stream") if "vocabulary/item/collisions" in line]
    assert lines and all(0 <= line["vocabulary/item/collisions"] <= 1 for line in lines)
    # half of the items find no row of 24
    assert all(line["vocabulary/item/collisions"] > 0.2 for line in lines)
    assert lines[-1]["vocabulary/item/occupied"] == pytest.approx((ROWS - 4) / ROWS)
    assert sum(line["vocabulary/item/evicted_per_step"] for line in lines) > 0
    # every metric of a window counts targets without a row as not found
    assert 0 < outcome(whole)[0]["test"]["hr@10"] < 1


@pytest.mark.distributed
def test_its_checkpoint_is_inspected_resharded_verified_and_exported(whole: Path, tmp_path: Path) -> None:
    run, said = whole / "stream", []
    offline.inspect(run, said.append)
    assert "vocabulary: kind zch, eviction distance_lfu, decay_exponent 1.0, eviction_interval 3" in "\n".join(said)
    before = tmp_path / "before.safetensors"
    offline.export(run, before, said.append)
    offline.reshard(run, 3, said.append)
    offline.verify(run, said.append)
    after = tmp_path / "after.safetensors"
    offline.export(run, after, said.append)
    exported = load_file(after)
    assert all(bool((value == exported[name]).all()) for name, value in load_file(before).items())
    owned = exported["item_table.occupied"].bool()
    assert int(owned.sum()) == ROWS - 4
    assert all(abs(item) % 2**33 in (1, 2**33 - 1) for item in exported["item_table.ids"][owned].tolist())
    assert exported["item_table.weight"].shape == (ROWS, 8)


def write_text_stream(folder: Path, hashed: bool) -> Path:
    """Users and items named by text, a few items leaving and coming every hour; or by the hashes of these texts."""
    for hour, events in enumerate(events_of(HOURS, users=30, a_user=4)):
        names = {
            "user_id": [f"user {number}" for number in events.users.tolist()],
            "item_id": [f"ártículo/{number + 3 * hour}" for number in events.items.tolist()],
        }
        table = table_of(events)
        for column, texts in names.items():
            values = pa.array(texts, pa.large_string())
            found = pa.array(text_words(values).view("int64")) if hashed else values
            table = table.set_column(table.column_names.index(column), column, found)
        file = folder / f"hour={hour:04d}" / "part-0.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(table, file)
    (folder / "_SUCCESS").touch()
    return folder


def stops_in_third_window(files: Path, output: Path) -> None:
    counted = Trainer._count

    def count(trainer: Trainer, *arguments: Any) -> None:
        counted(trainer, *arguments)
        if trainer.state.epoch == 2:
            (output / "stream" / "stop").touch()

    Trainer._count = count  # type: ignore[method-assign]
    run_stream(files, output, None, *ZCH)


@pytest.mark.distributed
def test_text_ids_are_trained_saved_and_restored_at_another_number_of_ranks(tmp_path: Path) -> None:
    texts = write_text_stream(tmp_path / "texts", hashed=False)
    hashes = write_text_stream(tmp_path / "hashes", hashed=True)
    run_ranks(1, stops_in_third_window, texts, tmp_path / "a", timeout=60)
    (tmp_path / "a" / "stream" / "stop").unlink()
    assert not (tmp_path / "a" / "stream" / "result.json").exists()
    run_ranks(2, run_stream, texts, tmp_path / "a", None, *ZCH, timeout=60)
    run_ranks(2, run_stream, hashes, tmp_path / "b", None, *ZCH, timeout=60)
    (result, manifest), (expected, other_manifest) = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert result["steps"] == expected["steps"] and manifest.state["epoch"] == other_manifest.state["epoch"] == HOURS
    assert result["test"]["mrr"] == pytest.approx(expected["test"]["mrr"], rel=0.05)
    tables = []
    for name in ("a", "b"):
        offline.export(tmp_path / name / "stream", tmp_path / f"{name}.safetensors", [].append)
        tables.append(load_file(tmp_path / f"{name}.safetensors"))
    found, by_hash = tables
    for name in ("item_table.ids", "item_table.occupied"):
        assert torch.equal(found[name], by_hash[name])
    owned = found["item_table.occupied"].bool()
    every = text_words(pa.array([f"ártículo/{number}" for number in range(100)], pa.large_string())).view("int64")
    assert int(owned.sum()) == ROWS - 4 and set(found["item_table.ids"][owned].tolist()) <= set(every.tolist())
    assert torch.allclose(found["item_table.weight"][owned], by_hash["item_table.weight"][owned], atol=1e-2)
    # every file was taken
    assert not (tmp_path / "a" / "stream" / "quarantine.jsonl").exists()


@pytest.mark.distributed
def test_commands_that_need_a_static_vocabulary_say_so(whole: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary\.kind=zch, which this command cannot follow"):
        run_of(whole / "stream", [])


def train_prepared(data: Path, output: Path, kind: str) -> None:
    train(prepared(data, output, kind), [].append)


def evaluate_prepared(data: Path, output: Path, kind: str) -> list[str]:
    said: list[str] = []
    evaluate_run(prepared(data, output, kind), Split.TEST, said.append)
    return said


def prepared(data: Path, output: Path, kind: str) -> RunConfig:
    vocabulary = "{kind: zch, rows: 32, buckets: 2}" if kind == "zch" else "{kind: hash, rows: 8}"
    return compose([*tiny_overrides(data, output), f"embedding.vocabulary={vocabulary}", "trainer.epochs=1"])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["zch", "hash"])
def test_prepared_data_trains_with_fewer_rows_than_items(kind: str, tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path)
    run_ranks(2, train_prepared, data, tmp_path, kind, timeout=30)
    said = run_ranks(2, evaluate_prepared, data, tmp_path, kind, timeout=30)[0]
    assert "hr@10" in "\n".join(said)
    tensors = read_manifest(max((tmp_path / "tiny" / "checkpoints").glob("step-*"))).tensors
    weight = next(record for name, record in tensors.items() if name.startswith("table."))
    assert weight.shape[0] == (32 if kind == "zch" else 8)
    assert any(name.startswith("table_vocabulary.item.keys") for name in tensors) == (kind == "zch")


def test_memory_of_a_vocabulary_is_counted(tmp_path: Path) -> None:
    sizes = {}
    for kind in ("zch", "hash"):
        specs = specs_of(prepared(tmp_path, tmp_path, kind), 40)
        sizes[kind] = sum(configured_plan(specs, 2).bytes_per_rank(specs)) // specs["item"].shape.num_rows
    # key, count, last step, as much while waiting, and an index of two; of each rank a mask and a list
    assert sizes["zch"] - sizes["hash"] == 8 * (3 + 3 + 2) + 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["embedding.vocabulary.rows=9"], "vocabulary.rows: got 9, expected null: static"),
        (["embedding.vocabulary.eviction=lru"], "vocabulary.eviction: got lru, expected null: static has no eviction"),
        (
            ["embedding.vocabulary={kind: zch, eviction: lru, decay_exponent: 2.0}"],
            "vocabulary.decay_exponent: got 2.0, expected null: lru has no decay_exponent",
        ),
        (
            ["embedding.vocabulary={kind: zch, rows: 20}"],
            "vocabulary.buckets: got 16, expected at most half of the table's 20",
        ),
        (
            ["embedding.vocabulary.kind=zch", "optimizer.average_decay=0.9"],
            "optimizer.average_decay: got 0.9, expected null with embedding.vocabulary.kind=zch",
        ),
        (["embedding.vocabulary.kind=oldest"], "embedding.vocabulary.kind: Input should be 'static', 'hash' or 'zch'"),
    ],
)
def test_bad_settings_are_refused_at_composition(more: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        compose([*tiny_overrides(tmp_path, tmp_path), *more])
    assert problem in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["data.item_ids=raw"], "embedding.vocabulary.kind: got static, expected hash or zch for data.item_ids=raw"),
        (
            ["embedding.vocabulary.kind=zch"],
            "embedding.vocabulary.kind: got zch, expected static, or data.item_ids=raw",
        ),
        ([*ZCH, "embedding.vocabulary.rows=99"], "embedding.vocabulary.rows: got 99, expected null on a stream"),
    ],
)
def test_a_stream_wants_raw_ids_with_a_vocabulary_and_none_without(more: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        compose(overrides(tmp_path, tmp_path, *more))
    assert problem in str(refusal.value)
