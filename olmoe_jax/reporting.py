"""One HTML page with everything inside: text, tables, interactive charts, light and dark.

The charts are drawn by plotly's JavaScript, which its Python package holds (4.8 MB of the page);
a reader needs no network, and without JavaScript still has the text and the tables.
"""

import dataclasses
import html
import json
import math
import os
import pathlib


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
    """Rows of text; columns after the first stand to the right."""

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


def page(title, subtitle, blocks) -> str:
    """The HTML text of a page: all of it in one file.

    Args:
      title: of the page.
      subtitle: one line below it.
      blocks: Chart, Table and Prose, in order.
    """
    from plotly import offline  # read only when a page is written

    charts = [block for block in blocks if isinstance(block, Chart)]
    names = list(dict.fromkeys(series.name for chart in charts for series in chart.series))
    data = {"names": names, "charts": [_chart_data(chart) for chart in charts]}
    numbers = iter(range(len(charts)))
    body = "\n".join(
        _chart(block, next(numbers)) if isinstance(block, Chart) else _WRITERS[type(block)](block)
        for block in blocks
    )
    # "</" would end the script element; the rest of JSON means the same in HTML
    embedded = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    scripts = [
        f"<script>{offline.get_plotlyjs()}</script>",
        f'<script type="application/json" id="data">{embedded}</script>',
        f"<script>{_SCRIPT}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<header><h1>{html.escape(title)}</h1>\n"
        f"<p>{html.escape(subtitle)}</p></header>\n{body}\n</main>\n"
        + ("\n".join(scripts) if charts else "")
        + "\n</body>\n</html>\n"
    )


def write(path, text):
    """Writes a page, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _chart(chart, number):
    note = f"<figcaption>{html.escape(chart.note)}</figcaption>" if chart.note else ""
    return (
        f"<figure><h2>{html.escape(chart.title)}</h2>"
        f'<div class="chart" id="chart-{number}"></div>{note}</figure>'
    )


def _table(table):
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in table.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    )
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2><div class=wide><table>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}</section>"
    )


def _prose(prose):
    frame = " class=emphasis" if prose.emphasis else ""
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in prose.paragraphs)
    return f"<section{frame}><h2>{html.escape(prose.title)}</h2>{paragraphs}</section>"


_WRITERS = {Table: _table, Prose: _prose}


def _chart_data(chart):
    fields = ("x_title", "y_title", "log_x", "zero_line")
    series = [_series_data(series, chart.log_x) for series in chart.series]
    return {name: getattr(chart, name) for name in fields} | {"series": series}


def _series_data(series, log_x):
    shown = [i for i, x in enumerate(series.x) if not log_x or x > 0]
    data = {"name": series.name, "points": series.points}
    for name in ("x", "y", "low", "high"):
        values = getattr(series, name)
        data[name] = None if values is None else _numbers([values[i] for i in shown])
    return data


def _numbers(values):
    """A list for JSON: what is not finite becomes null, a gap in the curve."""
    return [v if isinstance(v, str) else float(v) if math.isfinite(v) else None for v in values]


# Colours are for both grounds apart: told apart by the colour-blind, at least 3 : 1 in contrast.
_STYLE = """
:root { --ground: #ffffff; --panel: #f4f6f8; --text: #1b1f24; --soft: #59636e; --line: #d5dae0;
  --accent: #0072b2; --s0: #0072b2; --s1: #c44e00; --s2: #00815f; --s3: #b0558a; --s4: #8a6d00;
  --s5: #5a6fd0; --s6: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --panel: #1e2329; --text: #e6e9ed;
  --soft: #a3adb8; --line: #39414a; --accent: #56b4e9; --s0: #56b4e9; --s1: #f0894a; --s2: #35c99a;
  --s3: #e39bc4; --s4: #e6c229; --s5: #9fb0ff; --s6: #b5b5b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
header p, .note, figcaption { color: var(--soft); margin: .4rem 0 0; }
.note, figcaption { font-size: .87rem; }
section, figure { margin: 2rem 0 0; }
section p { margin: .4rem 0 0; overflow-wrap: anywhere; }
.emphasis { background: var(--panel); border-left: 4px solid var(--accent);
  padding: .9rem 1.1rem; border-radius: 4px; }
.chart { width: 100%; height: 24rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; }
th:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 8rem; }
tbody th { font-weight: 600; }
@media print { .chart { break-inside: avoid; } }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const value = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shade = (hex, alpha) =>
  `rgba(${[1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16))},${alpha})`;
function traces(series) {
  const colour = value("--s" + data.names.indexOf(series.name) % 7);
  const same = {name: series.name, legendgroup: series.name, x: series.x};
  if (series.points) {
    const bars = series.low && {type: "data", symmetric: false, thickness: 2, width: 7,
      color: colour, array: series.high.map((v, i) => v - series.y[i]),
      arrayminus: series.low.map((v, i) => series.y[i] - v)};
    const marker = {color: series.low ? colour : shade(colour, 0.55), size: series.low ? 11 : 7,
      symbol: series.low ? "diamond" : "circle"};
    return [{...same, y: series.y, mode: "markers", marker, error_y: bars || undefined}];
  }
  const line = {...same, y: series.y, mode: "lines", line: {color: colour, width: 2}};
  if (!series.low) return [line];
  const edge = {...same, mode: "lines", line: {width: 0}, showlegend: false, hoverinfo: "skip"};
  return [{...edge, y: series.low}, {...edge, y: series.high, fill: "tonexty",
    fillcolor: shade(colour, 0.2)}, line];
}
function draw() {
  const text = value("--text"), grid = value("--line");
  const axis = title => ({title: {text: title}, gridcolor: grid, linecolor: grid, zeroline: false,
    automargin: true});
  data.charts.forEach((chart, i) => {
    const layout = {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: text, family: "system-ui, sans-serif", size: 13}, hovermode: "closest",
      margin: {l: 60, r: 30, t: 10, b: 50},
      legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: text, orientation: "v"},
      xaxis: {...axis(chart.x_title), type: chart.log_x ? "log" : undefined},
      yaxis: {...axis(chart.y_title), zeroline: chart.zero_line, zerolinecolor: text,
        rangemode: chart.zero_line ? "tozero" : "normal"}};
    Plotly.react("chart-" + i, chart.series.flatMap(traces), layout,
      {responsive: true, displaylogo: false});
  });
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""
