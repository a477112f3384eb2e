"""The pictures of docs/concepts.md are what the code draws today, and the page shows them all."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tests.docs.pages import DOCS, links
from tests.docs.pictures import FIGURES, PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_code_draws(name: str) -> None:
    drawn = PICTURES[name]()
    assert (FIGURES / f"{name}.svg").read_text() == drawn, "run `make docs`"
    assert f"figures/{name}.svg" in links(DOCS / "concepts.md")


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_drawn_outside(name: str) -> None:
    root = ET.fromstring(PICTURES[name]())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    space = "{http://www.w3.org/2000/svg}"
    for text in root.iter(f"{space}text"):
        # what letters of 11 and 13 pixels take in a wide font, on average
        length = len(text.text or "") * (5.9 if "font-size" in text.attrib else 6.7)
        shift = {"middle": length / 2, "end": length}.get(text.attrib.get("text-anchor", ""), 0.0)
        left, y = float(text.attrib["x"]) - shift, float(text.attrib["y"])
        assert left >= 0 and left + length <= width and 10 <= y <= height - 4, text.text
    for box in root.iter(f"{space}rect"):
        x, y, w, h = (float(box.attrib.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
