"""What every block of an encoder needs besides its input: computed once a batch, used by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.errors import UserError
from hstu_dist.ops.attention import hstu_attention
from hstu_dist.ops.bias import RelativeBias
from hstu_dist.ops.jagged import positions, sequence_of
from hstu_dist.ops.random import TokenNoise
from hstu_dist.ops.spec import AttentionSpec, JaggedLayout


class Context(Protocol):
    """What a block asks of its batch; `SequenceContext` answers for jagged batches, others where no kernel is."""

    @property
    def positions(self) -> Tensor:
        """[T] int64, index of each token in its sequence."""

    @property
    def query_times(self) -> Tensor:
        """[T] int64 seconds, when each prediction is made."""

    @property
    def key_times(self) -> Tensor:
        """[T_keys] int64 seconds, when each event happened."""

    @property
    def noise(self) -> TokenNoise | None:
        """The step's random numbers; None in evaluation."""

    def attend(self, layer: int, qkv: QueriesKeysValues, spec: AttentionSpec, bias: RelativeBias | None) -> Tensor:
        """Attention [T, H, V] of the new tokens of one layer; see `hstu_attention`."""

    def elapsed(self) -> Tensor:
        """[T] int64 seconds since the token before in its sequence, 0 for the first; targets all follow the history."""

    def recent(self, length: int) -> tuple[Tensor, Context]:
        """Rows [R] int64 of the last `length` tokens of each sequence, and a context of them alone."""


class KeyMemory(Protocol):
    """Keys and values of tokens that were encoded before; see `inference`."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T_keys, H, W] of a layer: the remembered ones of each sequence, then the new [T, H, W]."""


class QueriesKeysValues(NamedTuple):
    """What a layer attends with, of its new tokens: q [T, H, Q], k [T, H, Q], v [T, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceContext:
    """Layout, times and randomness of one batch.

    Attributes:
        layout: where the sequences lie.
        positions: [T] int64, index of each token in its sequence.
        query_times: [T] int64 seconds, when each prediction is made.
        key_times: [T_keys] int64 seconds, when each event happened.
        noise: the step's random numbers; None in evaluation.
        memory: of keys that the layout has beyond its queries; None: it has none.
    """

    layout: JaggedLayout
    positions: Tensor
    query_times: Tensor
    key_times: Tensor
    noise: TokenNoise | None
    memory: KeyMemory | None = None

    def attend(self, layer: int, qkv: QueriesKeysValues, spec: AttentionSpec, bias: RelativeBias | None) -> Tensor:
        """As `Context.attend`."""
        q, k, v = qkv
        if self.memory is not None:
            k, v = self.memory.extend(layer, k, v)
        return hstu_attention(q, k, v, self.layout, spec, bias)

    def elapsed(self) -> Tensor:
        """As `Context.elapsed`."""
        layout = self.layout
        offsets, key_offsets = layout.offsets, layout.offsets if layout.key_offsets is None else layout.key_offsets
        owner, keys = sequence_of(offsets), key_offsets.diff()
        history = keys if layout.num_targets is None else keys - layout.num_targets
        place = positions(offsets) + (keys - offsets.diff())[owner]
        before = place.minimum(history[owner]) - 1
        firsts = key_offsets[:-1][owner]
        since = self.key_times[firsts + place] - self.key_times[firsts + before.clamp(min=0)]
        return torch.where(before >= 0, since, 0)

    def recent(self, length: int) -> tuple[Tensor, SequenceContext]:
        """As `Context.recent`.

        Raises:
            UserError: there are remembered keys or targets, which would change what is recent.
        """
        layout = self.layout
        if self.memory is not None or layout.key_offsets is not None or layout.num_targets is not None:
            raise UserError(
                "model.truncated_layers: layers that see the most recent tokens only cannot reuse keys of a history",
                "score whole sequences, or train a model with model.truncated_layers=0",
            )
        kept = layout.offsets.diff().clamp(max=length)
        offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        dropped = layout.offsets.diff() - kept
        rows = positions(offsets) + (layout.offsets[:-1] + dropped)[sequence_of(offsets)]
        contextual = None if layout.num_contextual is None else (layout.num_contextual - dropped).clamp(min=0)
        return rows, SequenceContext(
            layout=JaggedLayout(offsets, num_contextual=contextual),
            positions=self.positions[rows],
            query_times=self.query_times[rows],
            key_times=self.key_times[rows],
            noise=None if self.noise is None else TokenNoise(self.noise.key, self.noise.tokens[rows]),
        )


def token_noise(batch: JaggedBatch, max_length: int, key: int) -> TokenNoise:
    """Random numbers of a step for each token of a batch.

    Args:
        batch: the batch.
        max_length: N; makes (row, position) a unique token identity.
        key: `fold(seed, step, use)`.
    """
    return TokenNoise(key, batch.row_ids[sequence_of(batch.offsets)] * max_length + positions(batch.offsets))


def sequence_context(batch: JaggedBatch, max_length: int, noise_key: int | None) -> SequenceContext:
    """Context of a batch.

    Args:
        batch: the batch.
        max_length: N, the longest sequence that the model serves.
        noise_key: key of the step's random numbers; None in evaluation.
    """
    return SequenceContext(
        layout=JaggedLayout(batch.offsets),
        positions=positions(batch.offsets),
        query_times=batch.query_times,
        key_times=batch.timestamps,
        noise=None if noise_key is None else token_noise(batch, max_length, noise_key),
    )
