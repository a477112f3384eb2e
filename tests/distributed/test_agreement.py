"""Machines that differ in code or do not share the run folder are told apart, on every rank alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hstu_dist.distributed import agreement
from hstu_dist.distributed.agreement import check_machines_agree, code_fingerprint
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError
from tests.distributed.ranks import run_ranks


def check(folders: list[Path], other_code_on: int | None) -> str:
    """What a rank, alone on its machine, has to say."""
    with process_group("cpu", 30) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_VISIBLE_SECONDS", 0.5)
        if world.rank == other_code_on:
            patch.setattr(agreement, "code_fingerprint", lambda: 1)
        try:
            check_machines_agree(replace(world, local_size=1), folders[world.rank])
        except UserError as error:
            return error.problem
    return ""


@pytest.mark.distributed
def test_machines_that_agree_leave_nothing_behind(tmp_path: Path) -> None:
    assert run_ranks(3, check, [tmp_path] * 3, None) == ["", "", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_a_folder_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    said = run_ranks(3, check, [tmp_path, tmp_path, own], None)
    assert [words.partition("rank ")[2] for words in said] == ["2 does not see what rank 0 wrote there"] * 3
    assert list(tmp_path.rglob(".shared*")) == []


@pytest.mark.distributed
def test_another_version(tmp_path: Path) -> None:
    said = run_ranks(2, check, [tmp_path] * 2, 1)
    assert all(words.startswith("rank 1 runs another version of this package or of torch") for words in said)


def test_the_fingerprint_fits_a_tensor_and_stays() -> None:
    assert 0 <= code_fingerprint() == code_fingerprint() < 2**62
