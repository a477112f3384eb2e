"""A run knows the data that it was trained on from any other, and ids by what they stand for."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from hstu_dist.data.identity import DataIdentity, values_hash
from hstu_dist.data.schema import ITEMS_FILE, load_manifest
from hstu_dist.data.vocabulary import Vocabulary


def hashed(*parts: pa.Array) -> str:
    return values_hash(parts)


@pytest.mark.parametrize(
    "values",
    [
        ["a", "", "bcd", "ü"],
        [3, -1, 2**40, 7],
        [True, False, True, True],
        [1.5, -0.25, 2.0, 9.0],
        [datetime.date(2026, 1, day) for day in (1, 2, 3, 4)],
    ],
)
def test_values_are_hashed_by_what_they_are_and_in_which_order(values: list[object]) -> None:
    whole = pa.array(values)
    known = hashed(whole)
    assert hashed(pa.concat_arrays([whole, whole]).slice(4)) == known
    assert hashed(whole.slice(0, 1), whole.slice(1, 0), whole.slice(1)) == known
    changed = [whole.slice(1), pa.concat_arrays([whole, whole]), pa.array(values[1:] + values[:1])]
    assert len({known, *(hashed(other) for other in changed)}) == 4


def test_what_strings_are_cut_into_matters_and_how_they_are_stored_does_not() -> None:
    assert hashed(pa.array(["ab", "c"])) != hashed(pa.array(["a", "bc"]))
    assert hashed(pa.array(["1"])) != hashed(pa.array([1]))
    stored = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    assert {hashed(pa.array(["ab", "c"]).cast(kind)) for kind in stored} == {hashed(pa.array(["ab", "c"]))}
    assert hashed(pa.array([], pa.string())) != hashed(pa.array([""]))


def test_a_data_set_is_known_by_its_files_or_by_what_it_was_made_from(rated_data: Path) -> None:
    manifest = load_manifest(rated_data)
    identity = DataIdentity.of(rated_data, manifest, [*manifest.contextual, "user"])
    assert DataIdentity.from_json(identity.to_json()) == identity
    assert set(identity.values) == {"items", "contextual.user", *(f"contextual.{name}" for name in manifest.contextual)}
    assert identity.are_values_of("items", Vocabulary.items(rated_data).raw)
    assert identity.are_values_of("contextual.user", Vocabulary.users(rated_data).raw)
    other_files = replace(manifest, files=manifest.files | {ITEMS_FILE: "sha256:0"})
    assert identity.is_of(manifest) and identity.is_of(other_files)
    # the same files, moved to where their source has another name
    assert identity.is_of(replace(manifest, sources={"elsewhere": "sha256:1"}))
    fields = {"action": 3, "other": 2}
    packed = DataIdentity.of(rated_data, replace(manifest, action_fields=fields), [])
    backwards = replace(other_files, action_fields=dict(reversed(fields.items())))
    for changed in (
        replace(other_files, sources={"elsewhere": "sha256:1"}),
        replace(other_files, recipe=manifest.recipe | {"min_user_events": 7}),
        replace(other_files, num_events=manifest.num_events + 1),
    ):
        assert not identity.is_of(changed)
    assert packed.is_of(replace(other_files, action_fields=fields)) and not packed.is_of(backwards)
