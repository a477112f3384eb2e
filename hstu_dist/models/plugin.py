"""What an encoder of the user's own offers, and how a run finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hstu_dist.errors import UserError
from hstu_dist.models.config import PluginEncoderConfig
from hstu_dist.plugins import find

if TYPE_CHECKING:
    from hstu_dist.models.flops import Workload


class EncoderClass(Protocol):
    """A subclass of `torch.nn.Module`, made with its configuration.

    Its `forward(x_TD, context)` gives [T, D] for [T, D] embedded tokens, positions added; `context` is a
    `models.context.SequenceContext`: its layout has the offsets of the sequences, its noise is None in evaluation.
    A token must not see the tokens after it.
    """

    def __call__(self, config: PluginEncoderConfig) -> Any:
        """The module, on the CPU."""

    def flops(self, config: PluginEncoderConfig, work: Workload) -> int:
        """FLOPs of a forward over a batch, a static method; balance, batching by FLOPs and MFU go by it."""


def encoder_class(config: PluginEncoderConfig) -> EncoderClass:
    """The class that a configuration names.

    Raises:
        UserError: it cannot be imported, or does not count its FLOPs.
    """
    found: EncoderClass = find(config.target)
    if not callable(getattr(found, "flops", None)):
        raise UserError(
            f"{config.target}: got no flops(config, work)", "add it as a static method of the encoder's class"
        )
    return found
