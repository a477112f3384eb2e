"""A drawing as SVG text: boxes, cells, arrows and labels, on white so that it reads on any page."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

BLUE, ORANGE, GREEN, GREY, PALE = "#4878a8", "#d08030", "#5a9a68", "#8a8a8a", "#eef2f6"
_FONT = "font: 13px sans-serif"


@dataclass
class Drawing:
    """Shapes in the order they are drawn; coordinates in pixels from the upper left.

    Attributes:
        width, height: of the picture.
    """

    width: int
    height: int
    _parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, style: str = "") -> None:
        """A line whose baseline begins at a point; `style` may hold `middle`, `end`, `bold`, `small`, `white`."""
        anchor = next((f' text-anchor="{word}"' for word in ("middle", "end") if word in style), "")
        weight = ' font-weight="bold"' if "bold" in style else ""
        size = ' font-size="11"' if "small" in style else ""
        colour = "#ffffff" if "white" in style else "#333333"
        self._parts.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}"{anchor}{weight}{size}>{escape(words)}</text>')

    def cell(self, x: float, y: float, size: tuple[float, float], fill: str, words: str = "") -> None:
        """A coloured rectangle with a word in its middle."""
        width, height = size
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>')
        if words:
            light = fill in ("#ffffff", PALE) or fill.startswith("#f")
            self.text(x + width / 2, y + height / 2 + 4.5, words, "middle" if light else "middle white")

    def box(self, x: float, y: float, size: tuple[float, float], lines: list[str], colour: str = GREY) -> None:
        """An outlined rectangle; its first line is bold."""
        width, height = size
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{PALE}" '
            f'stroke="{colour}" stroke-width="1.5"/>'
        )
        top = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * number, line, "middle bold" if number == 0 else "middle small")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = "#333333") -> None:
        """A straight arrow."""
        (x1, y1), (x2, y2) = start, end
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.5" '
            'marker-end="url(#head)"/>'
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
        """A thin line."""
        (x1, y1), (x2, y2) = start, end
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#666666"{dash}/>')

    def svg(self) -> str:
        """The file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{_FONT}">',
                f'<defs>{head}<path d="M0,0 L8,4 L0,8 z" fill="#333333"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )
