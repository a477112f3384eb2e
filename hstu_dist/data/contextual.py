"""Contextual features: what is known of a user, as codes that embeddings look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.data.schema import CONTEXT_FILE, Manifest
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]

USER = "user"
"""The feature that every data set has: who the user is."""


@dataclass(frozen=True, kw_only=True)
class Contextual:
    """C features of S users.

    Attributes:
        sizes: number of values of each feature.
        codes: [S, C] int64; values in ascending order have the codes 0, 1, ...
    """

    sizes: tuple[int, ...]
    codes: Ints


def check_contextual(manifest: Manifest, names: Sequence[str]) -> None:
    """Whether a data set has these features.

    Raises:
        UserError: names the one that is missing.
    """
    known = [USER, *manifest.contextual]
    for name in names:
        if name not in known:
            raise UserError(
                f"task.contextual: got {name}, the data set {manifest.name} has {', '.join(known)}",
                "prepare it with data.user_features=FILE and data.contextual_columns=[NAME, ...]",
            )


def contextual_features(folder: str | Path, manifest: Manifest, names: Sequence[str]) -> Contextual:
    """Codes of features of all users of a prepared data set.

    Args:
        folder: of the data set.
        manifest: of the data set.
        names: `user` or contextual columns.

    Raises:
        UserError: a feature is missing, or the file is damaged.
    """
    check_contextual(manifest, names)
    found = [_codes(Path(folder) / CONTEXT_FILE, name, manifest.num_users) for name in names]
    codes = np.stack([codes for codes, _ in found], axis=1) if found else np.empty((manifest.num_users, 0), np.int64)
    return Contextual(sizes=tuple(size for _, size in found), codes=codes)


def contextual_values(folder: str | Path, manifest: Manifest, names: Sequence[str]) -> dict[str, pa.Array]:
    """The values that codes stand for: those of code 0, 1, ... of each feature, ascending.

    Args:
        folder: of the data set.
        manifest: of the data set.
        names: `user` or contextual columns.

    Raises:
        UserError: a feature is missing, or the file is damaged.
    """
    check_contextual(manifest, names)
    file = Path(folder) / CONTEXT_FILE
    return {
        name: Vocabulary.users(folder).raw
        if name == USER
        else pa.array(np.unique(_column(file, name, manifest.num_users)))
        for name in names
    }


def _codes(file: Path, name: str, num_users: int) -> tuple[Ints, int]:
    if name == USER:
        return np.arange(num_users), num_users
    values, codes = np.unique(_column(file, name, num_users), return_inverse=True)
    return codes.astype(np.int64), len(values)


def _column(file: Path, name: str, num_users: int) -> npt.NDArray[Any]:
    remedy = "run `python -m hstu_dist prepare` again"
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            column = parquet.read(columns=[name])[name]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{file}: contextual column {name} cannot be read ({str(error)[:300]})", remedy) from error
    if len(column) != num_users or column.null_count:
        raise UserError(f"{file}: contextual column {name} has no value for some user", remedy)
    values: npt.NDArray[Any] = column.to_numpy()
    return values
