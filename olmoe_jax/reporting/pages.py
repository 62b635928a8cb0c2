"""Blocks as the HTML text of one page."""

import html
import itertools
import pathlib
import re

from olmoe_jax.reporting import blocks as blocks_lib
from olmoe_jax.reporting import embedding

_FOLDER = pathlib.Path(__file__).parent
_AS_IT_IS = "as numbered"
_NUMBER = re.compile(r'[-–+−±<>≥≤~]?\s*[\d.,]*\d[^(:;"]*|[-–]|')  # "–": nothing there


def page(title, subtitle, blocks) -> str:
    """The HTML text of a page: all of it in one file.

    Args:
      title: of the page.
      subtitle: one line below it.
      blocks: of `olmoe_jax.reporting.blocks`, in order.
    """
    blocks = list(blocks)
    drawn = any(type(block) in _DRAWN for block in blocks)
    if not drawn:
        return _document(title, subtitle, _body(blocks), "")
    hint = "<noscript><p class=note>Charts and choices need JavaScript.</p></noscript>\n"
    return _document(title, subtitle, hint + _body(blocks), _scripts(blocks))


def num_bytes(blocks) -> int:
    """Bytes of a page of these blocks, but for its title."""
    return len(page("", "", blocks).encode())


def _document(title, subtitle, body, scripts):
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{html.escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n<header><h1>{html.escape(title)}</h1>\n"
        f"<p>{html.escape(subtitle)}</p></header>\n{body}\n</main>\n{scripts}\n</body>\n</html>\n"
    )


def _scripts(blocks):
    from plotly import offline  # read only when a page is written

    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            f"<script>{offline.get_plotlyjs()}</script>",
            f'<script type="application/json" id="data">{embedding.text(blocks)}</script>',
            f"<script>{script}</script>",
        ]
    )


def _body(blocks):
    counters = {kind: itertools.count() for kind in _DRAWN}
    parts = []
    for block in blocks:
        if type(block) in _DRAWN:
            parts.append(_DRAWN[type(block)](block, next(counters[type(block)])))
        else:
            parts.append(_WRITERS[type(block)](block))
    return "\n".join(parts)


def _figure(title, note, inside, kind, number):
    caption = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return (
        f'<figure id="{kind}-{number}" class="{kind}"><h2>{html.escape(title)}</h2>'
        f"{inside}{caption}</figure>"
    )


def _chart(chart, number):
    return _figure(
        chart.title, chart.note, '<div class="plot"></div>',
        "chart", number,
    )  # fmt: skip


def _select(name, labels, start):
    options = "".join(
        f"<option{' selected' if label == start else ''}>{html.escape(label)}</option>"
        for label in labels
    )
    return (
        f'<label>{html.escape(name)} <select name="{html.escape(name)}">{options}</select></label>'
    )


def _controls(choices, start, before=""):
    """Selects of what there is to choose."""
    selects = before + "".join(
        _select(name, labels, start[name]) for name, labels in choices.items() if len(labels) > 1
    )
    return f'<div class="controls">{selects}</div>' if selects else ""


def _explorer(block, number):
    choices, start = block.choices, block.selection()
    if block.scales:
        choices = choices | {"horizontal axis": tuple(block.scales)}
        start["horizontal axis"] = next(iter(block.scales))
    orders = (*block.orders, *(["largest first"] if block.kind == "bars" else []))
    if orders:
        choices = choices | {"order": (_AS_IT_IS, *orders)}
        start["order"] = _AS_IT_IS
    inside = '<div class="wide"></div>' if block.kind == "table" else '<div class="plot"></div>'
    inside = _controls(choices, start) + inside
    return _figure(block.title, block.note, inside, "explorer", number)


def _passage(block, number):
    inside = (
        _controls({"layer": block.layers}, {"layer": block.start})
        + '<p class="pieces"></p><p class="detail" aria-live="polite"></p>'
    )
    return _figure(block.title, block.note, inside, "passage", number)


def _search(block, number):
    field = (
        f'<label>{html.escape(block.label)} <input type="search" name="text" '
        f'value="{html.escape(block.example)}" autocomplete="off" spellcheck="false"></label>'
    )
    start = {name: labels[0] for name, labels in block.axes.items()} | dict(block.start)
    inside = _controls(block.axes, start, field) + (
        '<p class="detail" aria-live="polite"></p><div class="wide"></div>'
    )
    return _figure(block.title, block.note, inside, "search", number)


def _table(table):
    left = [
        not all(_NUMBER.fullmatch(row[i]) for row in table.rows) for i in range(len(table.columns))
    ]

    def classes(i):
        return ' class="text"' if left[i] else ""

    head = "".join(
        f'<th scope="col"{classes(i)}>{html.escape(c)}</th>' for i, c in enumerate(table.columns)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td{classes(i)}>{html.escape(cell)}</td>" for i, cell in enumerate(rest, 1))
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


_WRITERS = {blocks_lib.Table: _table, blocks_lib.Prose: _prose}
_DRAWN = {
    blocks_lib.Chart: _chart,
    blocks_lib.Explorer: _explorer,
    blocks_lib.Passage: _passage,
    blocks_lib.Search: _search,
}
