"""What clients send and get: JSON, checked before anything is computed; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.actions import WHOLE_WORD, WORD_BITS
from hstu_dist.data.contextual import USER
from hstu_dist.errors import UserError
from hstu_dist.inference.inputs import Inputs
from hstu_dist.inference.requests import Ints, RequestError, Requests, ValueIndex

_FORM = ConfigDict(extra="forbid", strict=True)

Seconds = Annotated[int, Field(ge=0, lt=1 << 62)]
Count = Annotated[int, Field(ge=0, lt=1 << WORD_BITS)]
RawId = int | Annotated[str, Field(max_length=1024)]


@dataclass(frozen=True, kw_only=True, config=_FORM)
class Events:
    """A history, oldest event first; times in seconds, one for each item.

    Attributes:
        item_ids: what was seen.
        timestamps: when.
        actions: what the user did with each item: numbers, or lists of them by column where the data has several; for
            models that read them.
    """

    item_ids: list[RawId]
    timestamps: list[Seconds]
    actions: list[Count] | dict[str, list[Count]] | None = None


@dataclass(frozen=True, kw_only=True, config=_FORM)
class Ask:
    """What every request says.

    Attributes:
        history: of the user.
        user: whose history it is: it is kept, and the next request of the same user costs only what is new.
        context: what else is known of the user, by name; for models that read it.
        time: when the request is made, in seconds; the time of the last event if nobody says.
    """

    history: Events
    user: Annotated[str, Field(max_length=1024)] | int | None = None
    context: dict[str, RawId | None] = Field(default_factory=dict)
    time: Seconds | None = None


@dataclass(frozen=True, kw_only=True, config=_FORM)
class ScoreAsk(Ask):
    """A request for scores, with the items that are to be scored."""

    candidates: list[RawId]


@dataclass(frozen=True, kw_only=True, config=_FORM)
class RetrieveAsk(Ask):
    """A request for the best items of the corpus.

    Attributes:
        k: how many; the server's default if nobody says.
        exclude_seen: leave out the items of the history.
    """

    k: Annotated[int, Field(gt=0, le=10_000)] | None = None
    exclude_seen: bool = True


class BadJsonError(UserError):
    """What came is no JSON."""


Form = TypeVar("Form", ScoreAsk, RetrieveAsk)


class Reader(Generic[Form]):
    """Reads one kind of request."""

    def __init__(self, form: type[Form]) -> None:
        self._adapter: TypeAdapter[Form] = TypeAdapter(form)

    def read(self, body: bytes) -> Form:
        """A checked request.

        Raises:
            BadJsonError: no JSON.
            RequestError: JSON of another form.
        """
        try:
            return self._adapter.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            if first["type"] == "json_invalid":
                raise BadJsonError(f"body: {first['msg']}", "send JSON in UTF-8") from error
            # names of union members are no part of what the client wrote
            where = [str(part) for part in first["loc"] if part in _FIELDS or isinstance(part, int)]
            raise RequestError(0, ".".join(where) or "body", first["msg"], "see docs/inference.md") from error


_FIELDS = (
    "history", "item_ids", "timestamps", "actions", "user", "context", "time", "candidates", "k", "exclude_seen",
)  # fmt: skip


def requests_of(ask: Ask, candidates: Sequence[Any], inputs: Inputs, limits: tuple[int, int]) -> Requests:
    """A request as arrays, with the model's own ids.

    Args:
        ask: the request.
        candidates: raw ids of the items to score.
        inputs: what the model reads.
        limits: most events and most candidates.

    Raises:
        RequestError: lengths differ, exceed a limit, ids are of another type, or there is more or less than the model
            reads.
    """
    events = ask.history
    for field, got, most in (
        ("history", len(events.item_ids), limits[0]),
        ("candidates", len(candidates), limits[1]),
    ):
        if got > most:
            raise RequestError(0, field, f"got {got}, expected at most {most}", "send fewer, or several requests")
    if len(events.item_ids) != len(events.timestamps):
        problem = f"got {len(events.timestamps)}, expected {len(events.item_ids)} as there are items"
        raise RequestError(0, "history.timestamps", problem)
    timestamps = np.array(events.timestamps, dtype=np.int64)
    time = ask.time if ask.time is not None else (events.timestamps[-1] if events.timestamps else 0)
    offsets = np.array([0, len(timestamps)])
    return Requests(
        offsets=offsets,
        item_ids=_encoded(inputs.items, events.item_ids, "history.item_ids"),
        timestamps=timestamps,
        actions=inputs.words(offsets, _actions(events)),
        candidate_offsets=np.array([0, len(candidates)]),
        candidate_ids=_encoded(inputs.items, candidates, "candidates"),
        times=np.array([time], dtype=np.int64),
        users=None if ask.user is None else [ask.user],
        contextual=inputs.codes(_context(ask, inputs), 1),
    )


def _actions(events: Events) -> dict[str, Ints]:
    """Columns of actions; the only one needs no name."""
    given = {WHOLE_WORD: events.actions} if isinstance(events.actions, list) else events.actions or {}
    for name, values in given.items():
        if len(values) != len(events.item_ids):
            problem = f"got {len(values)} of {name}, expected {len(events.item_ids)} as there are items"
            raise RequestError(0, "history.actions", problem)
    return {name: np.array(values, dtype=np.int64) for name, values in given.items()}


def _context(ask: Ask, inputs: Inputs) -> dict[str, list[Any]]:
    """What is known of the user, who it is included if the model reads that."""
    if USER in ask.context:
        raise RequestError(0, "context", "got user, which has a field of its own", "send it as `user`")
    known = {name: [value] for name, value in ask.context.items()}
    return {**known, USER: [ask.user]} if USER in inputs.contextual else known


def _encoded(items: ValueIndex, raw: Sequence[Any], field: str) -> Any:
    try:
        return items.encode(raw)
    except ValueError as error:
        raise RequestError(0, field, str(error), "send ids as the run's data has them") from error


def error_body(kind: str, error: UserError) -> Mapping[str, Any]:
    """An error as JSON."""
    field = {"field": error.field} if isinstance(error, RequestError) else {}
    return {"error": {"type": kind, "problem": error.problem, "remedy": error.remedy, **field}}
