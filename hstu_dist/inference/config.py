"""Settings of scoring, retrieval, export and serving; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.validation import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelUse:
    """How a trained model is used.

    Attributes:
        device: cpu, cuda, or auto: CUDA where there is one.
        threads: CPU threads; null: all cores.
        prepared_data: folder that names the items; null: the one that the run was trained on.
        unknown: what becomes of items that the model was not trained on: error refuses the request, skip leaves such
            events out of histories and gives such candidates no score.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, gt=0)
    prepared_data: str | None = None
    unknown: Literal["error", "skip"] = "error"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreConfig(ModelUse):
    """`score`: a score, or what a ranking model predicts, for every candidate of a file of requests.

    Attributes:
        input: Parquet file of requests.
        output: Parquet file to write: the input's columns and the scores.
        micro_batch: candidates that pass through the encoder at once.
        rows: requests read at once.
    """

    input: str
    output: str
    micro_batch: int = Field(default=1024, gt=0)
    rows: int = Field(default=256, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrieveConfig(ModelUse):
    """`retrieve`: the best items of the whole corpus for every history of a file of requests.

    Attributes:
        input: Parquet file of requests.
        output: Parquet file to write: the input's columns, the items and their scores.
        k: items for each request.
        exclude_seen: leave out the items of the request's own history.
        index: exact compares with every item; hnsw searches a graph of them (package faiss-cpu) and may miss some.
        rows: requests read at once.
    """

    input: str
    output: str
    k: int = Field(default=100, gt=0)
    exclude_seen: bool = True
    index: Literal["exact", "hnsw"] = "exact"
    rows: int = Field(default=256, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """`export`: the tower as packages that need nothing of hstu_dist.

    Attributes:
        output: folder to write.
        prepared_data: folder that names the items; null: the one that the run was trained on.
        compile: also compile it for this machine's CPU (AOTInductor; needs a C++ compiler).
        max_candidates: most candidates of a request that the exported tower takes.
        max_users: most users of a batch that it takes.
    """

    output: str
    prepared_data: str | None = None
    compile: bool = True
    max_candidates: int = Field(default=1024, gt=1)
    max_users: int = Field(default=1024, gt=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeConfig(ModelUse):
    """`serve`: a small HTTP server.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any that is free, which the first line of output names.
        max_pending: requests that may wait; more are refused with 503 at once.
        max_batch: requests that are scored together.
        max_batch_tokens: events and candidates that are scored together, but for a single request.
        micro_batch: candidates that pass through the encoder at once.
        max_candidates: of a request; more are refused with 422.
        max_events: of a request's history as it is sent; more are refused with 422. The model reads the last ones.
        max_body_bytes: of a request; a larger one is refused with 413.
        timeout_seconds: a request that has not been answered by then is answered with 504.
        cache_mib: memory for histories between requests; 0 keeps none.
        stop_seconds: how long requests in flight may take after SIGTERM.
        k: items that `retrieve` gives where a request names no number.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_pending: int = Field(default=64, gt=0)
    max_batch: int = Field(default=16, gt=0)
    max_batch_tokens: int = Field(default=8192, gt=0)
    micro_batch: int = Field(default=1024, gt=0)
    max_candidates: int = Field(default=10_000, gt=0)
    max_events: int = Field(default=10_000, gt=0)
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    timeout_seconds: float = Field(default=1.0, gt=0)
    cache_mib: int = Field(default=256, ge=0)
    stop_seconds: float = Field(default=10.0, ge=0)
    k: int = Field(default=100, gt=0)
