"""A run knows the data that it was trained on from any other, and ids by what they stand for."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pytest

from hstu_dist.data.identity import DataIdentity, values_hash
from hstu_dist.data.schema import ITEMS_FILE, USERS_FILE, load_manifest


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
    known = values_hash(whole)
    assert values_hash(pa.concat_arrays([whole, whole]).slice(4)) == known
    changed = [whole.slice(1), pa.concat_arrays([whole, whole]), pa.array(values[1:] + values[:1])]
    assert len({known, *(values_hash(other) for other in changed)}) == 4


def test_what_strings_are_cut_into_matters_and_how_they_are_stored_does_not() -> None:
    assert values_hash(pa.array(["ab", "c"])) != values_hash(pa.array(["a", "bc"]))
    assert values_hash(pa.array(["1"])) != values_hash(pa.array([1]))
    stored = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    assert {values_hash(pa.array(["ab", "c"]).cast(kind)) for kind in stored} == {values_hash(pa.array(["ab", "c"]))}
    assert values_hash(pa.array([], pa.string())) != values_hash(pa.array([""]))


def test_identity_survives_json_and_names_what_changed(rated_data: Path) -> None:
    manifest = load_manifest(rated_data)
    identity = DataIdentity.of(rated_data, manifest, [*manifest.contextual, "user"])
    assert DataIdentity.from_json(identity.to_json()) == identity
    assert set(identity.values) == {"items", "contextual.user", *(f"contextual.{name}" for name in manifest.contextual)}
    assert identity.other_files(manifest.files) == []
    assert identity.other_files(manifest.files | {ITEMS_FILE: "sha256:0", "sequences-00001.parquet": "sha256:1"}) == [
        ITEMS_FILE,
        "sequences-00001.parquet",
    ]
    fewer = {name: value for name, value in manifest.files.items() if name != USERS_FILE}
    assert identity.other_files(fewer) == [USERS_FILE]
