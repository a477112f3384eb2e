"""docs/figures/mfalcon_masks.svg, drawn from the mask itself: `python -m tests.inference.mask_picture` writes it."""

from __future__ import annotations

from pathlib import Path

import torch

from hstu_dist.ops.mask import visible
from hstu_dist.ops.spec import AttentionSpec

PICTURE = Path(__file__).parents[2] / "docs" / "figures" / "mfalcon_masks.svg"

HISTORY, CANDIDATES = 6, 4
_CELL, _LEFT, _TOP, _GAP = 18, 70, 60, 60
_COLOURS = {"history": "#4878a8", "candidate": "#d08030", "hidden": "#f0f0f0"}

_PANELS = (
    ("first micro-batch", HISTORY, CANDIDATES, 0),
    ("next micro-batch", HISTORY, CANDIDATES, HISTORY),
    ("same user, two events later", HISTORY + 2, CANDIDATES, HISTORY),
)
"""Title, history tokens, candidates, and first tokens whose keys and values are known."""


def picture() -> str:
    """The figure as SVG: rows are computed tokens, columns are keys."""
    panels, x = [], _LEFT
    for title, history, candidates, known in _PANELS:
        panels.append(_panel(title, (history, candidates, known), x))
        x += (history + candidates) * _CELL + _GAP
    height = _TOP + (HISTORY + 2 + CANDIDATES) * _CELL + 30
    style = "<style>text { font: 11px sans-serif; fill: #333 } .title { font-weight: bold }</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{height}" viewBox="0 0 {x} {height}">'
    return "\n".join([head, style, *panels, "</svg>"]) + "\n"


def _panel(title: str, sizes: tuple[int, int, int], x: int) -> str:
    history, candidates, known = sizes
    length = history + candidates
    token = torch.arange(length)
    mask = visible(token[known:, None], token[None, :], (length, 0, candidates), AttentionSpec(normalizer=1.0))
    parts = [f'<text class="title" x="{x}" y="16">{title}</text>']
    parts += [f'<text x="{x}" y="32">{known} of {history} history tokens known</text>' if known else ""]
    for key in range(length):
        name = f"h{key}" if key < history else f"c{key - history}"
        weight = ' fill-opacity="0.45"' if key < known else ""
        parts.append(f'<text x="{x + key * _CELL + 3}" y="{_TOP - 6}"{weight}>{name}</text>')
    for row, query in enumerate(range(known, length)):
        name = f"h{query}" if query < history else f"c{query - history}"
        y = _TOP + row * _CELL
        parts.append(f'<text x="{x - 20}" y="{y + 13}">{name}</text>')
        for key in range(length):
            kind = "hidden" if not mask[row, key] else "history" if key < history else "candidate"
            faded = ' fill-opacity="0.45"' if key < known and kind == "history" else ""
            size = _CELL - 2
            parts.append(
                f'<rect x="{x + key * _CELL}" y="{y}" width="{size}" height="{size}" fill="{_COLOURS[kind]}"{faded}/>'
            )
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture())
