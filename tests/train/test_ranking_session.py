"""Data that cannot be ranked is refused in one line, before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu_dist.commands.ranking_session import RankingSession, check_labels
from hstu_dist.config import compose, load, save
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.schema import load_manifest
from hstu_dist.data.split import Split
from hstu_dist.errors import UserError
from hstu_dist.preflight import preflight
from tests.rated import MAX_LENGTH, rated_overrides, write_rated_dataset
from tests.train.cases import WORLD


def session_of(data: Path, *overrides: str) -> RankingSession:
    return RankingSession.build(compose([*rated_overrides(data, Path("unused")), *overrides]), WORLD)


def test_the_configuration_survives_its_file(rated_data: Path, tmp_path: Path) -> None:
    config = compose(rated_overrides(rated_data, tmp_path))
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=sampled_softmax"], "loss: got sampled_softmax, expected multi_task for task=ranking"),
        (["trainer.evaluation.monitor=ndcg@10"], "monitor: got ndcg@10, expected one of like/auc, stars/r2"),
        (["trainer.evaluation.monitor=like/ne"], "monitor: got like/ne, expected one of like/auc, stars/r2"),
        (["task.contextual=[user,user]"], "contextual: got .*, expected different names"),
        (["task.test_share=0.95"], "validation_share [+] test_share: got 1.05, expected less than 1"),
        (["model.max_length=3"], "model.max_length: got 3, expected at least data.max_length"),
        (["loss.heads=[]"], "heads: got names .*, expected at least one head"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides: list[str], message: str, rated_data: Path) -> None:
    with pytest.raises(UserError, match=message):
        compose([*rated_overrides(rated_data, Path("unused")), *overrides])


def test_heads_do_not_retrieve() -> None:
    with pytest.raises(UserError, match="loss: got multi_task, expected sampled_softmax or full_softmax for task=retr"):
        compose(["name=x", "loss=ratings"])


def test_dlrm_does_not_retrieve() -> None:
    with pytest.raises(UserError, match="model: got dlrm, expected hstu or sasrec for task=retrieval"):
        compose(["name=x", "model=dlrm"])


def test_columns_that_the_data_lacks_are_named_before_ranks_start(rated_data: Path, tmp_path: Path) -> None:
    overrides = rated_overrides(rated_data, tmp_path)
    head = "loss.heads=[{name: click, kind: binary, column: is_click}]"
    with pytest.raises(UserError, match=r"head click: got column is_click, the data set events has action") as caught:
        preflight(compose([*overrides, head, "trainer.evaluation.monitor=click/auc"]), 1)
    assert "data.action_columns" in caught.value.remedy
    with pytest.raises(UserError, match=r"task.contextual: got gender, the data set events has user") as caught:
        preflight(compose([*overrides, "task.contextual=[gender]"]), 1)
    assert "data.contextual_columns" in caught.value.remedy


def test_data_without_actions_is_refused(tiny_data: Path) -> None:
    with pytest.raises(UserError, match="every action is 0, so there is nothing to rank by") as caught:
        session_of(tiny_data)
    assert "data.action_column=NAME" in caught.value.remedy


def test_labels_of_one_class_are_refused(tmp_path: Path) -> None:
    data = write_rated_dataset(tmp_path, constant=5)
    with pytest.raises(
        UserError, match=r"head like: got only labels 1 in the training part .* NE and AUC are undefined"
    ):
        session_of(data)


def test_actions_out_of_range_are_refused(rated_data: Path) -> None:
    with pytest.raises(UserError, match=r"got action 5, expected actions in \[0, 5\) \(task.action_levels\)"):
        session_of(rated_data, "task.action_levels=5")


def test_every_part_must_have_both_classes(rated_data: Path) -> None:
    session = session_of(rated_data)
    dataset, moments, config = session.dataset, session.moments, session.config.prepared
    late = dataset.timestamps > moments.validate_until
    liked = replace(dataset, actions=np.where(late, 5, dataset.actions).astype(np.int32))
    with pytest.raises(UserError, match="head like: got only labels 1 in the test part"):
        check_labels(liked, session.heads, moments, config)
    never = replace(moments, validate_until=10**12)
    with pytest.raises(UserError, match="head like: got no event in the test part"):
        check_labels(dataset, session.heads, never, config)
    # of users with more than two late events only the last two are liked, and no others scored
    ends = np.repeat(dataset.offsets[1:], dataset.lengths)
    last_two = ends - np.arange(len(ends)) <= 2
    disliked = replace(liked, actions=np.where(late & ~last_two, 1, liked.actions).astype(np.int32))
    check_labels(disliked, session.heads, moments, config)
    short = replace(config, max_length=2)
    with pytest.raises(UserError, match="head like: got only labels 1 in the test part"):
        check_labels(disliked, session.heads, moments, short)


def test_each_part_scores_its_own_events_with_their_history(rated_data: Path) -> None:
    session = session_of(rated_data)
    dataset, moments = session.dataset, session.moments
    for split, first, last in (
        (Split.TRAIN, -1, moments.train_until),
        (Split.VALIDATION, moments.train_until, moments.validate_until),
        (Split.TEST, moments.validate_until, 10**12),
    ):
        seen = 0
        for batch in session.loader(split).epoch(0):
            assert batch.contextual is not None and batch.contextual[:, 0].tolist() == batch.row_ids.tolist()
            assert int(batch.timestamps.max()) <= last and int(batch.lengths.max()) <= MAX_LENGTH
            # no event follows the last one: it stands for itself
            ends = batch.offsets[1:] - 1
            assert batch.query_times[ends].tolist() == batch.timestamps[ends].tolist()
            seen += int((batch.timestamps > first).sum())
        lengths = [
            int(((times > first) & (times <= last))[max(0, int((times <= last).sum()) - MAX_LENGTH) :].sum())
            for times in np.split(dataset.timestamps, dataset.offsets[1:-1])
        ]
        assert seen == sum(lengths) > 0


def test_manifests_of_earlier_versions_open(rated_data: Path, tmp_path: Path) -> None:
    text = json.loads((rated_data / "dataset.json").read_text())
    for name in ("action_fields", "contextual"):
        text.pop(name)
    (tmp_path / "dataset.json").write_text(json.dumps(text))
    manifest = load_manifest(tmp_path)
    assert manifest.action_fields == {} and manifest.contextual == ()
    assert SequenceDataset.open(rated_data).manifest == manifest
