"""The charts and heat maps of a page as pictures (PNG, SVG) and as the numbers in them (CSV)."""

import csv
import pathlib
import re
import textwrap

import numpy as np

from olmoe_jax import files
from olmoe_jax.reporting import blocks as blocks_lib

LOW, EVEN, HIGH = "#b35806", "#f4f6f8", "#0072b2"  # of heat maps with a middle, as on the page
PALETTE = ("#0072b2", "#c44e00", "#00815f", "#b0558a", "#8a6d00", "#5a6fd0", "#6b6b6b")
_STYLE = {
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.alpha": 0.25,
    "svg.hashsalt": "",  # the same file for the same numbers
}
_SEVERAL = 8  # more curves than this are drawn without bands, in colours of a sweep


def write(blocks, directory):
    """Writes DIRECTORY/NAME.png, .svg and .csv for every chart and heat map, each file whole.

    NAME follows from the title and, where an explorer names several selections, from these.

    Args:
      blocks: of `reporting.page`; what is neither Chart nor Explorer is passed over, as are tables.
    Returns:
      the names, in order.
    """
    import matplotlib  # slow to import
    from matplotlib import figure
    from matplotlib.backends import backend_agg

    directory, names = pathlib.Path(directory), []
    for title, name, draw, rows in _pictures(blocks):
        stem, number = name, 2
        while stem in names:
            stem, number = f"{name}_{number}", number + 1
        names.append(stem)
        with matplotlib.rc_context(_STYLE):
            drawing = figure.Figure(figsize=(8.5, 4.6), dpi=130, layout="constrained")
            backend_agg.FigureCanvasAgg(drawing)
            axes = drawing.subplots()
            axes.set_title(textwrap.fill(title, 90))
            draw(axes)
            for ending, metadata in (("png", {}), ("svg", {"Date": None})):
                with files.whole(directory / f"{stem}.{ending}") as file:
                    drawing.savefig(file, format=ending, metadata=metadata)
        with files.whole(directory / f"{stem}.csv", "w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    return names


def _pictures(blocks):
    """(title, file name, function that draws into axes, rows of the CSV)."""
    for block in blocks:
        if isinstance(block, blocks_lib.Chart):
            yield (block.title, slug(block.title), lambda axes, b=block: _draw_chart(axes, b),
                   _chart_rows(block))  # fmt: skip
        elif isinstance(block, blocks_lib.Explorer) and block.kind != "table":
            for chosen in block.figures:
                part = _Part(block, block.selection(chosen))
                draw = {"bars": _draw_bars, "lines": _draw_lines, "heat": _draw_heat}[block.kind]
                words = " ".join(f"{axis} {label}" for axis, label in chosen.items())
                name = slug(f"{block.title} {words}" if len(block.figures) > 1 else block.title)
                yield part.title, name, lambda axes, d=draw, p=part: d(axes, p), part.rows()


def slug(title) -> str:
    """A file name that says the title.

    >>> slug("demo: router saturation, layer 7")
    'demo_router_saturation_layer_7'
    """
    return re.sub(r"[^\w.+-]+", "_", title.lower()).strip("_.")


class _Part:
    """What an Explorer shows at a selection: arrays [series, x]."""

    def __init__(self, block, selection):
        self.block, self.selection = block, selection
        names = [name for name in (block.series, block.x) if name]
        self.values, self.low, self.high = (
            None if array is None else np.atleast_2d(array)
            for array in block.cube.at(selection, names)
        )
        self.x = block.cube.axes[block.x]
        self.series = block.cube.axes[block.series] if block.series else ("",)
        shown = [f"{n} {x}" for n, x in selection.items() if len(block.cube.axes[n]) > 1]
        self.title = block.title + (f" ({', '.join(shown)})" if shown else "")
        self.y_title = block.y_title
        for name, label in selection.items():
            self.y_title = self.y_title.replace(f"{{{name}}}", label)

    def level(self):
        """[series, x], or None."""
        block = self.block
        if block.level is None:
            return None
        names = [name for name in (block.series, block.x) if name in block.level.axes]
        values = np.asarray(block.level.at(self.selection, names)[0])
        if names == [block.series]:
            values = values[:, None]
        return np.broadcast_to(values, self.values.shape)

    def places(self):
        """(numbers along x, title): the first of the scales, or the labels if they are numbers."""
        if self.block.scales:
            name = next(iter(self.block.scales))
            return self.block.scales[name], name
        if all(re.fullmatch(r"-?[\d.]+", label) for label in self.x):
            return tuple(map(float, self.x)), self.block.x_title
        return None, self.block.x_title

    def rows(self):
        """A head, and a row for each number."""
        block, level = self.block, self.level()
        fixed = [name for name in self.selection]
        yield [*fixed, *([block.series] if block.series else []), block.x, *block.scales, "value",
               "low", "high", *([block.level_name] if level is not None else [])]  # fmt: skip
        for i, series in enumerate(self.series):
            for j, x in enumerate(self.x):
                ends = [_number(a[i, j]) if a is not None else "" for a in (self.low, self.high)]
                yield [
                    *(self.selection[name] for name in fixed), *([series] if block.series else []),
                    x, *(numbers[j] for numbers in block.scales.values()),
                    _number(self.values[i, j]), *ends,
                    *([_number(level[i, j])] if level is not None else []),
                ]  # fmt: skip


def _number(value):
    return f"{value:.6g}" if np.isfinite(value) else ""


def _colours(count):
    import matplotlib

    if count <= len(PALETTE):
        return PALETTE
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count))


def _draw_bars(axes, part):
    places = np.arange(len(part.x))
    value = np.nan_to_num(part.values[0])
    axes.bar(places, value, color=PALETTE[0], width=0.8)
    if part.low is not None:
        ends = np.nan_to_num([part.values[0] - part.low[0], part.high[0] - part.values[0]])
        axes.errorbar(places, value, yerr=np.maximum(ends, 0), fmt="none", color="0.25", lw=0.8)
    level = part.level()
    if level is not None:
        axes.plot(places, level[0], color=PALETTE[1], linestyle="--", label=part.block.level_name)
        axes.legend(frameon=False)
    every = -(-len(places) // 16)
    axes.set_xticks(places[::every], part.x[::every])
    axes.grid(axis="x", visible=False)
    axes.set(xlabel=part.block.x_title, ylabel=part.y_title)


def _draw_lines(axes, part):
    places, title = part.places()
    x = np.arange(len(part.x)) if places is None else np.asarray(places, float)
    paint, level, many = _colours(len(part.series)), part.level(), len(part.series) > _SEVERAL
    own = level is not None and not np.array_equal(
        level, np.broadcast_to(level[:1], level.shape), equal_nan=True
    )
    for i, name in enumerate(part.series):
        marker = "o" if len(x) <= 12 else None
        axes.plot(x, part.values[i], color=paint[i], label=name or None, marker=marker, ms=4)
        if part.low is not None and not many:
            axes.fill_between(x, part.low[i], part.high[i], color=paint[i], alpha=0.18, lw=0)
        if own:
            axes.plot(x, level[i], color=paint[i], linestyle=":")
    if level is not None and not own:
        axes.plot(x, level[0], color="black", linestyle=":", label=part.block.level_name)
    if places is None:
        axes.set_xticks(x, part.x)
    axes.set(xlabel=title, ylabel=part.y_title)
    _legend(axes)


def _legend(axes):
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        columns = 1 + len(handles) // 16
        axes.legend(frameon=False, fontsize=8, ncols=columns, loc="center left",
                    bbox_to_anchor=(1, 0.5))  # fmt: skip


def _draw_heat(axes, part):
    from matplotlib import colors

    values, middle = part.values, part.block.middle
    options = {"cmap": "Blues", "vmin": 0}
    if middle is not None:
        most = max(np.nanmax(values, initial=middle), 2 * middle)
        norm = colors.TwoSlopeNorm(vmin=0, vcenter=middle, vmax=most)
        paint = colors.LinearSegmentedColormap.from_list("around", (LOW, EVEN, HIGH))
        options = {"cmap": paint, "norm": norm}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    axes.grid(False)
    for labels, place in ((part.x, axes.set_xticks), (part.series, axes.set_yticks)):
        every = -(-len(labels) // 16)
        place(range(0, len(labels), every), labels[::every])
    axes.set(xlabel=part.block.x_title, ylabel=part.block.series)
    axes.figure.colorbar(image, ax=axes, label=part.y_title)


def _chart_rows(chart):
    yield ["series", chart.x_title or "x", "value", "low", "high"]
    for series in chart.series:
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            ends = ["" if e is None else _number(e[i]) for e in (series.low, series.high)]
            yield [series.name, x, _number(y), *ends]


def _draw_chart(axes, chart):
    paint = _colours(len(chart.series))
    for i, series in enumerate(chart.series):
        if series.points:
            axes.plot(series.x, series.y, "o", color=paint[i], label=series.name, ms=5)
        else:
            axes.plot(series.x, series.y, color=paint[i], label=series.name)
        if series.low is not None and series.points:
            ends = np.abs(np.stack([series.low, series.high]) - np.asarray(series.y))
            axes.errorbar(series.x, series.y, yerr=ends, fmt="none", color=paint[i], capsize=3)
        elif series.low is not None:
            axes.fill_between(series.x, series.low, series.high, color=paint[i], alpha=0.18, lw=0)
    if chart.zero_line:
        axes.axhline(0, color="black", linewidth=0.8)
    if chart.log_x:
        axes.set_xscale("log")
    axes.set(xlabel=chart.x_title, ylabel=chart.y_title)
    _legend(axes)
