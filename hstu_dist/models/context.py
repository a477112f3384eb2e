"""What every block of an encoder needs besides its input: computed once a batch, used by all layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.ops.jagged import positions, sequence_of
from hstu_dist.ops.random import TokenNoise
from hstu_dist.ops.spec import JaggedLayout


@dataclass(frozen=True, kw_only=True)
class SequenceContext:
    """Layout, times and randomness of one batch.

    Attributes:
        layout: where the sequences lie.
        positions: [T] int64, index of each token in its sequence.
        query_times: [T] int64 seconds, when each prediction is made.
        key_times: [T] int64 seconds, when each event happened.
        noise: the step's random numbers; None in evaluation.
    """

    layout: JaggedLayout
    positions: Tensor
    query_times: Tensor
    key_times: Tensor
    noise: TokenNoise | None


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
