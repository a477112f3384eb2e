"""What every block of an encoder needs besides its input: computed once a batch, used by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from hstu_dist.batch import JaggedBatch
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
