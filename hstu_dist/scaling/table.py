"""The points of a study as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.files import replacing
from hstu_dist.scaling.points import Point

_FIELDS = ("run", "family", "seed", "compute", "parameters", "tokens", "seconds", "date", "commit")


def write_points(points: Sequence[Point], path: Path) -> None:
    """One row a run: the fields of `Point` that tell it apart, and every test metric."""
    metrics = sorted({metric for point in points for metric in point.metrics})
    columns = {name: [getattr(point, name) for point in points] for name in _FIELDS}
    columns |= {f"test/{metric}": [point.metrics.get(metric) for point in points] for metric in metrics}
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file)
