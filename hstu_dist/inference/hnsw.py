"""Approximate search with the package faiss: a graph of all items (HNSW), searched from near to nearer."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from hstu_dist.inference.requests import UNKNOWN, Ints

_NEIGHBOURS = 32
_BUILD_WIDTH = 200
_LEAST_SEARCH_WIDTH = 128


class HnswSearch:
    """Searches a graph in memory; what it misses depends on the data: compare with `ExactSearch`."""

    def __init__(self, items_VD: Tensor) -> None:
        """Builds the graph of unit vectors [V, D]; takes minutes for millions of items."""
        self.index = faiss.IndexHNSWFlat(items_VD.shape[1], _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = _BUILD_WIDTH
        self.index.add(items_VD.float().cpu().numpy())

    def search(self, users_BD: Tensor, seen: tuple[Ints, Ints] | None, k: int) -> tuple[Tensor, Tensor]:
        """As `Search.search`."""
        wanted = k
        if seen is not None:
            # every seen item may be among the best
            wanted += int(np.diff(seen[1]).max(initial=0))
        wanted = min(wanted, self.index.ntotal)
        self.index.hnsw.efSearch = max(_LEAST_SEARCH_WIDTH, wanted)
        scores, ids = self.index.search(users_BD.float().cpu().numpy(), wanted)
        if seen is not None:
            for row, found in enumerate(ids):
                own = seen[0][seen[1][row] : seen[1][row + 1]]
                scores[row, np.isin(found, own)] = -np.inf
        scores[ids < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        missing = ((0, 0), (0, k - scores.shape[1]))
        scores = np.pad(scores, missing, constant_values=-np.inf)
        ids = np.pad(ids, missing, constant_values=UNKNOWN).astype(np.int64)
        ids[np.isneginf(scores)] = UNKNOWN
        return torch.from_numpy(ids).to(users_BD.device), torch.from_numpy(scores).to(users_BD.device)
