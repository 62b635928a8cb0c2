"""Blocks as the JSON that page.js draws from."""

import base64
import json
import math

import numpy as np

from olmoe_jax.reporting import blocks as blocks_lib

DIGITS = 4  # of the numbers of cubes
_SHARE = 200  # steps of a share in a Search


def data(blocks) -> dict:
    """{"names", "charts", "cubes", "explorers", "passages", "searches"}: JSON values.

    Blocks of a kind stand in the order of the page; cubes once each, explorers name their number.
    """
    kinds = (blocks_lib.Chart, blocks_lib.Explorer, blocks_lib.Passage, blocks_lib.Search)
    charts, explorers, passages, searches = ([b for b in blocks if isinstance(b, k)] for k in kinds)
    cubes = {}  # id → cube

    def number(cube):
        cubes.setdefault(id(cube), cube)
        return list(cubes).index(id(cube))

    shown = [_explorer(block, number) for block in explorers]
    names = [series.name for chart in charts for series in chart.series]
    for block in explorers:
        names += block.cube.axes[block.series] if block.series and block.kind == "lines" else ()
    return {
        "names": list(dict.fromkeys(names)),
        "charts": [_chart(chart) for chart in charts],
        "cubes": [_cube(cube) for cube in cubes.values()],
        "explorers": shown,
        "passages": [_passage(block) for block in passages],
        "searches": [_search(block) for block in searches],
    }


def text(blocks) -> str:
    """JSON for a script element."""
    # "</" and "<!--" mean something there; in JSON "<" may be written as an escape
    content = json.dumps(data(blocks), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return content.replace("</", "<\\/").replace("<!--", "\\u003c!--")


def _chart(chart):
    fields = ("x_title", "y_title", "log_x", "zero_line")
    series = [_series(series, chart.log_x) for series in chart.series]
    return {name: getattr(chart, name) for name in fields} | {"series": series}


def _series(series, log_x):
    shown = [i for i, x in enumerate(series.x) if not log_x or x > 0]
    found = {"name": series.name, "points": series.points}
    for name in ("x", "y", "low", "high"):
        values = getattr(series, name)
        found[name] = None if values is None else _numbers([values[i] for i in shown])
    return found


def _numbers(values):
    """A list for JSON: what is not finite becomes null, a gap in the curve."""
    return [v if isinstance(v, str) else float(v) if math.isfinite(v) else None for v in values]


def _cube(cube):
    out = {"axes": [[name, list(labels)] for name, labels in cube.axes.items()]}
    if cube.values.dtype == object:
        return out | {"values": list(cube.values.reshape(-1))}
    for name in ("values", "low", "high"):
        array = getattr(cube, name)
        out[name] = None if array is None else [_short(v) for v in array.reshape(-1).tolist()]
    return out


def _short(value):
    """Few digits, and no point behind whole numbers."""
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{DIGITS}g}")
    return int(value) if value.is_integer() else value


def _explorer(block, number):
    fields = ("kind", "x", "series", "x_title", "y_title", "level_name", "middle")
    return {name: getattr(block, name) for name in fields} | {
        "title": block.title,
        "cube": number(block.cube),
        "level": None if block.level is None else number(block.level),
        "scales": {name: _numbers(values) for name, values in block.scales.items()},
        "orders": {name: number(cube) for name, cube in block.orders.items()},
        "columns": list(block.columns),
        "start": block.selection(),
    }


def _passage(block):
    return {
        "pieces": block.pieces,
        "hints": block.hints,
        "experts": np.asarray(block.experts).tolist(),
        "weights": np.round(block.weights, DIGITS).tolist(),
    }


def _search(block):
    largest = int(block.experts.max(initial=0))
    kind = np.uint8 if largest < 255 else np.dtype("<u2")
    none = np.iinfo(kind).max
    experts = np.where(block.experts < 0, none, block.experts).astype(kind)
    shares = np.round(_SHARE * block.shares).astype(np.uint8)
    slabs = experts.shape[:-2]
    return {
        "names": list(block.names),
        "axes": [[name, list(labels)] for name, labels in block.axes.items()],
        "shown": experts.shape[-1],
        "bytes": experts.dtype.itemsize,
        "share": _SHARE,
        "counts": block.counts.reshape(-1, len(block.names)).tolist(),
        "count_shape": list(block.counts.shape[:-1]),
        "experts": [_packed(experts[i]) for i in np.ndindex(slabs)],
        "shares": [_packed(shares[i]) for i in np.ndindex(slabs)],
    }


def _packed(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
