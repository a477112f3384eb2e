"""What a prepared data set looks like: the numbers of its manifest, read from its files in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import hstu_dist
from hstu_dist.data.flat_columns import EVENT, EVENTS_FILE, FLAT_FOLDER, Records
from hstu_dist.data.schema import FORMAT_VERSION, ITEMS_FILE, USERS_FILE, Manifest

_QUANTILES = (10, 50, 90, 99)
_EVENTS_AT_ONCE = 1 << 20


def describe(folder: Path, hashes: dict[str, str], made_from: dict[str, Any]) -> Manifest:
    """The manifest of a data set whose files are written.

    Args:
        folder: that has them.
        hashes: of the files by name.
        made_from: name, recipe and sources.
    """
    lengths, items = (
        pq.read_table(folder / name, columns=["count"])["count"].to_numpy() for name in (USERS_FILE, ITEMS_FILE)
    )
    quantiles = np.quantile(lengths, np.array(_QUANTILES) / 100)
    top = -np.sort(-items)[: -(-len(items) // 100)]
    first, last = _time_range(folder)
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"hstu_dist {hstu_dist.__version__}",
        num_users=len(lengths),
        num_items=len(items),
        num_events=int(lengths.sum()),
        mean_length=round(float(lengths.mean()), 3),
        max_length=int(lengths.max()),
        files=hashes,
        statistics={
            **{f"length_p{q}": round(float(value), 1) for q, value in zip(_QUANTILES, quantiles, strict=True)},
            "events_of_top_1_percent_items": round(float(top.sum() / lengths.sum()), 4),
            "first_second": first,
            "last_second": last,
        },
        **made_from,
    )


def _time_range(folder: Path) -> tuple[int, int]:
    ranges = []
    events: Records
    with (folder / FLAT_FOLDER / EVENTS_FILE).open("rb") as file:
        while len(events := np.fromfile(file, EVENT, _EVENTS_AT_ONCE)):
            ranges.append((int(events["timestamps"].min()), int(events["timestamps"].max())))
    return min(low for low, _ in ranges), max(high for _, high in ranges)
