"""Stacked bars, heat maps and curves as SVG, and the same numbers as a table.

Horizontal positions are percentages and heights pixels: a chart fills any width and its text keeps its size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from string import ascii_letters, digits

from launcher.page import Html, join, table, tag
from launcher.plan.setup import Part

FEW = 6  # bars whose numbers stand in columns; more of them stand in rows
CUT = 1.5  # the axis ends at this many times the limit: what is far beyond would hide the rest
CUT_FREE = 3.0  # without a limit, at this many times the shortest bar
LETTER, PADDING = 7.6, 12.0  # px: the widest fonts that browsers fall back to, at 12 px, and the room around
WIDTHS = (300, 420, 560, 720, 960)  # px of chart from which on a label is shown
BAR, STRIP, HEAD = 26, 36, 17  # px: a bar, a bar with its bracket, one line of limit names
TORN = "0,-1 -6,3 0,8 -6,13 0,18 -6,23 0,27 3,27 3,-1"  # what is cut off the right end of a bar

# Paul Tol's "light" scheme (SRON/EPS/TN/09-002): told apart with any colour vision, dark text readable on each.
PALETTE = ("77aadd", "ee8866", "eedd88", "ffaabb", "99ddff", "44bb99", "bbcc33", "aaaa00", "dddddd")

# The same author's "sunset" scheme from its slow end to the middle and beyond: redder is slower, and darker.
SUNSET = ("a50026", "dd3d2d", "f67e4b", "fdb366", "feda8b", "c2e4ef", "98cae1")
WHITE_ON = 2  # of these, white text can be read
NUMBERED, SINGLE = 16, 128  # nodes up to which a cell has its number, and up to which each pair has its cell
BINS, IN_BIN = (8, 64), 4  # beyond, so many bins at the fewest and the most, with four measured pairs in each
ROW, COLUMN, WIDEST, NARROW = 28, 46, 150, 110  # px of a numbered cell, of names at its left and at a map's left
TICKS = 4, 8  # names along a drawn map: where there is little room, and where there is more
HEIGHT = 180  # px of a curve's plot


@dataclass(frozen=True)
class Bar:
    label: str
    parts: tuple[Part, ...]
    says: str  # what stands at its right: Html is taken as it is
    band: tuple[float, float] | None = None  # between what the bracket stands
    taken: bool = False

    @property
    def total(self) -> float:
        return sum(part.value for part in self.parts)


@dataclass(frozen=True)
class Chart:
    bars: tuple[Bar, ...]
    unit: str
    say: Callable[[float], str]
    limits: tuple[tuple[str, float], ...] = ()  # ("card 80 GiB", 80.0)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parts in the order of the bars; one that only a later bar has stands behind the one it follows."""
        found: list[str] = []
        for bar in self.bars:
            at = 0
            for part in bar.parts:
                if part.value <= 0:
                    continue
                if part.name not in found:
                    found.insert(at, part.name)
                at = found.index(part.name) + 1
        return tuple(found)

    @cached_property
    def end(self) -> float:
        """Where the axis ends: for a limit of 80, bars of 70 give 82.4 and bars of 6,000 give 120."""
        limit = max((value for _, value in self.limits), default=0.0)
        whole = 1.03 * max(limit, *(value for bar in self.bars for value in (bar.total, *(bar.band or ()))))
        return min(whole, CUT * limit if limit else CUT_FREE * min(bar.total for bar in self.bars)) or 1.0

    def colour(self, name: str) -> int:
        return self.names.index(name) % len(PALETTE)

    def hatched(self, name: str) -> bool:
        """From the tenth part on the colours come again, hatched."""
        return self.names.index(name) >= len(PALETTE)

    def at(self, value: float) -> str:
        return f"{100 * value / self.end:.3f}%"

    def picture(self) -> Html:
        step = tick(self.end)
        ticks = [step * i for i in range(int(self.end / step + 1e-9) + 1)]
        grid = (self._line(value, "grid") for value in ticks)
        limits = (self._line(value, "limit") for _, value in self.limits)
        cut = any(bar.total > self.end for bar in self.bars)
        return tag(
            "figure",
            self._limits() if self.limits else "",
            tag(
                "div",
                tag("svg", *grid, *limits, class_="under", aria_hidden="true"),
                *(self._bar(bar) for bar in self.bars),
                class_="bars",
            ),
            tag("svg", *(self._tick(value) for value in ticks), class_="axis", height="18", aria_hidden="true"),
            tag("figcaption", self.unit + ("; a bar with a torn end goes on to the number above it" if cut else "")),
        )

    def numbers(self, caption: str) -> Html:
        """What the bars say, in figures, and the key to their colours."""
        few = len(self.bars) <= FEW
        grid: list[list[object]] = [["part" if few else "way", *map(self.key, self.names), "all", "band"]]
        for bar in self.bars:
            values = {name: sum(part.value for part in bar.parts if part.name == name) for name in self.names}
            cells = [self.say(value) if value > 0 else "" for value in values.values()]
            band = " to ".join(map(self.say, bar.band or ()))
            grid.append([bar.label, *cells, tag("b", self.say(bar.total)), band])
        if few:
            grid = [list(cells) for cells in zip(*grid, strict=True)]
        return table(grid[0], grid[1:], caption=caption, numbers=True)

    def _line(self, value: float, kind: str, *, top: int = 0, to: int | str = "100%") -> Html:
        return tag("line", x1=self.at(value), x2=self.at(value), y1=top, y2=to, class_=kind)

    def _limits(self) -> Html:
        """Their names above the bars, each left of its line and on a line of text of its own."""
        rows = [
            join(
                (
                    self._line(value, "limit", top=HEAD * i + 2),
                    tag("text", name, x=self.at(value), dx="-6", y=HEAD * i + 13, text_anchor="end"),
                )
            )
            for i, (name, value) in enumerate(self.limits)
        ]
        return tag("svg", *rows, class_="head", height=HEAD * len(rows), aria_hidden="true")

    def _tick(self, value: float) -> Html:
        anchor = "start" if value == 0 else "end" if value > 0.95 * self.end else "middle"
        return tag("text", f"{value:,.6g}", x=self.at(value), y="14", text_anchor=anchor)

    def _bar(self, bar: Bar) -> Html:
        seen = [part for part in bar.parts if part.value > 0]
        name = tag("span", bar.label, tag("i", " (the plan)") if bar.taken else "")
        shapes, labels = self._segments(seen)
        shapes.append(
            tag("rect", x="0", y="0", width=self.at(min(bar.total, self.end)), height=BAR, class_="outline")
        )
        if bar.total > self.end:
            shapes.append(tag("svg", tag("polygon", points=TORN), x="100%"))
        limits = (self._line(value, "limit", to=BAR) for _, value in self.limits if value < bar.total)
        drawing = tag(
            "svg",
            tag("title", f"{bar.label}: {self.say(bar.total)} {self.unit}"),
            tag("desc", ", ".join(f"{part.name} {self.say(part.value)}" for part in seen)),
            *shapes,
            *limits,
            self._band(bar),
            *labels,
            role="img",
            height=STRIP,
        )
        return tag("div", tag("p", name, tag("span", bar.says)), drawing, class_="bar taken" if bar.taken else "bar")

    def _segments(self, parts: Sequence[Part]) -> tuple[list[Html], list[Html]]:
        """Rectangles, and the labels that go on top of the limits' lines."""
        shapes: list[Html] = []
        labels: list[Html] = []
        left = 0.0
        for part in parts:
            if left >= self.end:
                break
            width = min(part.value, self.end - left)
            value, colour = self.say(part.value), self.colour(part.name)
            where: dict[str, object] = {"x": self.at(left), "y": "0", "width": self.at(width), "height": BAR}
            hint = tag("title", f"{part.name}: {value} {self.unit}")  # a browser shows it under the pointer
            shapes.append(tag("rect", hint, class_=f"c{colour}", **where))
            if self.hatched(part.name):
                shapes.append(tag("rect", fill="url(#hatch)", class_="hatch", **where))
            labels += [
                tag("text", words, x=self.at(left), dx="6", y="17", class_=f"in on{colour} {when}")
                for words, when in fitting(part.name, value, share=width / self.end)
            ]
            left += part.value
        return shapes, labels

    def _band(self, bar: Bar) -> Html:
        """The bracket under a bar; what lies beyond the axis is left out with its cap."""
        if not bar.band or bar.band[0] >= self.end:
            return Html("")
        low, high = bar.band
        y = BAR + 5
        line = tag("line", x1=self.at(low), x2=self.at(min(high, self.end)), y1=y, y2=y, class_="band")
        caps = (self._line(value, "band", top=y - 3, to=y + 3) for value in bar.band if value <= self.end)
        return join((line, *caps))

    def key(self, name: str) -> Html:
        hatch = tag("rect", width="11", height="11", fill="url(#hatch)") if self.hatched(name) else ""
        square = tag("rect", width="11", height="11", class_=f"c{self.colour(name)}")
        return join((tag("svg", square, hatch, class_="key", aria_hidden="true"), Html("&nbsp;"), name))


@dataclass(frozen=True)
class HeatMap:
    """From each row's name to each column's. `steps` are the six values at which a warmer colour ends."""

    names: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]  # None: not measured; 0: failed
    steps: tuple[float, ...]
    unit: str
    say: Callable[[float], str]
    rows: frozenset[str] = frozenset()  # outlined
    columns: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()
    fold: Callable[[Sequence[str]], str] = ", ".join  # names of a bin

    @cached_property
    def bins(self) -> list[range]:
        """Each node alone; 1,024 nodes, each measured with 6 others, in 38 bins of 27."""
        size = 1
        if len(self.names) > SINGLE:
            wanted = math.isqrt(len(self.measured) // IN_BIN)
            size = math.ceil(len(self.names) / min(max(wanted, BINS[0]), BINS[1]))
        return [range(start, min(start + size, len(self.names))) for start in range(0, len(self.names), size)]

    def warmth(self, value: float) -> int:
        """0 is the slowest, 6 the fastest."""
        return bisect_right(self.steps, value)

    def picture(self) -> Html:
        return self._numbered() if len(self.names) <= NUMBERED else self._drawn()

    def key(self) -> Html:
        """What the colours are: between which values, and what is measured not at all."""
        edges = [self.say(step) for step in self.steps]
        says = [f"under {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges)), f"{edges[-1]} and more"]
        used = {self.warmth(value) for _, _, value in self.measured if value > 0}
        squares = [
            (tag("rect", width="14", height="14", class_=f"h{kind}"), words)
            for kind, words in enumerate(says)
            if kind in used
        ]
        if any(value <= 0 for _, _, value in self.measured):
            squares.append((_cross("0", "0", "14", "14"), "failed"))
        if len(self.measured) < len(self.names) * (len(self.names) - 1):
            blank = tag("rect", width="14", height="14", fill="url(#blank)", class_="blank")
            squares.append((blank, "not measured"))
        items = (
            tag("li", tag("svg", square, class_="swatch", aria_hidden="true"), words) for square, words in squares
        )
        return tag("ul", tag("li", self.unit), *items, class_="scale")

    @cached_property
    def measured(self) -> list[tuple[int, int, float]]:
        """(row, column, value) of every cell that has one."""
        return [
            (i, j, value)
            for i, row in enumerate(self.cells)
            for j, value in enumerate(row)
            if i != j and value is not None
        ]

    def _says(self, i: int, j: int) -> Html:
        """What a browser shows under the pointer."""
        return tag("title", f"{self.names[i]} \u2192 {self.names[j]}: {self._told(self.cells[i][j])}")

    def _numbered(self) -> Html:
        """In pixels, in a box of its own that scrolls: numbers keep their size."""
        short, full = shortened(self.names), labels(self.names, WIDEST)
        label = max(map(len, full)) * LETTER + 2 * PADDING
        longest = max(map(len, (*short, *(self.say(value) for _, _, value in self.measured))))
        wide = min(2 * COLUMN, max(COLUMN, longest * LETTER + PADDING))
        size, top = len(self.names), ROW
        parts = []
        for i, name in enumerate(self.names):
            hint, line, middle = tag("title", name), top + ROW * i + 19, f"{label + wide * (i + 0.5):g}"
            parts.append(tag("text", full[i], hint, x=f"{label - 8:g}", y=line, class_="row"))
            parts.append(tag("text", clipped(short[i], wide), hint, x=middle, y="18", class_="col"))
        for i in range(size):
            for j in range(size):
                x, y = f"{label + wide * j:g}", f"{top + ROW * i}"
                if i != j:
                    parts.append(self._cell(i, j, x, y, f"{wide:g}", str(ROW)))
        outline = {"class_": "mark"}
        for i, name in enumerate(self.names):
            if name in self.rows:
                parts.append(
                    tag("rect", x=f"{label:g}", y=top + ROW * i, width=f"{wide * size:g}", height=ROW, **outline)
                )
            if name in self.columns:
                x = f"{label + wide * i:g}"
                parts.append(tag("rect", x=x, y=top, width=f"{wide:g}", height=ROW * size, **outline))
        for i, j in self._marked():
            x = f"{label + wide * j:g}"
            parts.append(tag("rect", x=x, y=top + ROW * i, width=f"{wide:g}", height=ROW, **outline))
        width, height = math.ceil(label + wide * size + 2), top + ROW * size + 2
        drawing = tag("svg", *parts, width=width, height=height, class_="numbered", role="img")
        return tag("div", drawing, class_="scroll", role="region", aria_label="Heat map", tabindex="0")

    def _cell(self, i: int, j: int, x: str, y: str, width: str, height: str) -> Html:
        value = self.cells[i][j]
        where: dict[str, object] = {"x": x, "y": y, "width": width, "height": height}
        if value is None:
            return tag("g", self._says(i, j), tag("rect", fill="url(#blank)", class_="blank", **where))
        if value <= 0:
            return tag("g", self._says(i, j), _cross(x, y, width, height), class_="cell")
        warm = self.warmth(value)
        middle = f"{float(x) + float(width) / 2:g}"
        number = tag("text", self.say(value), x=middle, y=f"{float(y) + 19:g}", class_=f"in{warm}")
        return tag("g", self._says(i, j), tag("rect", class_=f"h{warm}", **where), number, class_="cell")

    def _marked(self) -> Iterator[tuple[int, int]]:
        at = {name: i for i, name in enumerate(self.names)}
        for sender, receiver in sorted(self.pairs):
            if sender in at and receiver in at:
                yield at[sender], at[receiver]

    def _drawn(self) -> Html:
        """As wide as the page lets it: cells are units of a drawing that stretches, names are not."""
        size, place = len(self.bins), {i: b for b, members in enumerate(self.bins) for i in members}
        found: dict[tuple[int, int], list[tuple[float, int, int]]] = {}
        for i, j, value in self.measured:
            found.setdefault((place[i], place[j]), []).append((value, i, j))
        cells = [self._square(row, column, some) for (row, column), some in sorted(found.items())]
        if size == len(self.names):
            cells += [tag("rect", x=i, y=i, width="1", height="1", class_="self") for i in range(size)]
        at = {name: place[i] for i, name in enumerate(self.names)}
        cells += [
            tag("rect", x=x, y=y, width=width, height=height, class_="mark")
            for x, y, width, height in sorted(
                {(0, at[name], size, 1) for name in self.rows}
                | {(at[name], 0, 1, size) for name in self.columns}
                | {(place[j], place[i], 1, 1) for i, j in self._marked()}
            )
        ]
        inside = tag("svg", *cells, viewBox=f"0 0 {size} {size}", preserveAspectRatio="none")
        back = tag("rect", width="100%", height="100%", fill="url(#blank)", class_="blank")
        return self._framed(shortened(self.names), labels(self.names, NARROW), join((back, inside)), shape="1")

    def _square(self, row: int, column: int, measured: Sequence[tuple[float, int, int]]) -> Html:
        """A bin to a bin, with the colour of the slowest pair between them."""
        value, i, j = min(measured)
        title = self._says(i, j)
        if len(self.bins) < len(self.names):
            said = f"slowest of {len(measured)} {self.names[i]} \u2192 {self.names[j]}, {self._told(value)}"
            title = tag("title", f"{self._folded[row]} \u2192 {self._folded[column]}: {said}")
        where: dict[str, object] = {"x": column, "y": row, "width": "1", "height": "1"}
        if value <= 0:
            return tag("g", title, _cross(*map(str, where.values())), class_="cell")
        return tag("rect", title, class_=f"h{self.warmth(value)} cell", **where)

    @cached_property
    def _folded(self) -> list[str]:
        return [self.fold([self.names[i] for i in members]) for members in self.bins]

    def _told(self, value: float | None) -> str:
        return "not measured" if value is None else "failed" if value <= 0 else f"{self.say(value)} {self.unit}"

    def tiles(self, ends: Mapping[str, tuple[float | None, float | None]], *, marked: frozenset[str]) -> Html:
        """A square for each node: what it sends at the left, what it receives at the right."""
        wide = max(16, 1 << math.ceil(math.log2(math.sqrt(len(self.names)))))
        high = math.ceil(len(self.names) / wide)
        parts = []
        for i, name in enumerate(self.names):
            x, y = i % wide, i // wide
            halves, said = [], []
            for side, word, value in zip((0.06, 0.5), ("sends", "receives"), ends[name], strict=True):
                where: dict[str, object] = {
                    "x": f"{x + side:g}",
                    "y": f"{y + 0.06:g}",
                    "width": "0.44",
                    "height": "0.88",
                }
                if value is None:
                    halves.append(tag("rect", class_="empty", **where))
                elif value <= 0:
                    halves.append(_cross(*map(str, where.values())))
                else:
                    halves.append(tag("rect", class_=f"h{self.warmth(value)}", **where))
                said.append(f"{word} {self._told(value)}")
            parts.append(tag("g", tag("title", f"{name} {', '.join(said)}"), *halves, class_="tile"))
            if name in marked:
                parts.append(tag("rect", x=x, y=y, width="1", height="1", class_="mark"))
        inside = tag("svg", *parts, viewBox=f"0 0 {wide} {high}", preserveAspectRatio="none")
        return self._framed([], labels(self.names, NARROW)[::wide], inside, shape=f"{wide} / {high}")

    def _framed(self, across: Sequence[str], down: Sequence[str], drawing: Html, *, shape: str) -> Html:
        """Names above and at the left of what stretches."""
        label = math.ceil(max(map(len, down)) * LETTER)
        few, many = TICKS
        above = (tag("svg", *_along(across, few, "across"), aria_hidden="true"),) if across else ()
        return tag(
            "div",
            *(tag("div", one, class_="across") for one in above),
            tag("div", tag("svg", *_along(down, many if across else few, "down"), aria_hidden="true"), class_="down"),
            tag("div", tag("svg", drawing, role="img"), class_="map", style=f"aspect-ratio: {shape}"),
            class_="heat",
            style=f"--label: {label}px",
        )


def _along(names: Sequence[str], most: int, way: str) -> list[Html]:
    """Names at round distances along one side: of 64 every eighth."""
    step = 1 << max(0, math.ceil(math.log2(len(names) / most)))
    parts = []
    for i in range(0, len(names), step):
        at = f"{100 * (i + 0.5) / len(names):.3f}%"
        where: dict[str, object] = {"x": at, "y": "15"} if way == "across" else {"x": "100%", "y": at, "dy": "4"}
        anchor = "start" if way == "across" else "end"
        said = clipped(names[i], COLUMN + PADDING) if way == "across" else names[i]
        parts.append(tag("text", said, text_anchor=anchor, **where))
    return parts


def _cross(x: str, y: str, width: str, height: str) -> Html:
    left, top = float(x), float(y)
    right, bottom = left + float(width), top + float(height)
    box = tag("rect", x=x, y=y, width=width, height=height, class_="failed")
    lines = (
        tag("line", x1=f"{left:g}", x2=f"{right:g}", y1=f"{one:g}", y2=f"{other:g}", class_="cross")
        for one, other in ((top, bottom), (bottom, top))
    )
    return join((box, *lines))


def shortened(names: Sequence[str]) -> list[str]:
    """ip-10-0-12-133.ec2.internal among its likes is 133: without what all share, numbers left whole."""
    if len(names) < 2:
        return list(names)
    head = _shared(names).rstrip(digits)
    if not all(name[len(head) :][:1].isdigit() for name in names):
        head = head.rstrip(ascii_letters + digits)  # whole words alone
    tail = _shared([name[::-1] for name in names])[::-1].lstrip(ascii_letters + digits)
    cut = [name[len(head) : len(name) - len(tail)] for name in names]
    return cut if all(cut) else list(names)


def labels(names: Sequence[str], width: float) -> list[str]:
    """The names, or what tells them apart where one is longer than so many px."""
    if all(len(name) * LETTER + PADDING <= width for name in names):
        return list(names)
    return [clipped(name, width) for name in shortened(names)]


def _shared(names: Sequence[str]) -> str:
    """How all of them begin: what the first and the last in the alphabet have in common."""
    first, last = min(names), max(names)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def clipped(name: str, width: float) -> str:
    """The end of a name that is too long: the end tells it from its neighbours."""
    room = max(3, int((width - PADDING) / LETTER))
    return name if len(name) <= room else "\u2026" + name[1 - room :]


@dataclass(frozen=True)
class Line:
    label: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over sizes that double: the horizontal axis is logarithmic, the vertical one starts at 0."""

    lines: tuple[Line, ...]
    across: str  # what the horizontal axis is, "message size"
    unit: str
    say: Callable[[float], str]
    say_across: Callable[[float], str]
    band: tuple[float, float, float] | None = None  # from, to, and where on the horizontal axis they hold
    says: str = ""  # of the band

    @cached_property
    def sizes(self) -> list[float]:
        holds = [self.band[2]] if self.band else []
        return sorted({*(x for line in self.lines for x, _ in line.points), *holds})

    @cached_property
    def end(self) -> float:
        values = [y for line in self.lines for _, y in line.points]
        return 1.08 * max(*values, *(self.band[:2] if self.band else ()), 1e-9)

    def x(self, value: float) -> float:
        """0 to 1, with room for half a point at both ends."""
        low, high = math.log2(self.sizes[0]), math.log2(self.sizes[-1])
        room = (high - low) * 0.06 or 1.0
        return (math.log2(value) - low + room) / (high - low + 2 * room)

    def y(self, value: float) -> float:
        return HEIGHT * (1 - value / self.end)

    def picture(self) -> Html:
        step = tick(self.end)
        ticks = [step * i for i in range(int(self.end / step + 1e-9) + 1)]
        grid = [
            tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid") for y in (f"{self.y(t):.1f}" for t in ticks)
        ]
        left = (tag("text", f"{t:,.6g}", x="100%", y=f"{self.y(t) + 4:.1f}", text_anchor="end") for t in ticks)
        every = math.ceil(len(self.sizes) / 5)
        shown = self.sizes[::-1][::every]  # the largest always: it is the one that counts
        below = (
            tag("text", self.say_across(size), x=f"{100 * self.x(size):.2f}%", y="14", text_anchor="middle")
            for size in shown
        )
        return tag(
            "figure",
            tag(
                "div",
                tag("div", tag("svg", *left, height=HEIGHT), class_="up", aria_hidden="true"),
                tag("svg", *grid, *self._band(), *self._curves(), *self._points(), height=HEIGHT, role="img"),
                tag("svg", *below, height="18", class_="axis", aria_hidden="true"),
                class_="plot",
            ),
            tag("figcaption", f"{self.unit} over {self.across}", f"; {self.says}" if self.says else ""),
        )

    def _band(self) -> Iterator[Html]:
        if not self.band:
            return
        low, high, at = self.band
        hint = tag("title", self.says)
        yield tag(
            "rect",
            hint,
            x="0",
            width="100%",
            y=f"{self.y(high):.1f}",
            height=f"{self.y(low) - self.y(high):.1f}",
            class_="expected",
        )
        x = f"{100 * self.x(at):.2f}%"
        yield tag("line", x1=x, x2=x, y1=f"{self.y(high):.1f}", y2=f"{self.y(low):.1f}", class_="gate")
        for value, kind in ((high, "passes"), (low, "excludes")):
            y = f"{self.y(value):.1f}"
            yield tag("line", x1="0", x2="100%", y1=y, y2=y, class_=kind)

    def _curves(self) -> Iterator[Html]:
        drawn = []
        for line in self.lines:
            points = " ".join(f"{1000 * self.x(x):.1f},{self.y(y):.1f}" for x, y in line.points)
            drawn.append(tag("polyline", points=points, class_="curve dashed" if line.dashed else "curve"))
        yield tag("svg", *drawn, viewBox=f"0 0 1000 {HEIGHT}", preserveAspectRatio="none", height=HEIGHT)

    def _points(self) -> Iterator[Html]:
        for line in self.lines:
            for x, y in line.points if not line.dashed else ():
                hint = tag("title", f"{line.label}, {self.say_across(x)}: {self.say(y)} {self.unit}")
                yield tag("circle", hint, cx=f"{100 * self.x(x):.2f}%", cy=f"{self.y(y):.1f}", r="4", class_="point")


def fitting(name: str, value: str, *, share: float) -> list[tuple[str, str]]:
    """Labels for a segment with this share of the chart, each with the classes that say at which widths it shows.

    fitting("weights", "15.0", share=0.15) is [("weights", "from560 until720"), ("weights 15.0", "from720")]: the
    name alone where there is no room for both.
    """
    both = f"{name} {value}"
    whole, short = (
        next((width for width in WIDTHS if width * share >= len(words) * LETTER + PADDING), 0)
        for words in (both, name)
    )
    found = [(name, f"from{short}" + (f" until{whole}" if whole else ""))] if short != whole else []
    return [*found, (both, f"from{whole}")] if whole else found


def tick(end: float) -> float:
    """tick(120) is 25, tick(7.3) is 2: round steps, five at the most."""
    power = 10.0 ** math.floor(math.log10(end / 5))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 10) if end / (step * power) <= 5)


# Once on a page that has charts.
HATCH = Html(
    '<svg width="0" height="0" class="defs" aria-hidden="true"><pattern id="hatch" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="1.5" height="6" fill="#14171b" '
    'fill-opacity="0.28"/></pattern></svg>'
)

STYLE = (
    """
figure { margin: 1rem 0; container-type: inline-size }
figure svg { display: block; width: 100%; font-size: 12px; overflow: visible }
figcaption { color: var(--soft); font-size: .85rem; text-align: right }
.defs { position: absolute }
.bars { position: relative }
.under { position: absolute; inset: 0; height: 100% }
.bar { position: relative; padding: .5rem 0 .2rem }
.bar p { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 1rem; margin: 0 0 .2rem;
  max-width: none; font-size: .9rem }
.bar p > span { background: var(--bg); box-shadow: -.3rem 0 var(--bg), .3rem 0 var(--bg) }
.taken p > span:first-child { font-weight: 600 }
.bar i { font-style: normal; font-weight: 400 }
.bar rect { stroke: var(--bg) }
.bar .hatch { stroke: none; pointer-events: none }
.bar .outline { fill: none; stroke: var(--soft) }
.taken .outline { stroke: var(--ink); stroke-width: 1.5 }
.bar polygon { fill: var(--bg) }
.in { fill: #14171b; display: none; pointer-events: none; paint-order: stroke; stroke-width: 4px }
.band { stroke: var(--ink); stroke-width: 1.25 }
.grid { stroke: var(--line) }
.limit { stroke: var(--bad); stroke-width: 2; shape-rendering: crispEdges }
.bar .limit { stroke: #a40e26; pointer-events: none }
.head text { fill: var(--bad); font-weight: 600 }
.axis text { fill: var(--soft) }
.key { width: 11px; height: 11px; display: inline-block }
"""
    + "".join(f".c{i} {{ fill: #{it} }} .on{i} {{ stroke: #{it} }}\n" for i, it in enumerate(PALETTE))
    + "".join(
        f"@container (min-width: {w}px) {{ .from{w} {{ display: inline }} .until{w} {{ display: none }} }}\n"
        for w in WIDTHS
    )
)

# Once on a page that has maps or curves, and after STYLE.
BLANK = Html(
    '<svg width="0" height="0" class="defs" aria-hidden="true"><pattern id="blank" width="5" height="5" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="1" height="5" class="line"/>'
    "</pattern></svg>"
)

MAP_STYLE = (
    """
.numbered { display: block; font-size: 12px }
.numbered text { fill: var(--soft); text-anchor: middle }
.numbered .row { text-anchor: end }
.numbered .cell rect, .numbered .blank { stroke: var(--bg); stroke-width: 2 }
.cell text { stroke-width: 3px; paint-order: stroke; pointer-events: none; font-variant-numeric: tabular-nums }
.heat { display: grid; grid-template-columns: var(--label) minmax(0, 38rem); gap: 2px 6px; margin: .75rem 0 }
.heat svg { display: block; width: 100%; overflow: visible; font-size: 12px }
.heat text { fill: var(--soft) }
.across { grid-column: 2; height: 20px } .across svg { height: 20px }
.down { position: relative; grid-column: 1 }
.down svg { position: absolute; inset: 0; height: 100% }
.map { position: relative }
.map > svg { position: absolute; inset: 0; height: 100% }
.map svg { height: 100%; overflow: hidden }
.map .cell { shape-rendering: crispEdges }
.line { fill: var(--soft); fill-opacity: .35 }
.self { fill: var(--bg) } .empty { fill: var(--line) }
.failed { fill: var(--bg); stroke: var(--bad) } .map .failed { stroke: none }
.cross { stroke: var(--bad); stroke-width: 1.5; vector-effect: non-scaling-stroke; pointer-events: none }
.mark { fill: none; stroke: var(--ink); stroke-width: 2.5; vector-effect: non-scaling-stroke; pointer-events: none }
.scale { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: 0; margin: .5rem 0; list-style: none;
  font-size: .85rem; color: var(--soft) }
.swatch { width: 14px; height: 14px; display: inline-block; vertical-align: -2px; margin-right: .35rem }
.plot { display: grid; grid-template-columns: 3rem minmax(0, 1fr); column-gap: 6px }
.plot text { fill: var(--soft) }
.plot > .axis { grid-column: 2; margin-top: 5px }
.curve { fill: none; stroke: var(--curve); stroke-width: 2.25; vector-effect: non-scaling-stroke }
.dashed { stroke-dasharray: 3 4; stroke-width: 1.5 }
.point { fill: var(--curve); stroke: var(--bg); stroke-width: 1.5 }
.expected { fill: var(--warn); fill-opacity: .14 }
.passes, .excludes { stroke: var(--warn); stroke-dasharray: 6 3 } .excludes { stroke: var(--bad) }
.gate { stroke: var(--warn); stroke-width: 5 }
:root { --curve: #2b6cb0 }
@media screen and (prefers-color-scheme: dark) { :root { --curve: #77aadd } }
"""
    + "".join(f".h{i} {{ fill: #{it} }}\n" for i, it in enumerate(SUNSET))
    + "".join(
        f".numbered .in{i} {{ fill: #{'fff' if i < WHITE_ON else '14171b'}; stroke: #{it} }}\n"
        for i, it in enumerate(SUNSET)
    )
)
