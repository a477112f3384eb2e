"""Who takes part in the encoder benchmark: each a kind of layers with a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from benchmarks import encoder_cases as cases
from benchmarks import encoder_stacks as stacks
from benchmarks.encoder_cases import Batch
from benchmarks.encoder_stacks import Baseline, Machine, Stack
from benchmarks.flash import FlashAttention
from benchmarks.harness import Step
from hstu_dist.models.config import HSTUConfig, TransformerConfig

AGAIN = " again"
"""Ends the name of what is timed a second time: how far its ratio is from 1 is the noise."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contender.

    Attributes:
        name: as it appears in the result file.
        batch: what it encodes.
        build: its layers over a batch.
        error: largest relative error over a batch.
        is_transformer: the baseline, not HSTU.
        padded: it encodes padding too, so that its time does not depend on the lengths.
    """

    name: str
    batch: Batch
    build: Callable[[Batch, Machine], Stack]
    error: Callable[[Batch, Machine], float]
    is_transformer: bool = False
    padded: bool = False

    @property
    def kind(self) -> str:
        """Names those that compute the same way."""
        if not self.is_transformer:
            return self.name.partition(",")[0]
        return f"{self.name.partition(',')[0]}, {'padded' if self.padded else 'jagged'}"

    def of(self, batch: Batch) -> Entry:
        """The same over another batch."""
        return replace(self, batch=batch)

    def step(self, machine: Machine, *, training: bool) -> Step:
        """What is timed."""
        stack = self.build(self.batch, machine)
        return stack.training if training else stack.inference

    def config(self, layers: int) -> HSTUConfig | TransformerConfig:
        """For counting FLOPs."""
        if self.is_transformer:
            return cases.transformer_config(self.batch.longest, layers)
        return cases.hstu_config(self.batch.longest, layers, bias=False)

    def kept_elements(self, machine: Machine) -> float:
        """Elements that one layer keeps for the backward of a token."""
        batch, one = cases.full(64, 1), replace(machine, layers=1)
        return stacks.saved_bytes(self.build(batch, one)) / batch.tokens / torch.empty(0, dtype=machine.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Who is compared.

    Attributes:
        flashes: attention of the Transformers, the baseline that targets are about first.
        rotary: their positions.
        alphas: of Stochastic Length.
        full_count: sequences of a batch of full ones.
        ragged_count: sequences of a ragged batch.
    """

    flashes: tuple[FlashAttention, ...]
    rotary: bool
    alphas: tuple[float, ...]
    full_count: int
    ragged_count: int

    def entries(self, longest: int, *, training: bool) -> Iterator[Entry]:
        """Of one length; Stochastic Length is of training alone."""
        full, ragged = cases.full(longest, self.full_count), cases.ragged(longest, self.ragged_count)
        plain = _hstu("HSTU", full, bias=False)
        yield plain
        yield from (self._transformer(flash, full, padded=True) for flash in self._ordered)
        yield _hstu("HSTU", ragged, bias=False)
        yield from (self._transformer(flash, ragged, padded=False) for flash in self._ordered)
        yield from (_hstu("HSTU with bias", batch, bias=True) for batch in (full, ragged))
        if training:
            yield from (_hstu("HSTU", cases.stochastic(longest, alpha), bias=False) for alpha in self.alphas)
        yield replace(plain, name=plain.name + AGAIN)

    @cached_property
    def _ordered(self) -> list[FlashAttention]:
        """FlashAttention2 first: the paper compares with it."""
        return sorted(self.flashes, key=lambda flash: flash.name != "flash-attn 2")

    def _transformer(self, flash: FlashAttention, batch: Batch, *, padded: bool) -> Entry:
        baseline = Baseline(flash=flash, padded=padded, rotary=self.rotary)
        return Entry(
            name=f"Transformer {flash.name}, {'padded' if padded else batch.name}",
            batch=batch,
            build=partial(stacks.transformer, baseline=baseline),
            error=partial(stacks.transformer_error, baseline=baseline),
            is_transformer=True,
            padded=padded,
        )


def _hstu(kind: str, batch: Batch, *, bias: bool) -> Entry:
    return Entry(
        name=f"{kind}, {batch.name}",
        batch=batch,
        build=partial(stacks.hstu, bias=bias),
        error=partial(stacks.hstu_error, bias=bias),
    )
