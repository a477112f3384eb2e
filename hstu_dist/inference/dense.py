"""The tower on padded batches in plain PyTorch: what `torch.export` can follow, with operators that exist without us.

Shapes: B users, N longest history of the batch, M candidates of each, S = N + M slots, D width, H heads, Q, V widths.
Rows of a layer are the slots of all users, [B·S, D]; slots beyond a user's history are computed and never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_dist.errors import UserError
from hstu_dist.models.context import QueriesKeysValues
from hstu_dist.models.tower import Tower
from hstu_dist.ops.bias import RelativeBias, time_bucket
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.ops.random import TokenNoise
from hstu_dist.ops.spec import Activation, AttentionSpec


@dataclass(frozen=True, kw_only=True)
class DenseContext:
    """Answers for padded batches what `SequenceContext` answers for jagged ones.

    Attributes:
        lengths: [B] int64, tokens of each history, at most N.
        slots: [B, S] int64, positions; all candidates of a user share the one after the history.
        queries: [B, S] int64 seconds.
        keys: [B, S] int64 seconds.
        num_history: N.
        noise: none.
    """

    lengths: Tensor
    slots: Tensor
    queries: Tensor
    keys: Tensor
    num_history: int
    noise: TokenNoise | None = None

    @property
    def positions(self) -> Tensor:
        """As `Context.positions`."""
        return self.slots.flatten()

    @property
    def query_times(self) -> Tensor:
        """As `Context.query_times`."""
        return self.queries.flatten()

    @property
    def key_times(self) -> Tensor:
        """As `Context.key_times`."""
        return self.keys.flatten()

    def elapsed(self) -> Tensor:
        """[B·S] int64 seconds since the token before, 0 for the first; candidates all follow the history."""
        before = (self.slots - 1).clamp(min=0)
        since = self.keys - self.keys.gather(1, before)
        return torch.where(self.slots > 0, since, 0).flatten()

    def recent(self, length: int) -> tuple[Tensor, DenseContext]:
        """Layers that see the most recent tokens only have no padded form.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"export: the model has layers that see the last {length} tokens only, which padded batches cannot give",
            "export a model without truncated layers",
        )

    def attend(self, layer: int, qkv: QueriesKeysValues, spec: AttentionSpec, bias: RelativeBias | None) -> Tensor:
        """As `Context.attend`: each slot over the history, and each candidate over itself as well."""
        B, S = self.slots.shape
        N = self.num_history
        q, k, v = (x.reshape(B, S, x.shape[1], x.shape[2]).transpose(1, 2) for x in qkv)
        scores_BHSN = spec.alpha * torch.matmul(q, k[:, :, :N].transpose(-1, -2))
        own_BHS = spec.alpha * (q * k).sum(-1)
        if bias is not None:
            biased, own = self._bias(bias)
            scores_BHSN = scores_BHSN + biased[:, None]
            own_BHS = own_BHS + own[:, None]
        seen_BSN, itself_S = self._visible(spec)
        weights, own_weight = self._weights(scores_BHSN, own_BHS, (seen_BSN[:, None], itself_S), spec)
        out_BHSV = torch.matmul(weights, v[:, :, :N]) + own_weight[..., None] * v
        return out_BHSV.transpose(1, 2).reshape(B * S, v.shape[1], v.shape[3])

    def _bias(self, bias: RelativeBias) -> tuple[Tensor, Tensor]:
        """Of each slot and history token [B, S, N], and of each slot and itself [B, S]."""
        N, zero = self.num_history, bias.max_length - 1
        distance = torch.arange(N, device=self.slots.device) - self.slots[:, :, None]
        # of slots that are never seen it may be any that exists
        biased = bias.position_weight[(zero + distance).clamp(0, 2 * zero)]
        own = bias.position_weight[zero].expand(self.slots.shape)
        if bias.time_weight is not None:
            biased = biased + bias.time_weight[time_bucket(self.queries[:, :, None] - self.keys[:, None, :N])]
            own = own + bias.time_weight[time_bucket(self.queries - self.keys)]
        return biased, own

    def _visible(self, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Which history tokens each slot sees [B, S, N], and which slots see themselves besides [S]."""
        N, S = self.num_history, self.slots.shape[1]
        slot = torch.arange(S, device=self.slots.device)
        key = slot[:N]
        seen = (key <= slot[:, None]) & (key < self.lengths[:, None, None])
        if spec.window:
            near = self.slots[:, :, None] - key < spec.window
            seen = seen & (near | (key < spec.global_prefix))
        return seen, slot >= N

    def _weights(
        self, scores: Tensor, own: Tensor, visible: tuple[Tensor, Tensor], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        seen, itself = visible
        if spec.activation is Activation.SILU:
            weights = (F.silu(scores) / spec.normalizer).masked_fill(~seen, 0.0)
            return weights, (F.silu(own) / spec.normalizer).masked_fill(~itself, 0.0)
        every = torch.cat([scores.masked_fill(~seen, -torch.inf), own.masked_fill(~itself, -torch.inf)[..., None]], -1)
        # slots that see nothing give NaN, which no later layer may read
        weights = every.softmax(dim=-1).nan_to_num(0.0)
        return weights[..., :-1], weights[..., -1]


class DenseTower(nn.Module):
    """A trained tower for export: padded vectors and times in, what heads need out."""

    def __init__(self, tower: Tower, target_aware: bool) -> None:
        """Wraps a tower whose row kernels are plain PyTorch (backend reference or blocked).

        Args:
            tower: with weights.
            target_aware: candidates pass through the tower, after the history; otherwise they are compared with what
                the tower gives at its end.
        """
        super().__init__()
        self.tower = tower
        self.target_aware = target_aware

    def forward(
        self, history: Tensor, timestamps: Tensor, lengths: Tensor, request_times: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One batch.

        Args:
            history: [B, N, D], item vectors of the histories, oldest first, padded with anything finite.
            timestamps: [B, N] int64 seconds, padded with anything.
            lengths: [B] int64, events of each history, at most N.
            request_times: [B] int64 seconds.
            candidates: [B, M, D], item vectors.

        Returns:
            Scores [B, M], cosines with the end of the history, or, target-aware, the tower's outputs [B, M, D]; and
            the tower's output at the end of each history, [B, D], zeros for an empty one.
        """
        N, M = history.shape[1], candidates.shape[1] if self.target_aware else 0
        slot = torch.arange(N, device=history.device)
        # each event is asked about at the time of the next one, the last one at that of the request
        following = timestamps.index_select(1, (slot + 1).clamp(max=N - 1))
        at_end = slot == lengths[:, None] - 1
        query_times = torch.where(at_end, request_times[:, None], following)
        # sized as `history`, of which x is made: export would tell other sizes from its own by a guard
        slots, keys, x = slot.expand(history.shape[:2]), timestamps, history
        if self.target_aware:
            times = request_times[:, None].expand(-1, M)
            slots = torch.cat([slots, lengths[:, None].expand(-1, M)], dim=1)
            query_times, keys = torch.cat([query_times, times], dim=1), torch.cat([keys, times], dim=1)
            x = torch.cat([history, candidates], dim=1)
        context = DenseContext(lengths=lengths, slots=slots, queries=query_times, keys=keys, num_history=N)
        out = self.tower(x.flatten(0, 1), context).reshape(x.shape)
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, out.shape[2])
        users = out.gather(1, last).squeeze(1) * (lengths > 0)[:, None]
        if self.target_aware:
            return out[:, N:], users
        unit = unit_rows(candidates.flatten(0, 1)).reshape(candidates.shape)
        return (unit * users[:, None]).sum(-1), users
