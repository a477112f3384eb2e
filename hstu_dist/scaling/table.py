"""The points of a study as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.files import replacing
from hstu_dist.scaling.points import Point

_FIELDS = ("run", "family", "seed", "compute", "parameters", "tokens", "date", "commit")


def write_points(points: Sequence[Point], path: Path) -> None:
    """One row a run: name, family, seed, FLOPs, parameters of the tower, tokens, date, commit, every test metric."""
    metrics = sorted({metric for point in points for metric in point.metrics})
    columns = {name: [getattr(point, name) for point in points] for name in _FIELDS}
    columns |= {f"test/{metric}": [point.metrics.get(metric) for point in points] for metric in metrics}
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file)
