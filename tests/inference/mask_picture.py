"""Masks of docs/inference.md and docs/ranking.md, drawn from the code: `python -m tests.inference.mask_picture`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hstu_dist.ops.mask import visible
from hstu_dist.ops.spec import AttentionSpec

FIGURES = Path(__file__).parents[2] / "docs" / "figures"

_CELL, _LEFT, _TOP, _GAP = 18, 70, 60, 60
_COLOURS = {"h": "#4878a8", "i": "#4878a8", "a": "#6aa56a", "u": "#8866aa", "c": "#d08030", "hidden": "#f0f0f0"}
"""By the first letter of a key's name."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One mask.

    Attributes:
        title: above it.
        note: below the title.
        tokens: names of the keys; history h, item i, action a, user u, candidate c.
        known: first tokens whose keys and values are known: they have no row.
        spec: of the attention.
    """

    title: str
    note: str = ""
    tokens: tuple[str, ...]
    known: int = 0
    spec: AttentionSpec = AttentionSpec(normalizer=1.0)

    def seen(self) -> torch.Tensor:
        """[rows, keys] bool."""
        token = torch.arange(len(self.tokens))
        kinds = [name[0] for name in self.tokens]
        sizes = (len(self.tokens), kinds.count("u"), kinds.count("c"))
        return visible(token[self.known :, None], token[None, :], sizes, self.spec)


def _history(length: int) -> tuple[str, ...]:
    return (*(f"h{i}" for i in range(length)), *(f"c{i}" for i in range(4)))


_EVENTS = ("u", "i0", "a0", "i1", "a1", "i2", "a2")

PICTURES: dict[str, tuple[Panel, ...]] = {
    "mfalcon_masks": (
        Panel(title="first micro-batch", tokens=_history(6)),
        Panel(title="next micro-batch", note="6 of 6 history tokens known", tokens=_history(6), known=6),
        Panel(title="same user, two events later", note="6 of 8 history tokens known", tokens=_history(8), known=6),
    ),
    "ranking_masks": (
        Panel(title="training", note="i1 predicts a1", tokens=_EVENTS),
        Panel(
            title="semi-local",
            note="window 2, global prefix 1",
            tokens=_EVENTS,
            spec=AttentionSpec(normalizer=1.0, window=2, global_prefix=1),
        ),
        Panel(title="scoring", note="two events, three candidates", tokens=(*_EVENTS[:5], "c0", "c1", "c2")),
    ),
}
"""Panels of each file."""


def picture(panels: Sequence[Panel]) -> str:
    """A figure as SVG: rows are computed tokens, columns are keys."""
    drawn, x = [], _LEFT
    for panel in panels:
        drawn.append(_draw(panel, x))
        x += len(panel.tokens) * _CELL + _GAP
    height = _TOP + max(len(panel.tokens) - panel.known for panel in panels) * _CELL + 30
    style = "<style>text { font: 11px sans-serif; fill: #333 } .title { font-weight: bold }</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{height}" viewBox="0 0 {x} {height}">'
    return "\n".join([head, style, *drawn, "</svg>"]) + "\n"


def _draw(panel: Panel, x: int) -> str:
    seen = panel.seen()
    parts = [f'<text class="title" x="{x}" y="16">{panel.title}</text>']
    parts += [f'<text x="{x}" y="32">{panel.note}</text>'] if panel.note else []
    for key, name in enumerate(panel.tokens):
        weight = ' fill-opacity="0.45"' if key < panel.known else ""
        parts.append(f'<text x="{x + key * _CELL + 3}" y="{_TOP - 6}"{weight}>{name}</text>')
    for row, name in enumerate(panel.tokens[panel.known :]):
        y = _TOP + row * _CELL
        parts.append(f'<text x="{x - 20}" y="{y + 13}">{name}</text>')
        for key, of in enumerate(panel.tokens):
            colour = _COLOURS[of[0] if seen[row, key] else "hidden"]
            faded = ' fill-opacity="0.45"' if key < panel.known and seen[row, key] else ""
            size = _CELL - 2
            parts.append(f'<rect x="{x + key * _CELL}" y="{y}" width="{size}" height="{size}" fill="{colour}"{faded}/>')
    return "\n".join(parts)


if __name__ == "__main__":
    for file, panels in PICTURES.items():
        (FIGURES / f"{file}.svg").write_text(picture(panels))
