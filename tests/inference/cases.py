"""Random histories and candidates, and the plain way to score them: one candidate appended at a time, nothing kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_dist.inference.batches import Candidates, History
from hstu_dist.inference.mfalcon import Encoder
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.context import SequenceContext
from hstu_dist.models.tower import Tower
from hstu_dist.ops.spec import JaggedLayout

MAX_LENGTH = 72
NUM_ITEMS = 90
YEAR = 365 * 86_400

VARIANTS: dict[str, HSTUConfig | TransformerConfig] = {
    "paper": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, num_layers=3),
    "production": HSTUConfig(
        width=12, num_heads=2, max_length=MAX_LENGTH, affine_norm=True, uvqk_bias=True, concat_ux=True, alpha=0.4
    ),
    "widths": HSTUConfig(width=12, num_heads=3, qk_width=5, value_width=7, max_length=MAX_LENGTH),
    "softmax": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, activation="softmax"),
    "no-bias": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, relative_bias="none"),
    "sasrec": TransformerConfig(width=12, num_heads=2, max_length=MAX_LENGTH, ffn_width=9),
}


def encoder_of(config: HSTUConfig | TransformerConfig, seed: int = 1) -> Encoder:
    """A tower with weights large enough that every term of the bias matters."""
    torch.manual_seed(seed)
    tower = Tower(config, torch.device("cpu"))
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "weight" in name and weight.dim() == 1:
                weight.copy_(torch.randn_like(weight))
    table = torch.randn(NUM_ITEMS, config.width)
    return Encoder(
        embed=lambda tokens: table[tokens[:, 0]],
        encode=tower,
        weights=(table, *tower.parameters()),
        max_length=config.max_length,
    )


def history_of(lengths: Sequence[int], seed: int = 0, contextual: Sequence[int] | None = None) -> History:
    """Random items; times ascend by seconds to years, beyond 2^31; the request comes last."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    steps = torch.randint(0, 2, (total + len(lengths),), generator=g)
    steps = steps * 10 ** torch.randint(0, 8, (total + len(lengths),), generator=g)
    key_times, query_times, start = [], [], 0
    for length in lengths:
        times = 3 * 10**9 + steps[start : start + length + 1].cumsum(0)
        key_times.append(times[:-1])
        query_times.append(times[1:])
        start += length + 1
    return History(
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        tokens=torch.randint(NUM_ITEMS, (total, 1), generator=g),
        key_times=torch.cat([torch.empty(0, dtype=torch.int64), *key_times]),
        query_times=torch.cat([torch.empty(0, dtype=torch.int64), *query_times]),
        users=[f"user-{index}" for index in range(len(lengths))],
        num_contextual=None if contextual is None else torch.tensor(contextual),
    )


def candidates_of(counts: Sequence[int], history: History, seed: int = 5) -> Candidates:
    """Random items, some of them twice; each request is made at its last query time, or in 2065 without a history."""
    g = torch.Generator().manual_seed(seed)
    ends = history.offsets[1:]
    times = torch.full((history.num_users,), 3 * 10**9)
    filled = history.offsets.diff() > 0
    times[filled] = history.query_times[ends[filled] - 1]
    return Candidates(
        offsets=torch.tensor([0, *counts]).cumsum(0),
        tokens=torch.randint(NUM_ITEMS, (sum(counts), 1), generator=g),
        times=times,
    )


@torch.no_grad()
def one_by_one(encoder: Encoder, history: History, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """What M-FALCON must give: outputs at candidates [M, D] and at the last history tokens [B, D]."""
    at_candidates, at_last = [], []
    for user in range(history.num_users):
        rows = slice(int(history.offsets[user]), int(history.offsets[user + 1]))
        own = range(int(candidates.offsets[user]), int(candidates.offsets[user + 1]))
        alone = _encode(encoder, history, rows, user, None)
        at_last.append(alone[-1] if len(alone) else alone.new_zeros(alone.shape[1]))
        for candidate in own:
            appended = (candidates.tokens[candidate : candidate + 1], candidates.times[user : user + 1])
            at_candidates.append(_encode(encoder, history, rows, user, appended)[-1])
    width = encoder.embed(history.tokens[:0]).shape[1]
    empty = torch.empty(0, width)
    return torch.cat([empty, *(x[None] for x in at_candidates)]), torch.cat([empty, *(x[None] for x in at_last)])


def _encode(
    encoder: Encoder, history: History, rows: slice, user: int, appended: tuple[Tensor, Tensor] | None
) -> Tensor:
    tokens, key_times, query_times = history.tokens[rows], history.key_times[rows], history.query_times[rows]
    if appended is not None:
        tokens = torch.cat([tokens, appended[0]])
        key_times, query_times = (torch.cat([x, appended[1]]) for x in (key_times, query_times))
    length = tokens.shape[0]
    contextual = None if history.num_contextual is None else history.num_contextual[user : user + 1].contiguous()
    context = SequenceContext(
        layout=JaggedLayout(torch.tensor([0, length]), num_contextual=contextual),
        positions=torch.arange(length),
        query_times=query_times,
        key_times=key_times,
        noise=None,
    )
    return encoder.encode(encoder.embed(tokens), context)
