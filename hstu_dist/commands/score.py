"""`score` and `retrieve`: a file of requests answered with a run's best checkpoint, on one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hstu_dist.commands.trained import Trained, load_trained, run_of
from hstu_dist.commands.use import Words
from hstu_dist.data.contextual import USER
from hstu_dist.data.request_files import Piece, RequestFile, answers
from hstu_dist.errors import UserError
from hstu_dist.inference.config import RetrieveConfig, ScoreConfig
from hstu_dist.inference.inputs import Inputs
from hstu_dist.inference.requests import Ints, RequestError, Requests
from hstu_dist.inference.retrieval import ExactSearch, RetrievalModel, Search

_NOBODY = np.zeros(0, dtype=np.int64)


def score_file(words: Words[ScoreConfig], say: Callable[[str], None]) -> None:
    """Writes the input's rows with lists of scores, or of what is predicted, beside the candidates.

    Args:
        words: which run, and the settings of the command.
        say: prints a line for the user.

    Raises:
        UserError: the run, the input or the output is not what it should be; nothing is written.
    """
    settings = words.settings
    trained = load_trained(*run_of(words.run, words.overrides), settings)
    read = (*trained.inputs.actions, *map(_column, trained.inputs.contextual))
    source = RequestFile(Path(settings.input), needed=("item_ids", "timestamps", "candidates", *read))
    with answers(source, Path(settings.output), dict.fromkeys(trained.model.outputs, "float")) as output:
        for piece in source.pieces(settings.rows):
            requests = _requests(piece, trained, settings.unknown, with_candidates=True)
            scores = trained.model.score(requests, settings.micro_batch)
            offsets = requests.candidate_offsets
            output.write(piece, {name: (offsets, values) for name, values in scores.items()})
    say(f"{settings.output}: {source.num_rows} requests scored with step {trained.step} of {trained.run}")


def retrieve_file(words: Words[RetrieveConfig], say: Callable[[str], None]) -> None:
    """Writes the input's rows with a list of the best items and one of their scores.

    Args:
        words: which run, and the settings of the command.
        say: prints a line for the user.

    Raises:
        UserError: the run, the input or the output is not what it should be; nothing is written.
    """
    settings = words.settings
    trained = load_trained(*run_of(words.run, words.overrides), settings)
    model = trained.retrieval
    search = search_of(model, settings.index)
    source = RequestFile(Path(settings.input), needed=("item_ids", "timestamps"))
    added = {"retrieved": "string" if trained.inputs.items.is_text else "int64", "retrieved_scores": "float"}
    with answers(source, Path(settings.output), added) as output:
        for piece in source.pieces(settings.rows):
            requests = _requests(piece, trained, settings.unknown, with_candidates=False)
            best = model.retrieve(requests, settings.k, settings.exclude_seen, search)
            found = best.ids >= 0
            offsets = np.concatenate(([0], np.cumsum(found.sum(axis=1))))
            raw = trained.inputs.items.decode(best.ids[found])
            output.write(piece, {"retrieved": (offsets, raw), "retrieved_scores": (offsets, best.scores[found])})
    say(f"{settings.output}: {source.num_rows} requests answered with step {trained.step} of {trained.run}")


def search_of(model: RetrievalModel, index: str) -> Search:
    """How the corpus is searched.

    Raises:
        UserError: a package is missing.
    """
    if index == "exact":
        return ExactSearch(model.items_VD)
    try:
        from hstu_dist.inference.hnsw import HnswSearch
    except ImportError as error:
        raise UserError(
            "index=hnsw: needs the package faiss-cpu", "run pip install '.[ann]' in the clone, or use index=exact"
        ) from error
    return HnswSearch(model.items_VD)


def _requests(piece: Piece, trained: Trained, unknown: Literal["error", "skip"], with_candidates: bool) -> Requests:
    inputs = trained.inputs
    offsets, item_ids = _items(piece, "item_ids", inputs)
    candidate_offsets, candidates = np.zeros(len(offsets), dtype=np.int64), _NOBODY
    if with_candidates:
        candidate_offsets, candidates = _items(piece, "candidates", inputs)
    timestamps = _of_events(piece, "timestamps", offsets)
    try:
        requests = Requests(
            offsets=offsets,
            item_ids=item_ids,
            timestamps=timestamps,
            actions=inputs.words(offsets, {name: _of_events(piece, name, offsets) for name in inputs.actions}),
            candidate_offsets=candidate_offsets,
            candidate_ids=candidates,
            times=_integers(piece, "time", piece.values("time"))
            if piece.has("time")
            else last_times(offsets, timestamps),
            contextual=inputs.codes({name: piece.optional(_column(name)) for name in inputs.contextual}, piece.count),
        )
        return inputs.ready(requests, unknown)
    except RequestError as error:
        row = piece.first_row + error.row
        raise UserError(f"{piece.path} row {row}: {error.problem}", error.remedy) from error


def _column(feature: str) -> str:
    """Where a file says it of a user."""
    return "user_id" if feature == USER else feature


def _of_events(piece: Piece, column: str, offsets: Ints) -> Ints:
    """Numbers [E], one for each event."""
    own, numbers = piece.lists(column)
    different = np.diff(offsets) != np.diff(own)
    if different.any():
        raise UserError(
            f"{piece.path} row {piece.first_row + int(different.argmax())}: item_ids and {column} differ in length",
            f"give each event its {column}",
        )
    return _integers(piece, column, numbers)


def _integers(piece: Piece, column: str, values: Any) -> Ints:
    if not isinstance(values, np.ndarray):
        raise UserError(f"{piece.path}: column {column}: got text, expected integers", "store it as int64")
    return values


def _items(piece: Piece, column: str, inputs: Inputs) -> tuple[Ints, Ints]:
    offsets, raw = piece.lists(column)
    try:
        return offsets, inputs.items.encode(raw)
    except ValueError as error:
        raise UserError(f"{piece.path}: column {column}: {error}", "give ids as the run's data has them") from error


def last_times(offsets: Ints, timestamps: Ints) -> Ints:
    """[B] time of each history's last event; 0 for an empty one."""
    times = np.zeros(len(offsets) - 1, dtype=np.int64)
    filled = np.diff(offsets) > 0
    times[filled] = timestamps[offsets[1:][filled] - 1]
    return times
