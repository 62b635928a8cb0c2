"""What a page consists of: text, tables, charts, and numbers that the reader looks through."""

import dataclasses
from collections.abc import Mapping

import numpy as np

KINDS = ("bars", "lines", "heat", "table")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve, or one row of points.

    Attributes:
      name: in the legend; the same name has the same colour in all charts of a page.
      x, y: as many numbers (x may be words); NaN leaves a gap.
      low, high: ends of a band around a line, or of the bars through points; or None.
      points: draw points, not a line.
    """

    name: str
    x: tuple
    y: tuple
    low: tuple | None = None
    high: tuple | None = None
    points: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves in one frame.

    Attributes:
      title: above it.
      series: tuple of Series.
      x_title, y_title: of the axes, with units.
      log_x: logarithmic x axis; what lies at 0 is then not shown.
      zero_line: draw a line at y = 0: what the points are held against.
      note: below it.
    """

    title: str
    series: tuple[Series, ...]
    x_title: str
    y_title: str
    log_x: bool = False
    zero_line: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; columns of numbers stand to the right, the others to the left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prose:
    """A heading with paragraphs; `emphasis` frames it."""

    title: str
    paragraphs: tuple[str, ...]
    emphasis: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cube:
    """Values along named axes. A page holds a cube once, however many blocks show it.

    Attributes:
      axes: name → labels, in the order of the axes of `values`.
      values: float array, NaN: not known; or an object array whose items are tuples: the rows of a
        table, or an order of positions.
      low, high: of the same shape, ends of the intervals; or None.

    Raises:
      ValueError: shapes and labels do not fit each other.
    """

    axes: Mapping[str, tuple[str, ...]]
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def __post_init__(self):
        shape = tuple(len(labels) for labels in self.axes.values())
        for name in ("values", "low", "high"):
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"cube of {', '.join(self.axes)}: {name} are {list(array.shape)}, its labels "
                    f"{list(shape)}"
                )

    def at(self, selection, axes):
        """(values, low, high) along `axes`, in this order, the other axes at `selection`; of no
        axes single items."""
        names = list(self.axes)
        place = tuple(
            slice(None) if name in axes else labels.index(selection[name])
            for name, labels in self.axes.items()
        )
        kept = [name for name in names if name in axes]
        order = [kept.index(name) for name in axes if name in kept]
        cut = [None if a is None else a[place] for a in (self.values, self.low, self.high)]
        return tuple(a.transpose(order) if order and a is not None else a for a in cut)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Explorer:
    """A chart, heat map or table of a part of a cube; the reader chooses the part.

    Every axis that is neither `x` nor `series` is a choice, if it has more than one label.

    Attributes:
      title: above it.
      cube: what it shows.
      kind: "bars" with intervals, "lines" with bands, "heat", or "table" of the rows in the cube.
      x: axis that lies horizontally; "" of a table.
      series: axis of which each label is a line, or a row of the heat map; "" for none.
      x_title, y_title: with units; {axis} in y_title is the chosen label of that axis.
      start: axis → label chosen at first; default the first.
      level: what the values are held against (chance, balance), of some of the axes; or None.
      level_name: of it.
      middle: value that a heat map's two colours part at; None: one colour, from 0.
      scales: name → numbers: what `x` can be measured in, one number for each of its labels.
      orders: name → Cube of tuples of positions along `x`, of some of the axes that are chosen. A
        heat map whose two axes are as long takes the order for both; what is left out is not shown.
      columns: of a table.
      note: below it.
      figures: selections (axis → label, the rest as at the start) of which pictures are written.

    Raises:
      ValueError: an unknown kind, or axes and labels that the cube does not have.
    """

    title: str
    cube: Cube
    kind: str
    x: str = ""
    series: str = ""
    x_title: str = ""
    y_title: str = ""
    start: Mapping[str, str] = dataclasses.field(default_factory=dict)
    level: Cube | None = None
    level_name: str = ""
    middle: float | None = None
    scales: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    orders: Mapping[str, Cube] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()
    note: str = ""
    figures: tuple[Mapping[str, str], ...] = ({},)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"{self.title}: kind {self.kind!r}; one of {', '.join(KINDS)}")
        axes = self.cube.axes
        shown = (self.x, self.series) if self.kind == "heat" else (self.x,) * (self.kind != "table")
        for name in (*shown, *([self.series] if self.series else []), *self.start):
            if name not in axes:
                raise ValueError(f"{self.title}: no axis {name!r}; there are {', '.join(axes)}")
        for selection in (self.start, *self.figures):
            for name, label in selection.items():
                if label not in axes[name]:
                    raise ValueError(f"{self.title}: {name} has no {label!r}")
        for name, numbers in self.scales.items():
            if len(numbers) != len(axes[self.x]):
                raise ValueError(
                    f"{self.title}: {name} are {len(numbers)}, not {len(axes[self.x])}"
                )

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """axis → labels of what the reader chooses."""
        return {
            name: labels
            for name, labels in self.cube.axes.items()
            if name not in (self.x, self.series)
        }

    def selection(self, chosen=()) -> dict[str, str]:
        """axis → label of every choice: `chosen`, else what it starts with."""
        first = {name: labels[0] for name, labels in self.choices.items()}
        return first | dict(self.start) | dict(chosen)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """A text whose pieces are coloured by the first of the experts that they went to.

    Attributes:
      title: above it.
      pieces: of the text, in order.
      hints: said of each piece, beside its experts; "" for nothing.
      layers: labels.
      experts: int [layers, pieces, k], by falling weight; negative: none.
      weights: float [layers, pieces, k].
      start: label of the layer shown at first.
      note: below it.
    """

    title: str
    pieces: tuple[str, ...]
    hints: tuple[str, ...]
    layers: tuple[str, ...]
    experts: np.ndarray
    weights: np.ndarray
    start: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """Names found by typing a part of them, each with the experts that it goes to most.

    Attributes:
      title: above it; label: of the input.
      names: [entries], most frequent first; one may stand there twice.
      axes: name → labels of what is chosen beside; the last axis of `counts` and the last but one
        of the others is that of the entries.
      counts: int [axes…, entries], occurrences; an axis may have length 1 where they are the same.
      experts: int [axes…, entries, shown], −1: none.
      shares: float [axes…, entries, shown], of the occurrences, 0..1, falling.
      start: axis → label chosen at first.
      example: what is searched for at first.
      note: below it.
    """

    title: str
    label: str
    names: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]]
    counts: np.ndarray
    experts: np.ndarray
    shares: np.ndarray
    start: Mapping[str, str] = dataclasses.field(default_factory=dict)
    example: str = ""
    note: str = ""
