"""Several actions a row and features of users: files in KuaiRand's exact format, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from pydantic import TypeAdapter

from hstu_dist.actions import action_fields
from hstu_dist.config import compose_dict
from hstu_dist.data.config import DataConfig, EventsConfig
from hstu_dist.data.contextual import contextual_features
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import CONTEXT_FILE, load_manifest
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{i}" for i in range(18))
)
LOG_COLUMNS, USER_COLUMNS = LOG_HEADER.split(","), USER_HEADER.split(",")
BINARY = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "is_profile_enter"]
PACKED = [*BINARY, "play_time_ms"]
FIRST_MS = 1_649_347_200_000


def write_kuairand(folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """Two log files of 60 events each and the features of 9 users, of whom the log has 8; all events, in order."""
    random = np.random.default_rng(5)
    count = 120
    log: dict[str, Any] = {name: np.zeros(count, dtype=np.int64) for name in LOG_COLUMNS}
    log["user_id"] = random.integers(0, 8, count) * 3
    log["video_id"] = random.integers(0, 7_000_000, count)
    log["time_ms"] = FIRST_MS + random.permutation(count) * 977
    for name in PACKED[:-1]:
        log[name] = random.integers(0, 2, count)
    log["play_time_ms"] = random.integers(0, 400_000, count)
    log |= {name: value for name, value in changes.items() if name in log}
    (folder / "data").mkdir(parents=True)
    for name, part in (("4_08_to_4_21", slice(0, 60)), ("4_22_to_5_08", slice(60, 120))):
        file = folder / "data" / f"log_standard_{name}_1k.csv"
        pa_csv.write_csv(pa.table({name: log[name][part] for name in LOG_COLUMNS}), file)
    users: dict[str, Any] = {name: [0] * 9 for name in USER_COLUMNS}
    users["user_id"] = [u * 3 for u in range(9)][::-1]
    users["user_active_degree"] = ["full_active", "high_active", "UNKNOWN"] * 3
    users["register_days_range"] = ["61-90", "730+", "8-14"] * 3
    users["register_days"] = list(range(9))
    users |= dict(changes.get("users", {}).items())
    pa_csv.write_csv(pa.table(users), folder / "data" / "user_features_1k.csv")
    return log


def config_of(folder: Path, **settings: Any) -> EventsConfig:
    """conf/data/kuairand.yaml for a folder."""
    values = compose_dict("prepare", ["data=kuairand"])["data"]
    values |= {
        "input": str(folder / "data" / "log_standard*.csv"),
        "path": str(folder / "prepared"),
        "user_features": str(folder / "data" / "user_features_1k.csv"),
        "contextual_columns": ["user_active_degree", "register_days"],
    }
    config = TypeAdapter(DataConfig).validate_python(values | settings)
    assert isinstance(config, EventsConfig)
    return config


def test_every_action_of_every_event_comes_back(tmp_path: Path) -> None:
    log = write_kuairand(tmp_path)
    manifest = prepare(config_of(tmp_path))
    assert list(manifest.action_fields) == PACKED and sum(manifest.action_fields.values()) == 31
    data = SequenceDataset.open(tmp_path / "prepared")
    users, items = Vocabulary.users(tmp_path / "prepared"), Vocabulary.items(tmp_path / "prepared")
    order = np.lexsort((log["time_ms"], log["user_id"]))
    owner = np.repeat(np.arange(data.num_sequences), data.lengths)
    assert users.decode(owner) == log["user_id"][order].tolist()
    assert items.decode(data.item_ids) == log["video_id"][order].tolist()
    for field in action_fields(manifest.action_fields):
        assert field.of(data.actions).tolist() == log[field.name][order].tolist(), field.name


def test_features_of_the_users_of_the_log_are_codes(tmp_path: Path) -> None:
    write_kuairand(tmp_path)
    manifest = prepare(config_of(tmp_path))
    assert manifest.contextual == ("user_active_degree", "register_days") and CONTEXT_FILE in manifest.files
    found = contextual_features(tmp_path / "prepared", manifest, ["register_days", "user", "user_active_degree"])
    assert found.sizes == (8, 8, 3) and found.codes.dtype == np.int64
    # users 0, 3, ..., 21 are rows 8 to 1 of the file; values in ascending order are numbered
    degrees = [
        ["UNKNOWN", "full_active", "high_active"].index(v) for v in ["UNKNOWN", "high_active", "full_active"] * 3
    ]
    assert found.codes[:, 2].tolist() == degrees[:8]
    assert found.codes[:, 0].tolist() == list(range(7, -1, -1)) and found.codes[:, 1].tolist() == list(range(8))
    assert contextual_features(tmp_path / "prepared", manifest, []).codes.shape == (8, 0)
    with pytest.raises(UserError, match=r"task.contextual: got tab, the data set events has user, user_active_degree"):
        contextual_features(tmp_path / "prepared", manifest, ["tab"])


@pytest.mark.slow
def test_preparing_again_changes_nothing_and_other_features_do(tmp_path: Path) -> None:
    write_kuairand(tmp_path)
    first = prepare(config_of(tmp_path))
    assert prepare(config_of(tmp_path)) == first == load_manifest(tmp_path / "prepared")
    other = prepare(config_of(tmp_path, contextual_columns=["user_active_degree"]))
    assert other.contextual == ("user_active_degree",)
    file = tmp_path / "data" / "user_features_1k.csv"
    file.write_text(file.read_text().replace("full_active", "busy"))
    assert prepare(config_of(tmp_path, contextual_columns=["user_active_degree"])).sources != other.sources
    none = prepare(config_of(tmp_path, user_features=None, contextual_columns=[]))
    assert none.contextual == () and not (tmp_path / "prepared" / CONTEXT_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_like": np.full(120, 2)}, "row 1: column 'is_like': got '?2'?, expected a number of 1 bits"),
        ({"play_time_ms": np.full(120, 1 << 23)}, "column 'play_time_ms': got .*, expected a number of 23 bits"),
        ({"is_click": np.full(120, -1)}, "column 'is_click': got .*, expected an action"),
        ({"users": {"user_id": [0] * 9}}, "a user is there more than once"),
        ({"users": {"user_id": list(range(9))}}, "got no features of user 9 and 4 others of the log"),
        ({"users": {"user_id": [f"u{i}" for i in range(9)]}}, "got users of type .*string, the log has int64"),
        ({"users": {"user_active_degree": [None] * 9}}, "column 'user_active_degree': got None, expected a value"),
    ],
)
def test_values_that_cannot_be_used_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_kuairand(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        prepare(config_of(tmp_path))
    assert not (tmp_path / "prepared").exists()


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    write_kuairand(tmp_path)
    with pytest.raises(UserError, match=r"log_standard.*column 'is_share' is missing"):
        prepare(config_of(tmp_path, action_columns={"is_share": 1}))
    with pytest.raises(UserError, match=r"user_features_1k.csv: column 'age' is missing"):
        prepare(config_of(tmp_path, contextual_columns=["age"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action_columns": {"a": 16, "b": 16}}, "a, b: got 32 bits together, expected at most 31"),
        ({"action_columns": {"a": 0}}, "a: got 0 bits, expected at least 1"),
        ({"action_columns": {"a": 1}, "action_column": "a"}, "action_column: got a, expected null beside"),
        ({"action_columns": {"item_id": 1}}, "action_columns: got item_id, expected columns of their own"),
        ({"user_features": "x.csv"}, "contextual_columns: got .* expected both or none"),
        ({"contextual_columns": ["age"]}, "contextual_columns: got .* expected both or none"),
        ({"contextual_columns": ["user"], "user_features": "x.csv"}, "expected different names, none of them user"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EventsConfig(**settings)
