"""What a run is refused for before any rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_dist.config import RunConfig, compose
from hstu_dist.data.config import EventsConfig, prepare_command
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import UserError
from hstu_dist.preflight import check_plan, preflight
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


def test_the_usual_folder_goes_without_saying() -> None:
    assert prepare_command(compose(["experiment=amazon_toys_hstu"]).data) == (
        "python -m hstu_dist prepare data=amazon_toys"
    )


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_checkpoints_need_the_same_disk_space_at_any_world_size(
    sharding: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(RunFolder, "check", lambda self, config, needed_bytes: asked.append(needed_bytes))
    for world_size in (1, 4):
        preflight(run(tmp_path, tiny_data, f"embedding={sharding}"), world_size)
    assert asked[0] == asked[1] > NUM_ITEMS * 8 * 4


def test_the_advised_number_of_ranks_is_the_smallest_that_fits(tiny_data: Path, tmp_path: Path) -> None:
    config = run(tmp_path, tiny_data, f"cluster.memory_per_rank_gib={40_000 / GIB}")
    # 4,000 rows of 8 weights and a row-wise accumulator: 144,000 bytes
    with pytest.raises(UserError, match="use at least 4 ranks"):
        check_plan(config, num_items=4_000, world_size=3)
    check_plan(config, num_items=4_000, world_size=4)


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
