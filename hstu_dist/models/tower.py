"""The dense tower: positions added, sequence encoded, output normalised to unit length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_dist.models.config import EncoderConfig, HSTUConfig, TransformerConfig
from hstu_dist.models.context import Context
from hstu_dist.models.hstu import HSTU
from hstu_dist.models.plugin import encoder_class
from hstu_dist.models.transformer import Transformer
from hstu_dist.ops import backends
from hstu_dist.ops.bias import NUM_TIME_BUCKETS, time_bucket
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.ops.rows import drop_of, dropout

_INPUT_STREAM = 1 << 20


class Tower(nn.Module):
    """Everything between the item vectors of a history and the vectors that score the next item."""

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        """Builds the tower on `device`; the attention backend is chosen here, once.

        Raises:
            UserError: the configured backend does not run on this machine, or an encoder of the user's own cannot be
                imported.
        """
        super().__init__()
        self.width = config.width
        self.dropout = config.dropout
        backend = backends.chosen(config.backend, device)
        self.rows = backends.row_kernels(backend)
        self.position = nn.Embedding(config.max_length, config.width)
        bound = config.width**-0.5
        nn.init.trunc_normal_(self.position.weight, std=bound, a=-2 * bound, b=2 * bound)
        # the time since the token before, where it is an input
        self.elapsed: nn.Embedding | None = None
        if isinstance(config, HSTUConfig) and config.input_time:
            self.elapsed = nn.Embedding(NUM_TIME_BUCKETS, config.width)
            nn.init.trunc_normal_(self.elapsed.weight, std=bound, a=-2 * bound, b=2 * bound)
        self.encoder: nn.Module
        if isinstance(config, HSTUConfig):
            self.encoder = HSTU(config, backend, self.rows)
        elif isinstance(config, TransformerConfig):
            self.encoder = Transformer(config, backend, self.rows)
        else:
            self.encoder = encoder_class(config)(config)
        self.to(device)

    def forward(self, items_TD: Tensor, context: Context) -> Tensor:
        """Unit vectors that score the item after each event.

        Args:
            items_TD: [T, D], table rows of the events.
            context: layout, times and randomness of the batch.

        Returns:
            [T, D], rows of length 1.
        """
        encoded = self.encode(items_TD, context)
        # lengths and the loss in float32 at least, whatever the layers compute in
        return unit_rows(encoded.to(torch.promote_types(encoded.dtype, torch.float32)))

    def encode(self, tokens_TD: Tensor, context: Context) -> Tensor:
        """[T, D], what the encoder makes of [T, D] embedded tokens; of no particular length."""
        x = tokens_TD * self.width**0.5 + self.position(context.positions)
        if self.elapsed is not None:
            x = x + self.elapsed(time_bucket(context.elapsed()))
        drop = drop_of(context.noise and context.noise.stream(_INPUT_STREAM), self.dropout)
        encoded: Tensor = self.encoder(dropout(x, drop, self.rows), context)
        return encoded
