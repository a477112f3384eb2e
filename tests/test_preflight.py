"""What a run is refused for before any rank starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hstu_dist import preflight as preflight_module
from hstu_dist.config import RunConfig, compose
from hstu_dist.data.config import EventsConfig, SyntheticZipfConfig, prepare_command
from hstu_dist.data.identity import DataIdentity
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import load_manifest
from hstu_dist.distributed.config import ITEM, TableShape, stored_width
from hstu_dist.distributed.table_plan import configured_plan
from hstu_dist.errors import UserError
from hstu_dist.preflight import check_plan, preflight, specs_of
from hstu_dist.run_folder import RunFolder
from tests.tiny import NUM_ITEMS, tiny_overrides

GIB = 2**30


def run(tmp_path: Path, data: Path, *overrides: str) -> RunConfig:
    return compose([*tiny_overrides(data, tmp_path / "runs"), *overrides])


@pytest.mark.parametrize(("events", "enough"), [(3, False), (4, True)])
def test_leave_one_out_needs_four_events_of_somebody(events: int, enough: bool, tmp_path: Path) -> None:
    log = tmp_path / "events.csv"
    lines = [f"{user},{item},{100 + item}" for user in range(3) for item in range(events)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    prepare(EventsConfig(input=str(log), path=str(tmp_path / "data")))
    config = run(tmp_path, tmp_path / "data")
    if enough:
        assert preflight(config, world_size=1).max_length == 4
        return
    with pytest.raises(UserError, match=r"longest sequence has 3 events, .* needs at least 4"):
        preflight(config, world_size=1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experiment=amazon_beauty_hstu", "data=amazon_beauty data.path=nowhere"),
        ("experiment=ml1m", "data=ml1m data.path=nowhere"),
        ("data=events", "data=events data.input=FILE data.path=nowhere"),
    ],
)
def test_missing_data_names_the_command_that_makes_it(override: str, words: str) -> None:
    config = compose([override, "name=x", "data.path=nowhere"])
    with pytest.raises(UserError) as caught:
        preflight(config, world_size=1)
    assert str(caught.value) == f"nowhere: no prepared data set here -> run `python -m hstu_dist prepare {words}`"


def test_data_prepared_with_other_settings_is_refused(tmp_path: Path) -> None:
    made = SyntheticZipfConfig(path=str(tmp_path / "data"), num_users=20, num_items=30, max_events=9)
    prepare(made)
    settings = [f"data.{name}={getattr(made, name)}" for name in ("num_users", "num_items", "max_events", "path")]
    synthetic = ["data=synthetic_zipf", "name=x", f"output={tmp_path / 'runs'}"]
    # how it is read is no part of it
    fitting = compose([*synthetic, *settings, "data.max_length=5"])
    assert preflight(fitting, world_size=1) == load_manifest(tmp_path / "data")
    with pytest.raises(UserError) as caught:
        preflight(compose([*synthetic, *settings, "data.num_items=40"]), world_size=1)
    assert str(caught.value) == (
        f"data.num_items: got 40, but the data set {tmp_path}/data was prepared with 30 -> prepare it again with this "
        "setting, use another data.path, or give the setting that it has"
    )


def test_a_prepared_log_needs_no_word_of_how_it_was_made(tmp_path: Path) -> None:
    log = tmp_path / "events.csv"
    lines = [f"{user},{item},{100 + item}" for user in range(3) for item in range(5)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    prepare(EventsConfig(input=str(log), path=str(tmp_path / "data"), min_user_events=2))
    assert preflight(run(tmp_path, tmp_path / "data"), world_size=1)
    with pytest.raises(UserError, match=r"data\.min_user_events: got 1, .* was prepared with 2"):
        preflight(run(tmp_path, tmp_path / "data", f"data.input={log}"), world_size=1)


def test_tables_in_a_gpus_memory_are_not_held_to_the_hosts(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["cluster.memory_per_rank_gib=1e-9", "trainer.device=cuda"]
    check_plan(run(tmp_path, tiny_data, *small), NUM_ITEMS, 2)
    auto = run(tmp_path, tiny_data, small[0], "trainer.device=auto")
    monkeypatch.setattr(preflight_module.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="embedding tables: "):
        check_plan(auto, NUM_ITEMS, 2)
    monkeypatch.setattr(preflight_module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    check_plan(auto, NUM_ITEMS, 2)
    # a rank knows better
    check_plan(auto, NUM_ITEMS, 2, "cuda")
    with pytest.raises(UserError, match="embedding tables: "):
        check_plan(auto, NUM_ITEMS, 2, "cpu")
    with pytest.raises(UserError, match=r"embedding tables: 0\.00 GiB on rank 0 of 2"):
        check_plan(run(tmp_path, tiny_data, *small, "embedding.compute_kernel=fused_uvm"), NUM_ITEMS, 2)


def test_an_average_does_not_go_where_its_rows_did_not(tmp_path: Path, tiny_data: Path) -> None:
    words = ["optimizer.average_decay=0.9", "trainer.device=cuda"]
    preflight(run(tmp_path, tiny_data, *words), 1)
    config = run(tmp_path, tiny_data, *words, "embedding.compute_kernel=fused_uvm")
    with pytest.raises(UserError, match=r"got compute_kernel=fused_uvm, expected fused with optimizer\.average_decay"):
        preflight(config, 1)
    # one that an earlier version began cannot change it any more
    RunFolder(config.run_dir).describe(config)
    preflight(config, 1)


def write_data(folder: Path, *, last_item: int = 4) -> Path:
    """Three users who do the same five things."""
    folder.mkdir(exist_ok=True)
    items = [0, 1, 2, 3, last_item]
    lines = [f"{user},{item},{100 + place}" for user in range(3) for place, item in enumerate(items)]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]))
    prepare(EventsConfig(input=str(folder / "events.csv"), path=str(folder / "data")))
    return folder / "data"


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path: Path) -> None:
    config = run(tmp_path, write_data(tmp_path))
    folder = RunFolder(config.run_dir)
    manifest = preflight(config, world_size=1)
    assert manifest is not None
    folder.describe(config, DataIdentity.of(tmp_path / "data", manifest, ()))
    # in other files, as another machine would have written it
    folder.data_file.write_bytes(replace(DataIdentity.of(tmp_path / "data", manifest, ()), files={}).to_json())
    preflight(config, world_size=1)
    # as many users, items and events as before
    write_data(tmp_path, last_item=5)
    with pytest.raises(UserError) as caught:
        preflight(config, world_size=1)
    assert str(caught.value) == (
        f"run folder {folder.path}: holds a run on other data than {tmp_path}/data has now "
        f"-> bring that data back, or set name=NAME for a new run ({folder.path}/data.json has the old files' hashes)"
    )
    folder.data_file.unlink()
    preflight(config, world_size=1)


def test_a_damaged_record_of_the_data_is_named(tmp_path: Path) -> None:
    config = run(tmp_path, write_data(tmp_path))
    folder = RunFolder(config.run_dir)
    folder.path.mkdir(parents=True)
    for damaged in ("{", '{"files": {}}', '{"files": 3, "values": {}}'):
        folder.data_file.write_text(damaged)
        with pytest.raises(UserError, match=r"data\.json: cannot be read .* -> remove it"):
            preflight(config, world_size=1)


def test_the_usual_folder_goes_without_saying() -> None:
    assert prepare_command(compose(["experiment=amazon_toys_hstu"]).data) == (
        "python -m hstu_dist prepare data=amazon_toys"
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_checkpoints_need_the_same_disk_space_at_any_world_size(
    sharding: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(RunFolder, "check", lambda self, config, needed_bytes: asked.append(needed_bytes))
    for world_size in (1, 4):
        preflight(run(tmp_path, tiny_data, f"embedding={sharding}"), world_size)
    assert asked[0] == asked[1] > NUM_ITEMS * 8 * 4
    preflight(run(tmp_path, tiny_data, f"embedding={sharding}"), 1, trains=False)
    assert asked[2] == 0


def test_an_average_needs_room_too(tiny_data: Path, tmp_path: Path) -> None:
    plain, averaged = (
        sum(configured_plan(specs, 1).bytes_per_rank(specs))
        for settings in ([], ["optimizer.average_decay=0.9"])
        for specs in [specs_of(run(tmp_path, tiny_data, *settings), 1000)]
    )
    assert averaged - plain == 1000 * stored_width(8) * 4


def test_the_advised_number_of_ranks_is_the_smallest_that_fits(tiny_data: Path, tmp_path: Path) -> None:
    config = run(tmp_path, tiny_data, f"cluster.memory_per_rank_gib={40_000 / GIB}")
    # 4,000 rows of 8 weights and a row-wise accumulator: 144,000 bytes
    with pytest.raises(UserError, match="use at least 4 ranks"):
        check_plan(config, num_items=4_000, world_size=3)
    check_plan(config, num_items=4_000, world_size=4)


def test_all_tables_count_and_every_rank_needs_a_row(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(tmp_path, tiny_data, f"cluster.memory_per_rank_gib={40_000 / GIB}")
    check_plan(config, num_items=1_000, world_size=1)
    with pytest.raises(UserError, match="table item: row_wise cannot split 3 rows over 4 ranks -> "):
        check_plan(config, num_items=3, world_size=4)
    # copies of another table: 8,000 bytes of weights and 1,000 of an accumulator a rank
    monkeypatch.setattr(
        preflight_module, "table_shapes", lambda config, items: {ITEM: TableShape(items, 8), "city": TableShape(250, 8)}
    )
    with pytest.raises(
        UserError, match=r"rank 0 of 1 \(item: 1000 rows, .*; city: 250 rows, .*data_parallel\)"
    ) as caught:
        check_plan(config, num_items=1_000, world_size=1)
    assert "at least 2 ranks" in caught.value.remedy
    check_plan(config, num_items=1_000, world_size=2)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["embedding.compute_kernel=fused_uvm"], "embedding table item: compute_kernel: got fused_uvm, .* CUDA only"),
        (["embedding.compute_kernel=key_value"], "embedding table item: compute_kernel: got key_value, .* CUDA only"),
        (["embedding.dtype=bf16"], "embedding table item: dtype: got bf16, .* CUDA only"),
    ],
)
def test_what_needs_cuda_is_refused_before_ranks_start(
    overrides: list[str], problem: str, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        run(tmp_path, tiny_data, *overrides)


def test_a_plan_for_another_number_of_ranks_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    specs = run(tmp_path, tiny_data).embedding.specs({ITEM: TableShape(NUM_ITEMS, 8)})
    configured_plan(specs, world_size=2).save(file)
    config = run(tmp_path, tiny_data, f"embedding.plan={file}")
    preflight(config, world_size=2)
    with pytest.raises(UserError, match=r"made for 2 ranks, this run has 3"):
        preflight(config, world_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parts", "most"), [(1, 9, 8), (2, 5, 4), (3, 3, 2), (16, 2, 1)])
def test_a_share_cannot_be_cut_into_more_parts_than_it_has_sequences(
    ranks: int, parts: int, most: int, tiny_data: Path, tmp_path: Path
) -> None:
    config = run(tmp_path, tiny_data, f"trainer.micro_batches={parts}")
    with pytest.raises(UserError, match=rf"trainer.micro_batches: got {parts}, but .* has .* sequences") as caught:
        preflight(config, ranks)
    assert f"at most {most}," in caught.value.remedy
    preflight(run(tmp_path, tiny_data, f"trainer.micro_batches={most}"), ranks)


def test_how_ranks_share_the_tower_is_checked_before_they_start(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got fsdp on 1 rank"):
        preflight(run(tmp_path, tiny_data, "trainer.parallel.kind=fsdp"), 1)
