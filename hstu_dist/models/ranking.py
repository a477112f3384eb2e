"""Generative ranking: an encoder over interleaved items and actions, and what it shares with the DLRM baseline.

Shapes: B sequences, E events, C contextual features, T = B·C + 2·E tokens, D width, K heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_dist.actions import ActionField
from hstu_dist.batch import JaggedBatch
from hstu_dist.models.config import EncoderConfig
from hstu_dist.models.context import SequenceContext
from hstu_dist.models.ranking_shape import RankingShape, counts_by_magnitude, token_encoder
from hstu_dist.models.tower import Tower
from hstu_dist.ops.interleave import Interleaving
from hstu_dist.ops.jagged import positions, sequence_of
from hstu_dist.ops.random import TokenNoise
from hstu_dist.ops.spec import JaggedLayout

_INIT_STD = 0.02


def field_levels(field: ActionField, words_Ex: Tensor, levels: int) -> Tensor:
    """Row of a field's embedding for each action word; int64, same shape.

    Numbers are levels themselves, or count by their order of magnitude: 0, 1, 2-3, 4-7, ... (see
    `counts_by_magnitude`).
    """
    values: Tensor = field.of(words_Ex).to(torch.int64)
    if counts_by_magnitude(field, levels):
        # the exponent of 0 is 0, of 2^k to 2^(k+1) - 1 it is k + 1
        return torch.frexp(values.to(torch.float64)).exponent.to(torch.int64)
    return values


class Features(nn.Module):
    """Small data-parallel embeddings of actions and contextual features."""

    firsts: Tensor

    def __init__(self, shape: RankingShape, width: int) -> None:
        super().__init__()
        self.fields = shape.actions
        firsts = torch.tensor([0, *(levels for _, levels in shape.actions)]).cumsum(0)
        self.register_buffer("firsts", firsts[:-1], persistent=False)
        self.action = nn.Embedding(int(firsts[-1]), width)
        nn.init.normal_(self.action.weight, std=_INIT_STD)
        # one row more, for values that training never saw; zero, as are those of users that it never saw
        self.contextual = nn.ModuleList(nn.Embedding(size + 1, width) for size in shape.contextual)
        for table in self.contextual:
            assert isinstance(table, nn.Embedding)
            nn.init.zeros_(table.weight)

    def actions(self, words_E: Tensor) -> Tensor:
        """[E, D], the sum over the fields of each action word's embeddings."""
        rows = torch.stack([field_levels(field, words_E, levels) for field, levels in self.fields], dim=1)
        embedded: Tensor = self.action(rows + self.firsts).sum(dim=1)
        return embedded

    def context(self, codes_BC: Tensor) -> Tensor:
        """[B, C, D] of the codes of contextual features.

        Raises:
            ValueError: another number of features.
        """
        if codes_BC.shape[1] != len(self.contextual):
            raise ValueError(f"contextual: got {codes_BC.shape[1]} features, expected {len(self.contextual)}")
        parts = []
        for index, table in enumerate(self.contextual):
            assert isinstance(table, nn.Embedding)
            unknown, codes = table.num_embeddings - 1, codes_BC[:, index]
            parts.append(table(torch.where((codes < 0) | (codes > unknown), unknown, codes)))
        if not parts:
            return self.action.weight.new_empty(codes_BC.shape[0], 0, self.action.embedding_dim)
        return torch.stack(parts, dim=1)


class Heads(nn.Module):
    """What is predicted of each event: LayerNorm, one hidden layer that all heads share, one output each."""

    def __init__(self, width: int, shape: RankingShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, shape.head_width)
        self.output = nn.Linear(shape.head_width, shape.outputs)

    def forward(self, x_ED: Tensor) -> Tensor:
        """[E, D] → [E, K]: logits of binary heads, normalised values of regressions."""
        outputs: Tensor = self.output(F.silu(self.hidden(self.norm(x_ED))))
        return outputs


class RankingTower(nn.Module):
    """Everything between the item vectors of events and the predictions of what the user does with each.

    The prediction of event i is read at its item's token, which sees the contextual tokens, all items up to and with
    item i, and the actions before action i (target-aware ranking, arXiv 2402.17152, section 2.2.2).
    """

    def __init__(self, config: EncoderConfig, shape: RankingShape, device: torch.device) -> None:
        """Builds the tower on `device`.

        Raises:
            UserError: the configured backend does not run on this machine.
        """
        super().__init__()
        self.num_contextual = len(shape.contextual)
        encoder = token_encoder(config, self.num_contextual)
        self.max_length = encoder.max_length
        self.tower = Tower(encoder, device)
        self.features = Features(shape, config.width)
        self.heads = Heads(config.width, shape)
        self.to(device)

    @property
    def encoder(self) -> nn.Module:
        """The stack of layers over the tokens."""
        return self.tower.encoder

    def forward(self, items_ED: Tensor, batch: JaggedBatch, noise_key: int | None) -> Tensor:
        """Predictions of every event.

        Args:
            items_ED: [E, D], table rows of the events' items.
            batch: the events.
            noise_key: key of the step's random numbers; None in evaluation.

        Returns:
            [E, K].
        """
        tokens = Interleaving.of(batch.offsets, self.num_contextual)
        contextual = self.features.context(contextual_codes(batch, self.num_contextual)).flatten(0, 1)
        x_TD = tokens.merge(contextual, items_ED, self.features.actions(batch.actions))
        encoded_TD = self.tower.encode(x_TD, interleaved_context(batch, tokens, self.max_length, noise_key))
        predicted: Tensor = self.heads(encoded_TD.index_select(0, tokens.items))
        # losses in float32 at least, whatever the layers compute in
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))


def contextual_codes(batch: JaggedBatch, num_contextual: int) -> Tensor:
    """[B, C] int64 of a batch; it may leave them out where the model reads none.

    Raises:
        ValueError: the model reads some and the batch has none.
    """
    if batch.contextual is not None:
        return batch.contextual
    if num_contextual:
        raise ValueError(f"batch: got no contextual features, expected {num_contextual}")
    return batch.row_ids.new_empty(batch.num_sequences, 0)


def interleaved_context(
    batch: JaggedBatch, tokens: Interleaving, max_length: int, noise_key: int | None
) -> SequenceContext:
    """Context of the interleaved tokens of a batch.

    Query and key time of an event's two tokens are the time of the event: its action is predicted when the item is
    shown. Contextual tokens have the time of the first event.

    Args:
        batch: the events.
        tokens: where their tokens lie.
        max_length: N, the longest token sequence that the model serves.
        noise_key: key of the step's random numbers; None in evaluation.
    """
    C = tokens.contextual.numel() // max(1, batch.num_sequences)
    first = torch.zeros_like(batch.row_ids)
    filled = batch.lengths > 0
    first[filled] = batch.timestamps[batch.offsets[:-1][filled]]
    times = tokens.merge(first.repeat_interleave(C), batch.timestamps, batch.timestamps)
    places = positions(tokens.offsets)
    noise = None
    if noise_key is not None:
        noise = TokenNoise(noise_key, batch.row_ids[sequence_of(tokens.offsets)] * max_length + places)
    return SequenceContext(
        layout=JaggedLayout(tokens.offsets, num_contextual=torch.full_like(batch.row_ids, C) if C else None),
        positions=places,
        query_times=times,
        key_times=times,
        noise=noise,
    )
