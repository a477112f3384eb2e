"""The pictures of docs/concepts.md, drawn from the code that they explain: `python -m tests.docs.pictures`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hstu_dist.files import write_atomically
from hstu_dist.ops.bias import time_bucket
from hstu_dist.ops.mask import visible
from hstu_dist.ops.spec import AttentionSpec
from tests.docs.flow_pictures import checkpoint, sharding, step
from tests.docs.pages import DOCS
from tests.docs.svg import BLUE, GREEN, ORANGE, Drawing

FIGURES = DOCS / "figures"

LENGTHS = (4, 2, 3)
IDS = (17, 4, 88, 23, 5, 4, 61, 17, 9)
COLOURS = (BLUE, ORANGE, GREEN)
HIDDEN = "#f0f0f0"

TIMES = (0, 30, 90, 3_690, 90_090, 176_490)
"""Of six events, each the target of the one before: half a minute, a minute, an hour, a day and a day apart."""


def jagged() -> str:
    """Three sequences padded, and end to end."""
    drawing, side = Drawing(720, 250), 44
    drawing.text(20, 24, "padded: 12 places for 9 events", "bold")
    drawing.text(300, 24, "jagged: the events end to end, T = 9", "bold")
    place = 0
    for row, (length, colour) in enumerate(zip(LENGTHS, COLOURS, strict=True)):
        for column in range(max(LENGTHS)):
            inside = column < length
            words = str(IDS[place + column]) if inside else ""
            drawing.cell(20 + side * column, 40 + side * row, (side - 3, side - 3), colour if inside else HIDDEN, words)
        drawing.text(20 + side * max(LENGTHS) + 6, 40 + side * row + 26, f"user {row}", "small")
        place += length
    offsets = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
    owner = [n for n, length in enumerate(LENGTHS) for _ in range(length)]
    for token, item in enumerate(IDS):
        drawing.cell(300 + side * token, 60, (side - 3, side - 3), COLOURS[owner[token]], str(item))
    drawing.text(300, 54, "item_ids", "small")
    for number, offset in enumerate(offsets):
        x = 300 + side * offset - 1.5
        drawing.line((x, 60), (x, 128))
        drawing.text(x, 144, str(offset), "middle bold")
        if number < len(LENGTHS):
            drawing.text(x + side * LENGTHS[number] / 2, 122, f"user {number}", "middle small")
    drawing.text(300, 166, f"offsets = {offsets}; user b owns rows offsets[b] to offsets[b+1]", "small")
    drawing.text(
        20, 206, "Beside item_ids lie timestamps, actions, target_ids (the item that follows) and query_times (when it"
    )
    drawing.text(20, 225, "(when it follows), each of T entries. Nothing is padded, from the reader to the loss.")
    return drawing.svg()


def bias() -> str:
    """Both indices of the relative bias for every visible pair of five events."""
    drawing, side = Drawing(740, 388), 62
    times = torch.tensor(TIMES)
    buckets = time_bucket(times[1:, None] - times[None, :-1])
    words = ("0 s", "30 s", "90 s", "1 h", "1 d", "2 d")
    drawing.text(150, 24, "key j (happened at)", "bold")
    for j, word in enumerate(words[:-1]):
        drawing.text(150 + side * j + side / 2, 46, f"{j}: {word}", "middle small")
    drawing.text(20, 46, "query i", "bold")
    for i, after in enumerate(words[1:]):
        y = 56 + side * i
        drawing.text(140, y + side / 2, f"{i}: predicts at {after}", "end small")
        for j in range(len(buckets)):
            x = 150 + side * j
            if j > i:
                drawing.cell(x, y, (side - 3, side - 3), HIDDEN)
                continue
            bucket = int(buckets[i, j])
            drawing.cell(x, y, (side - 3, side - 3), _shade(bucket, int(buckets.max())))
            drawing.text(x + side / 2 - 1.5, y + 25, f"p {j - i}", "middle white")
            drawing.text(x + side / 2 - 1.5, y + 43, f"t {bucket}", "middle white")
    for number, line in enumerate(
        (
            "bias of a pair:",
            "w_pos[N - 1 + p] + w_ts[t]",
            "",
            "p = j - i, the distance",
            "t = the bucket of the time from",
            "event j to the moment of the",
            "prediction: ln(seconds) / 0.301,",
            "rounded down, at most 128",
            "",
            "In training the moment is the time",
            "of the event that follows; when",
            "serving, that of the request.",
            "",
            "One pair of tables a layer, the same",
            "for all heads; grey pairs are hidden.",
        )
    ):
        drawing.text(480, 76 + 19 * number, line, "bold" if number < 2 else "")
    return drawing.svg()


def _shade(value: int, most: int) -> str:
    """Blue, the darker the larger."""
    share = value / max(1, most)
    red, green, blue = (round(light + (dark - light) * share) for light, dark in ((110, 30), (150, 60), (195, 110)))
    return f"#{red:02x}{green:02x}{blue:02x}"


def masks() -> str:
    """What queries see, in four cases, computed by the mask itself."""
    drawing, side = Drawing(736, 316), 18
    panels = (
        ("causal", "history of training", [f"h{n}" for n in range(8)], (0, 0), AttentionSpec(normalizer=1.0)),
        (
            "targets",
            "3 candidates at the end",
            [*(f"h{n}" for n in range(5)), "c0", "c1", "c2"],
            (0, 3),
            AttentionSpec(normalizer=1.0),
        ),
        (
            "contextual prefix",
            "2 features of the user",
            ["u0", "u1", *(f"h{n}" for n in range(6))],
            (2, 0),
            AttentionSpec(normalizer=1.0),
        ),
        (
            "local window",
            "window=3 global_prefix=1",
            [f"h{n}" for n in range(8)],
            (0, 0),
            AttentionSpec(normalizer=1.0, window=3, global_prefix=1),
        ),
    )
    for number, (title, note, names, (contextual, targets), spec) in enumerate(panels):
        left, top = 38 + 177 * number, 74
        token = torch.arange(len(names))
        seen = visible(token[:, None], token[None, :], (len(names), contextual, targets), spec)
        drawing.text(left, 22, title, "bold")
        drawing.text(left, 40, note, "small")
        for i, name in enumerate(names):
            drawing.text(left + side * i + side / 2 - 1, top - 6, name, "middle small")
            drawing.text(left - 5, top + side * i + 13, name, "end small")
            for j, key in enumerate(names):
                colour = {"h": BLUE, "c": ORANGE, "u": GREEN}[key[0]] if seen[i, j] else HIDDEN
                drawing.cell(left + side * j, top + side * i, (side - 2, side - 2), colour)
    for number, line in enumerate(
        (
            "Rows: queries; columns: the keys they see. Blue: history; orange: a candidate's own key; green: the user.",
            "Candidates see the history and themselves, and share one position: each gets what it would get alone.",
            "Features see exactly each other, and every later token sees them, also outside of a window.",
        )
    ):
        drawing.text(20, 258 + 20 * number, line, "small")
    return drawing.svg()


PICTURES: Mapping[str, Callable[[], str]] = {
    "jagged": jagged,
    "bias": bias,
    "masks": masks,
    "sharding": sharding,
    "step": step,
    "checkpoint": checkpoint,
}
"""Name of each file and what draws it."""


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        write_atomically(FIGURES / f"{name}.svg", draw().encode())
