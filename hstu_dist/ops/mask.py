"""The attention mask, in one place: which keys a query sees and which positions the bias uses."""

from __future__ import annotations

from torch import Tensor

from hstu_dist.ops.spec import AttentionSpec

IntLike = Tensor | int


def effective_position(position: Tensor, length: IntLike, num_targets: IntLike) -> Tensor:
    """Position for bias and window: all targets share the one after the history.

    Args:
        position: key positions from 0, int64, any shape.
        length: keys of the sequence, broadcastable.
        num_targets: trailing targets of the sequence, broadcastable.

    Returns:
        min(position, length - num_targets), int64.
    """
    history = length - num_targets
    return position.clamp(max=history)


def visible(query: Tensor, key: Tensor, sizes: tuple[IntLike, IntLike, IntLike], spec: AttentionSpec) -> Tensor:
    """Whether the query at one position sees the key at another (see `JaggedLayout`).

    Args:
        query: positions of queries, int64, broadcastable against `key`.
        key: positions of keys, int64.
        sizes: (length, num_contextual, num_targets) of the sequence, each broadcastable.
        spec: window and global prefix.

    Returns:
        bool of the broadcast shape; False where query or key lie outside the sequence.
    """
    length, num_contextual, num_targets = sizes
    history = length - num_targets
    own = query == key
    contextual = key < num_contextual
    seen = (key <= query) & (key < history)
    if spec.window:
        near = effective_position(query, length, num_targets) - key < spec.window
        seen = seen & (near | contextual | (key < spec.global_prefix))
    # contextual tokens see exactly each other: more would let the future leak through them
    seen = ((query < num_contextual) & contextual) | ((query >= num_contextual) & (seen | own))
    return seen & (query >= 0) & (query < length) & (key < length)
