"""`score` and `serve` answer with what a ranking run's heads predict; `retrieve` and bad input are refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_dist.__main__ import main
from hstu_dist.actions import action_fields
from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.trained import Trained, inputs_of, load_trained, read_weights, run_of, tower_of
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ModelUse, ServeConfig
from hstu_dist.inference.inputs import ActionInput, Inputs
from hstu_dist.inference.messages import BadJsonError, Reader, ScoreAsk, requests_of
from hstu_dist.inference.requests import UNKNOWN, RequestError, ValueIndex
from tests.rated import MAX_LENGTH, NUM_ITEMS

TOLERANCE = 1e-5
NOBODY = 10**6


def events_before_the_last(data: Path) -> dict[str, list[Any]]:
    """Everybody's events but the last three, which are candidates at the time of the first of them."""
    dataset, items, users = SequenceDataset.open(data), Vocabulary.items(data), Vocabulary.users(data)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("user_id", "item_ids", "timestamps", "action", "time", "candidates")
    }
    for user in range(dataset.num_sequences):
        first, end = int(dataset.offsets[user]), int(dataset.offsets[user + 1])
        cut = end - 3
        columns["user_id"] += users.decode(np.array([user]))
        columns["item_ids"].append(items.decode(dataset.item_ids[first:cut]))
        columns["timestamps"].append(dataset.timestamps[first:cut].tolist())
        columns["action"].append(dataset.actions[first:cut].tolist())
        columns["time"].append(int(dataset.timestamps[cut]))
        columns["candidates"].append(items.decode(dataset.item_ids[cut:end]))
    return columns


def by_the_training_code(run: Path, data: Path, request: Mapping[str, Any], user: int) -> np.ndarray:
    """Probability of a like and stars of each candidate, [M, 2], as the last event of a sequence."""
    config, folder = run_of(run, ())
    weights = read_weights(folder, 8)
    tower = tower_of(config, inputs_of(config, folder, None), weights, torch.device("cpu"))
    encode = Vocabulary.items(data).encode
    rows = []
    for candidate in request["candidates"]:
        # the model reads MAX_LENGTH events, of which the candidate is one
        items = torch.from_numpy(encode([*request["item_ids"][-(MAX_LENGTH - 1) :], candidate]))
        times = torch.tensor([*request["timestamps"][-(MAX_LENGTH - 1) :], request["time"]])
        actions = torch.tensor([*request["action"][-(MAX_LENGTH - 1) :], 0], dtype=torch.int32)
        batch = JaggedBatch(
            item_ids=items, timestamps=times, query_times=times, actions=actions, target_ids=items,
            offsets=torch.tensor([0, len(items)]), row_ids=torch.tensor([0]), contextual=torch.tensor([[user]]),
        )  # fmt: skip
        like, stars = tower(weights.table_VD[items], batch, None)[-1].double()
        rows.append([float(like.sigmoid()), float(1.1 * stars + 3.6)])
    return np.array(rows)


def answer(command: str, *words: object) -> int:
    return main([command, *map(str, words)])


def scored(run: Path, folder: Path, columns: Mapping[str, Any], *words: object) -> dict[str, list[Any]]:
    source, output = folder / "asked.parquet", folder / "answers.parquet"
    pq.write_table(pa.table(dict(columns)), source)
    assert answer("score", run, f"input={source}", f"output={output}", "device=cpu", *words) == 0
    table: dict[str, list[Any]] = pq.read_table(output).to_pydict()
    return table


@pytest.mark.distributed
def test_score_gives_what_the_heads_predict_of_the_next_event(
    rated_run: Path, rated_data: Path, tmp_path: Path
) -> None:
    columns = events_before_the_last(rated_data)
    assert max(map(len, columns["item_ids"])) > MAX_LENGTH and min(map(len, columns["item_ids"])) == 0
    # somebody whom training never saw, and nobody in particular
    for user in (NOBODY, None):
        for name in columns:
            columns[name].append(user if name == "user_id" else columns[name][5])
    got = scored(rated_run, tmp_path, columns, "rows=7", "micro_batch=2")
    for row, (likes, stars) in enumerate(zip(got["predicted_like"], got["predicted_stars"], strict=True)):
        user = row if row < 40 else UNKNOWN
        request = {name: values[row] for name, values in columns.items()}
        expected = by_the_training_code(rated_run, rated_data, request, user)
        assert np.allclose(np.stack([likes, stars], axis=1), expected, rtol=0, atol=TOLERANCE)
    assert got["candidates"] == columns["candidates"]


@pytest.mark.distributed
def test_unknown_items_are_refused_or_skipped(rated_run: Path, tmp_path: Path, capsys: Any) -> None:
    columns: dict[str, Any] = {
        "user_id": [1, 2],
        "item_ids": [[1, 99, 2], [99]],
        "timestamps": [[10, 11, 12], [5]],
        "action": [[4, 5, 1], [3]],
        "candidates": [[3, 98, 3], []],
    }
    source = tmp_path / "asked.parquet"
    pq.write_table(pa.table(columns), source)
    assert answer("score", rated_run, f"input={source}", f"output={tmp_path / 'out'}") == 2
    assert "row 0: item_ids: got an item at place 1" in capsys.readouterr().err
    got = scored(rated_run, tmp_path, columns, "unknown=skip")
    known = {**columns, "item_ids": [[1, 2], []], "timestamps": [[10, 12], []], "action": [[4, 1], []]}
    known["candidates"] = [[3, 3], []]
    plain = scored(rated_run, tmp_path, known)
    for name in ("predicted_like", "predicted_stars"):
        first, missing, again = got[name][0]
        assert missing is None and [first, again] == pytest.approx(plain[name][0], abs=TOLERANCE)
        assert first == pytest.approx(again, abs=TOLERANCE) and got[name][1] == []


def asked(**changes: Any) -> dict[str, Any]:
    columns = {"user_id": [1], "item_ids": [[1, 2]], "timestamps": [[10, 20]], "action": [[4, 5]], "candidates": [[3]]}
    return {name: values for name, values in {**columns, **changes}.items() if values is not None}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (asked(user_id=None), "expected user_id"),
        (asked(action=None), "expected action"),
        (asked(user_id=["a"]), "row 0: user: got 'a', expected whole numbers"),
        (asked(user_id=[[1]]), "row 0: user: got "),
        (asked(action=[[4]]), "row 0: item_ids and action differ in length"),
        (asked(action=[[4, 16]]), "row 0: action: got 16 as event 1, expected 0 to 15"),
        (asked(action=[[-1, 1]]), "row 0: action: got -1 as event 0, expected 0 to 15"),
        (asked(action=[["a", "b"]]), "column action: got text, expected integers"),
        (asked(action=[[1.5, 2.0]]), "column action: got double, expected integers"),
        (asked(timestamps=[["a", "b"]]), "column timestamps: got text, expected integers"),
        (asked(predicted_like=[1.0]), "has a column predicted_like already"),
    ],
)
def test_bad_files_leave_nothing_behind(
    columns: Any, message: str, rated_run: Path, tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "asked.parquet"
    pq.write_table(pa.table(columns), source)
    assert answer("score", rated_run, f"input={source}", f"output={tmp_path / 'out'}", "device=cpu") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["asked.parquet"]


@pytest.mark.distributed
def test_a_ranking_model_does_not_retrieve(rated_run: Path, tmp_path: Path, capsys: Any) -> None:
    pq.write_table(pa.table(asked()), tmp_path / "asked.parquet")
    words = (f"input={tmp_path / 'asked.parquet'}", f"output={tmp_path / 'out'}")
    assert answer("retrieve", rated_run, *words) == 2
    assert "was trained to rank, so it scores candidates and retrieves none" in capsys.readouterr().err


@pytest.mark.distributed
def test_other_data_than_that_of_the_run_is_refused(
    rated_run: Path, tiny_data: Path, tmp_path: Path, capsys: Any
) -> None:
    pq.write_table(pa.table(asked()), tmp_path / "asked.parquet")
    words = (f"input={tmp_path / 'asked.parquet'}", f"output={tmp_path / 'out'}", f"prepared_data={tiny_data}")
    assert answer("score", rated_run, *words) == 2
    assert "its items (40) are not those that the run was trained on" in capsys.readouterr().err


@pytest.fixture(scope="session")
def ranking(rated_run: Path) -> Trained:
    return load_trained(*run_of(rated_run, ()), ModelUse(device="cpu", threads=1), StateCache(1 << 20))


def body(**changes: Any) -> dict[str, Any]:
    history = {"item_ids": [1, 2, 3], "timestamps": [10, 20, 30], "actions": [4, 5, 1]}
    return {"user": 3, "history": history, "candidates": [5, 6, 5], "time": 40, **changes}


def with_history(**changes: Any) -> dict[str, Any]:
    return body(history={**body()["history"], **changes})


def played(ranking: Trained, scenario: Callable[[Any], Awaitable[None]], **changes: Any) -> None:
    pytest.importorskip("aiohttp")
    from aiohttp.test_utils import TestClient, TestServer

    from hstu_dist.inference.server import Served, Server

    async def play() -> None:
        served = Served(model=ranking.model, inputs=ranking.inputs, description={"step": ranking.step})
        server = Server(served, ServeConfig(timeout_seconds=20, **changes))
        async with TestClient(TestServer(server.application())) as client:
            await scenario(client)

    asyncio.run(play())


@pytest.mark.distributed
def test_serve_answers_as_the_training_code(ranking: Trained, rated_run: Path, rated_data: Path) -> None:
    longer = with_history(item_ids=[1, 2, 3, 4], timestamps=[10, 20, 30, 35], actions=[4, 5, 1, 2])
    named = with_history(actions={"action": [4, 5, 1]})
    nobody = body(user=None, history={"item_ids": [], "timestamps": [], "actions": []})
    cases = [(body(), 3), (longer, 3), (named, 3), (nobody, UNKNOWN), (body(user=NOBODY), UNKNOWN)]

    async def scenario(client: Any) -> None:
        for responses in (
            await asyncio.gather(*(client.post("/v1/score", json=case) for case, _ in cases)),
            [await client.post("/v1/score", json=case) for case, _ in cases],
        ):
            for response, (case, user) in zip(responses, cases, strict=True):
                content = await response.json()
                assert response.status == 200, content
                actions = case["history"]["actions"]
                flat = {**case["history"], "action": actions if isinstance(actions, list) else actions["action"]}
                expected = by_the_training_code(rated_run, rated_data, {**flat, **case}, user)
                got = np.stack([content["predicted_like"], content["predicted_stars"]], axis=1)
                assert np.allclose(got, expected, rtol=0, atol=TOLERANCE)
        refused = await client.post("/v1/retrieve", json={"history": body()["history"]})
        assert refused.status == 404 and "was trained to rank" in (await refused.json())["error"]["problem"]

    played(ranking, scenario)
    assert ranking.model.cache is not None and ranking.model.cache.statistics.hits >= 3


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (with_history(actions=None), "actions"),
        (with_history(actions=[4, 5]), "history.actions"),
        (with_history(actions=[4, 5, -1]), "history.actions.2"),
        (with_history(actions=[4, 5, 16]), "action"),
        (with_history(actions=[4, 5, 2**40]), "history.actions.2"),
        (with_history(actions={"is_click": [1, 1, 1]}), "actions"),
        (with_history(actions={"action": [1, 1, 1], "is_click": [1, 1, 1]}), "actions"),
        (body(context={"gender": 1}), "context"),
        (body(context={"user": 1}), "context"),
        (body(context={"gender": 1.5}), "context"),
        (body(user="somebody"), "user"),
        (body(candidates=[99]), "candidates"),
    ],
)
def test_bad_requests_have_typed_errors(ask: Any, field: str, ranking: Trained) -> None:
    async def scenario(client: Any) -> None:
        response = await client.post("/v1/score", json=ask)
        error = (await response.json())["error"]
        assert response.status == 422 and error["field"] == field, error
        assert (await client.post("/v1/score", json=body())).status == 200

    played(ranking, scenario)


values = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.none(), st.text(max_size=3))


@st.composite
def bodies(draw: Any) -> bytes:
    """Requests that are right or nearly right."""
    length = draw(st.integers(0, 20))
    good: dict[str, Any] = {
        "history": {
            "item_ids": draw(st.lists(st.integers(0, NUM_ITEMS), min_size=length, max_size=length)),
            "timestamps": sorted(draw(st.lists(st.integers(0, 2**40), min_size=length, max_size=length))),
            "actions": draw(st.lists(st.integers(0, 16), min_size=length, max_size=length)),
        },
        "candidates": draw(st.lists(st.integers(0, NUM_ITEMS), max_size=12)),
        "user": draw(st.one_of(st.none(), st.integers(0, 45))),
    }
    if draw(st.booleans()):
        where = draw(st.sampled_from([good, good["history"]]))
        where[draw(st.sampled_from([*where, "context", "other"]))] = draw(
            st.recursive(
                values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
            )
        )
    return json.dumps(good).encode()


@pytest.mark.distributed
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=bodies(), policy=st.sampled_from(["error", "skip"]))
def test_any_body_gives_predictions_or_a_typed_error(text: bytes, policy: Any, ranking: Trained) -> None:
    try:
        ask = Reader(ScoreAsk).read(text)
        requests = ranking.inputs.ready(requests_of(ask, ask.candidates, ranking.inputs, (30, 30)), policy)
    except (RequestError, BadJsonError):
        return
    answers = ranking.model.score(requests, 4)
    for got in answers.values():
        assert np.array_equal(np.isnan(got), requests.candidate_ids == UNKNOWN)
    assert ((answers["predicted_like"] > 0) & (answers["predicted_like"] < 1) | (requests.candidate_ids < 0)).all()


def test_several_actions_are_packed_as_prepared() -> None:
    fields = action_fields({"is_click": 1, "play_time_ms": 23})
    inputs = Inputs(
        items=ValueIndex(pa.array([1, 2])),
        max_events=5,
        actions={field.name: ActionInput(field, field.largest) for field in fields},
        contextual={"gender": ValueIndex(pa.array(["f", "m"])), "age": ValueIndex(pa.array([18, 30]))},
    )
    offsets = np.array([0, 1, 3])
    words = inputs.words(offsets, {"play_time_ms": np.array([5, 0, 2**23 - 1]), "is_click": np.array([1, 0, 1])})
    assert [[int(field.of(word)) for field in fields] for word in words] == [[1, 5], [0, 0], [1, 2**23 - 1]]
    with pytest.raises(RequestError, match="is_click: got 2 as event 1, expected 0 to 1") as caught:
        inputs.words(offsets, {"play_time_ms": np.zeros(3, dtype=np.int64), "is_click": np.array([0, 0, 2])})
    assert caught.value.row == 1
    codes = inputs.codes({"gender": ["m", None, "x"], "age": [18, 19, 30]}, 3)
    assert codes is not None and codes.tolist() == [[1, 0], [UNKNOWN, UNKNOWN], [UNKNOWN, 1]]
    with pytest.raises(RequestError, match="context: got gender, expected gender, age"):
        inputs.codes({"gender": ["m"]}, 1)
    with pytest.raises(RequestError, match="age: got '18', expected whole numbers"):
        inputs.codes({"gender": ["m"], "age": ["18"]}, 1)
