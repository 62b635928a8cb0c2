"""A suite's result as a picture: its ratios, and what each contestant took."""

import matplotlib
from matplotlib import figure
from matplotlib.backends import backend_agg

from olmoe_jax.training import plots

OURS, OTHERS, CEILING = "#0072B2", "#999999", "#D9A441"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "ytick.major.size": 0,
}


def draw(result, path):
    """Draws the `ratio_…` and the contestants' seconds into the PNG `path`, whole or not at all.

    Args:
      result: of a suite, as --json has it; seconds are `rounds.Summary` or the dict of one.
    """
    ratios = {
        name.removeprefix("ratio_").replace("_", " "): value
        for name, value in result.items()
        if name.startswith("ratio_") and isinstance(value, (int, float))
    }
    seconds = {
        name: _parts(row["seconds"])
        for name, row in result.get("contestants", {}).items()
        if row.get("seconds") is not None
    }
    panels = [(_draw_ratios, ratios), (_draw_seconds, seconds)]
    panels = [(draw_panel, data) for draw_panel, data in panels if data]
    with matplotlib.rc_context(_STYLE):
        heights = [1.1 + 0.36 * len(data) for _, data in panels] or [1]
        drawing = figure.Figure(figsize=(9, 0.7 + sum(heights)), dpi=130, layout="constrained")
        backend_agg.FigureCanvasAgg(drawing)
        drawing.suptitle(_title(result), x=0.01, ha="left", fontsize=12, fontweight="bold")
        grid = drawing.subplots(len(panels) or 1, 1, height_ratios=heights, squeeze=False)
        for (draw_panel, data), axes in zip(panels, grid[:, 0], strict=False):
            draw_panel(axes, data)
        drawing.supxlabel(_environment(result), fontsize=7, color="0.4", x=0.01, ha="left")
        plots.save(drawing, path)


def _draw_ratios(axes, ratios):
    names = list(ratios)[::-1]
    values = [ratios[name] for name in names]
    axes.barh(names, values, color=OURS, height=0.6)
    axes.axvline(1, color="0.2", linewidth=1)
    for n, value in enumerate(values):
        axes.text(value, n, f" {value:.2f}", va="center")
    axes.set_xlim(0, 1.12 * max([1.0, *values]))
    axes.set_title("ratios")


def _draw_seconds(axes, seconds):
    names = list(seconds)[::-1]
    middle, low, high = zip(*(seconds[name] for name in names), strict=True)
    errors = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    axes.barh(names, middle, color=[_colour(name) for name in names], height=0.6)
    axes.errorbar(middle, range(len(names)), xerr=errors, fmt="none", color="0.2", capsize=2, lw=1)
    for n, (m, h) in enumerate(zip(middle, high, strict=True)):
        axes.text(h, n, f"  {m:.3g} s", va="center")
    axes.set_xlim(0, 1.15 * max(high))
    axes.set_title("seconds, median; the line spans lowest to highest")


def _colour(name):
    if "peak" in name:
        return CEILING
    return OURS if name.startswith("ours") else OTHERS


def _parts(seconds):
    """(median, low, high) of a Summary or its dict."""
    if isinstance(seconds, dict):
        return seconds["median"], seconds["low"], seconds["high"]
    return seconds.median, seconds.low, seconds.high


def _title(result):
    words = (result.get(name) for name in ("suite", "dtype", "shape", "expert_backend"))
    return ", ".join(word for word in words if isinstance(word, str))


def _environment(result):
    found = result.get("environment")
    if not found:
        return ""
    shown = [f"{n} {found['packages'][n]}" for n in ("jax",) if n in found["packages"]]
    peer = result.get("peer")
    if isinstance(peer, dict):
        shown += [f"{n} {peer[n]}" for n in ("torch", "transformers") if n in peer]
    return ", ".join([found["processor"], f"{found['cores']} cores", *shown])
